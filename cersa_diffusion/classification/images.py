"""Reads pictures from folders and data sets and prepares the pixel values that a model takes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torchvision.transforms import v2 as transforms

from cersa_diffusion.classification.data import LABELS, Splits, load_named, make_splits
from cersa_diffusion.classification.settings import ImageData
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.pictures import PICTURE_SUFFIXES, load_picture, picture_fault


def load_images(settings: ImageData, seed: int) -> Splits:
    """Loads the pictures of a run into the column `image` and checks that each can be read.

    Raises:
        ConfigError: the source, the labels (see `number_labels`) or some of the pictures cannot be used.
    """
    if settings.train_dir:
        train = read_folder(settings.train_dir, "train_dir")
        loaded = train, {"validation": read_folder(settings.validation_dir, "validation_dir")} if settings.validation_dir else {}
        columns = {"image_column": "image", "label_column": "label"}
    else:
        loaded = load_named(settings, None)
        columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    image_column = columns["image_column"]

    def check_holds_pictures(rows: Dataset, split: str) -> None:
        if not isinstance(rows.features[image_column], datasets.Image):
            raise ConfigError(f"image_column: {image_column!r} of {split} holds no pictures")

    splits = make_splits(loaded, settings, seed, columns=columns, check=check_holds_pictures, regression=False)
    splits = splits.map(lambda rows: _undecoded(rows, image_column))
    for split, rows in {"train": splits.train, **splits.validation}.items():
        _check_readable(rows, split)
    return splits


def _undecoded(rows: Dataset, column: str) -> Dataset:
    rows = rows.select_columns([column, LABELS]).rename_columns({column: "image"} if column != "image" else {})
    # `datasets` must not decode the pictures: it changes how transparent and 16-bit pictures look.
    return rows.cast_column("image", datasets.Image(decode=False))


def read_folder(folder: str, what: str) -> Dataset:
    """Reads the pictures of a folder that has a sub-folder for every class; ignores other files.

    Args:
        folder: the folder.
        what: the setting that error messages name, e.g. "train_dir".

    Raises:
        ConfigError: the folder does not exist, or it has no sub-folders or no pictures.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{what}: {folder} is not a folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ConfigError(f"{what}: {folder} has no sub-folders, expected a sub-folder of pictures for every class")
    pictures = [
        (str(path), number)
        for number, name in enumerate(names)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    ]
    if not pictures:
        raise ConfigError(f"{what}: no pictures in the sub-folders of {folder}, expected {', '.join(sorted(PICTURE_SUFFIXES))}")
    paths, labels = zip(*pictures, strict=True)
    columns = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": list(paths), "label": list(labels)}, features=columns)


def _check_readable(rows: Dataset, split: str) -> None:
    faults = []
    for number, stored in enumerate(rows["image"]):
        source = _source(stored)
        fault = "no picture" if source is None else picture_fault(source)
        if fault:
            faults.append(f"{(stored or {}).get('path') or f'number {number}'} ({fault})")
    if faults:
        examples = ", ".join(faults[:5])
        raise ConfigError(f"{split}: {len(faults)} of {len(rows)} pictures cannot be used, remove or replace them: {examples}")


def _source(stored: dict | None) -> Path | BinaryIO | None:
    if not stored or (stored["bytes"] is None and stored["path"] is None):
        return None
    return Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"])


class Pictures(torch.utils.data.Dataset):
    """Examples with the pixel values that a model takes, and the number of their class.

    Args:
        rows: rows with the columns `image` (not decoded) and `labels`.
        processor: the image processor of the model.
        change: random augmentation of a picture; None: none.
        seed: the random numbers depend only on seed, epoch and example number, so a resumed run draws the same ones.
    """

    def __init__(self, rows: Dataset, processor, change: Callable | None = None, seed: int = 0):
        self.rows, self.processor, self.change, self.seed, self.epoch = rows, processor, change, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        row = self.rows[number]
        picture = load_picture(_source(row["image"]))
        if self.change is not None:
            example_seed = np.random.SeedSequence((self.seed, self.epoch, number)).generate_state(1)[0]
            # torchvision draws from the global generator of the CPU.
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(int(example_seed))
                picture = self.change(picture)
        return {"pixel_values": self.processor(picture, return_tensors="pt")["pixel_values"][0], LABELS: row[LABELS]}


def with_pixels(splits: Splits, processor, settings: ImageData, seed: int) -> Splits:
    """Wraps the splits of `load_images` as `Pictures`.

    Args:
        splits: what `load_images` returned.
        processor: the image processor of the model.
        settings: `random_resized_crop` and `random_flip` apply to the training examples.
        seed: seed of the random crops and flips.
    """
    size = processor.size
    sides = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    changes = []
    if settings.random_resized_crop:
        changes.append(transforms.RandomResizedCrop(sides, scale=(0.5, 1.0), antialias=True))
    if settings.random_flip:
        changes.append(transforms.RandomHorizontalFlip())
    train = Pictures(splits.train, processor, transforms.Compose(changes) if changes else None, seed)
    validation = {name: Pictures(rows, processor) for name, rows in splits.validation.items()}
    return Splits(train, validation, splits.label_names)
