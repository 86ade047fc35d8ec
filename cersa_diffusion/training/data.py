"""Pictures and the order in which a run sees them, as a function of the seed and the sample's number alone.

Nothing here has a state: sample i of a run is the same picture, crop and noise however often the run was interrupted and over
however many processes it is spread.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from cersa_diffusion.errors import ConfigError

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def picture_paths(folder: str | Path, what: str) -> list[Path]:
    """The readable pictures of a folder, sorted by name; everything else is skipped with one warning.

    Args:
        folder: the folder; sub-folders are not entered.
        what: how error messages call it, e.g. "instance_data_dir".

    Raises:
        ConfigError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{what}: {folder} is not a folder")
    paths, skipped = [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and _is_readable(path):
            paths.append(path)
        else:
            skipped.append(path.name)
    if skipped:
        warnings.warn(f"{what}: skipped in {folder}, not readable pictures: {', '.join(skipped)}", stacklevel=2)
    if not paths:
        raise ConfigError(f"{what}: no pictures in {folder}, expected some of {', '.join(sorted(PICTURE_SUFFIXES))}")
    return paths


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.load()
        return True
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False


def load_picture(path: Path) -> Image.Image:
    """A picture as RGB, turned upright, transparency put on white."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def sample_generator(seed: int, sample: int, stream: int) -> torch.Generator:
    """The random numbers of one sample; `stream` keeps uses apart (0: crop and flip, 1: noise, 2: noise of the class picture)."""
    # torch seeds its CPU generator with 32 bits: mix the numbers instead of packing them.
    mixed = np.random.SeedSequence((seed, sample, stream)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


class DreamBoothDataset(Dataset):
    """Samples `first` to `last` of a run: an instance picture each and, with prior preservation, a class picture.

    Args:
        instance_paths: pictures of the subject.
        class_paths: class pictures, empty without prior preservation.
        resolution: side of the square in pixels.
        center_crop: crop the centre instead of a random square.
        random_flip: mirror at random.
        seed: the run's seed.
        first: number of the first sample.
        last: number after the last sample.
    """

    def __init__(
        self,
        instance_paths: list[Path],
        class_paths: list[Path],
        *,
        resolution: int,
        center_crop: bool,
        random_flip: bool,
        seed: int,
        first: int,
        last: int,
    ):
        self.instance_paths, self.class_paths = instance_paths, class_paths
        self.resolution, self.center_crop, self.random_flip = resolution, center_crop, random_flip
        self.seed, self.first, self.last = seed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict:
        sample = self.first + index
        example = {"sample": sample, "instance": self._pixels(self._pick(self.instance_paths, sample), sample)}
        if self.class_paths:
            example["class"] = self._pixels(self._pick(self.class_paths, sample), sample)
        return example

    def _pick(self, paths: list[Path], sample: int) -> Path:
        # Every epoch is a permutation of its own, found again from the sample's number.
        epoch, position = divmod(sample, len(paths))
        return paths[int(np.random.default_rng((self.seed, epoch)).permutation(len(paths))[position])]

    def _pixels(self, path: Path, sample: int) -> torch.Tensor:
        generator = sample_generator(self.seed, sample, 0)
        picture = transforms.resize(load_picture(path), [self.resolution], antialias=True)
        spare_x, spare_y = picture.width - self.resolution, picture.height - self.resolution
        if self.center_crop:
            left, top = spare_x // 2, spare_y // 2
        else:
            left, top = (int(torch.randint(spare + 1, (1,), generator=generator)) for spare in (spare_x, spare_y))
        picture = transforms.crop(picture, top, left, self.resolution, self.resolution)
        if self.random_flip and torch.rand(1, generator=generator) < 0.5:
            picture = transforms.horizontal_flip(picture)
        pixels = transforms.to_dtype(transforms.to_image(picture), torch.float32, scale=True)
        return pixels * 2 - 1


def collate(examples: list[dict]) -> dict:
    """Instance pictures first, class pictures after them, with the numbers of their samples."""
    pixels = [example["instance"] for example in examples]
    pixels += [example["class"] for example in examples if "class" in example]
    return {"pixels": torch.stack(pixels), "samples": torch.tensor([example["sample"] for example in examples])}
