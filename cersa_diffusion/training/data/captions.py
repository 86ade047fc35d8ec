"""The pictures of a run with their prompts, from a folder with captions beside the pictures or from a data set."""

import io
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.pictures import METADATA_FILE, load_picture, picture_fault, picture_paths, picture_size, warn_of_skipped
from cersa_diffusion.text import one_line
from cersa_diffusion.training.settings.config import DreamBoothConfig

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DatasetPicture:
    """A picture in a row of a data set, read again each time it is opened.

    Args:
        dataset: the data set, which must not decode its pictures.
        column: the column of the pictures.
        row: the number of the row.
    """

    dataset: "Dataset" = field(repr=False, compare=False)
    column: str
    row: int

    @property
    def name(self) -> str:
        """The name of the picture in messages."""
        return f"row {self.row}"

    def open(self) -> BinaryIO:
        """Opens the file of the picture."""
        cell = self.dataset[self.row][self.column]
        if cell is None:
            raise ValueError("it contains no picture")
        return open(cell["path"], "rb") if cell["bytes"] is None else io.BytesIO(cell["bytes"])


@dataclass(frozen=True)
class Example:
    """A training picture with its prompt.

    Args:
        picture: a file, or a row of a data set.
        prompt: the caption of the picture, or the prompt of the run.
    """

    picture: Path | DatasetPicture
    prompt: str

    @property
    def name(self) -> str:
        """The name of the picture in messages."""
        return self.picture.name

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, upright, without reading the pixels."""
        with self._open() as file:
            return picture_size(file)

    def load(self) -> Image.Image:
        """The picture as RGB, upright."""
        with self._open() as file:
            return load_picture(file)

    def _open(self) -> BinaryIO:
        return self.picture.open() if isinstance(self.picture, DatasetPicture) else self.picture.open("rb")


def read_examples(config: DreamBoothConfig) -> list[Example]:
    """Reads the usable instance pictures of a run, each with its caption or, if it has none, with `instance_prompt`.

    In a folder the caption is in a text file with the name of the picture or in `METADATA_FILE`; the text file has priority.
    The pictures of a folder are sorted by name. Pictures that cannot be used are skipped with one warning.

    Raises:
        ConfigError: the folder, the data set, the column, a usable picture or the package `datasets` is missing, or a caption is
            empty or cannot be read.
    """
    return _from_folder(config) if config.dataset_name is None else _from_dataset(config)


def class_examples(paths: list[Path], config: DreamBoothConfig) -> list[Example]:
    """The class pictures of a run, all with `class_prompt`."""
    return [Example(path, config.class_prompt) for path in paths]


def caption_summary(examples: list[Example], config: DreamBoothConfig) -> str:
    """A line with the number of pictures and the number of those with captions of their own."""
    captioned = sum(example.prompt != config.instance_prompt for example in examples)
    prompts = f"{captioned} with captions of their own" if captioned else f"all of '{config.instance_prompt}'"
    return f"{len(examples)} picture{'s' * (len(examples) != 1)}, {prompts}"


def _from_folder(config: DreamBoothConfig) -> list[Example]:
    folder = Path(config.instance_data_dir)
    paths = picture_paths(folder, "instance_data_dir")
    metadata = folder / METADATA_FILE
    captions = _metadata_captions(metadata, config)
    unused = sorted(captions.keys() - {path.name for path in paths})
    warn_of_skipped([(name, "not one of the usable pictures") for name in unused], f"{metadata}: rows skipped")
    examples = []
    for path in paths:
        text_file = path.with_suffix(".txt")
        prompt = config.instance_prompt
        if text_file.is_file():
            prompt = _clean_caption(_read_text(text_file), str(text_file))
        elif path.name in captions:
            prompt = _clean_caption(captions[path.name], f"{metadata}: {config.caption_column!r} of {path.name}")
        examples.append(Example(path, prompt))
    return examples


def _metadata_captions(file: Path, config: DreamBoothConfig) -> dict[str, Any]:
    """File name -> caption of the metadata file, unchecked; empty if the file has no captions or does not exist."""
    rows: dict[str, dict] = {}
    # Not `splitlines`: JSON strings may contain Unicode's other line separators.
    for number, line in enumerate(_read_text(file).split("\n") if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[Path(row["file_name"]).as_posix()] = row
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{file}: line {number} is not a JSON object with a file_name: {line[:60]!r}") from error
    has_captions = _has_captions({name for row in rows.values() for name in row}, config, str(file))
    return {name: row.get(config.caption_column) for name, row in rows.items()} if has_captions else {}


def _from_dataset(config: DreamBoothConfig) -> list[Example]:
    dataset = _load_dataset(config)
    name, column = f"dataset_name: {config.dataset_name}", config.image_column
    pictures = _undecoded_pictures(dataset, column, name)
    captions = dataset[config.caption_column] if _has_captions(dataset.column_names, config, name) else None
    examples, skipped = [], []
    for row in range(len(pictures)):
        picture = DatasetPicture(pictures, column, row)
        fault = _dataset_picture_fault(picture)
        if fault is not None:
            skipped.append((picture.name, fault))
            continue
        prompt = config.instance_prompt
        if captions is not None:
            prompt = _clean_caption(captions[row], f"{name}: {config.caption_column!r} of {picture.name}")
        examples.append(Example(picture, prompt))
    warn_of_skipped(skipped, f"{name}: skipped")
    if not examples:
        raise ConfigError(f"{name}: column {column!r} has no usable pictures in its {len(pictures)} rows")
    return examples


def _load_dataset(config: DreamBoothConfig) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset_name needs the package datasets: pip install cersa-diffusion[train]") from error
    try:
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        raise ConfigError(f"dataset_name: {config.dataset_name} cannot be loaded with the split 'train' ({reason})") from error


def _undecoded_pictures(dataset: "Dataset", column: str, name: str) -> "Dataset":
    import datasets

    if column not in dataset.column_names:
        raise ConfigError(f"{name}: no column {column!r} (image_column), its columns: {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(f"{name}: column {column!r} (image_column) holds {dataset.features[column]}, expected pictures")
    # Decoded by this package, so that the pictures of a data set are treated like those of a folder.
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _dataset_picture_fault(picture: DatasetPicture) -> str | None:
    try:
        file = picture.open()
    except (OSError, ValueError) as error:
        return str(error)
    with file:
        return picture_fault(file)


def _has_captions(columns: Collection[str], config: DreamBoothConfig, source: str) -> bool:
    """Whether the caption column exists; it may be missing only if `caption_column` has its default."""
    present = config.caption_column in columns
    if not present and config.caption_column != DreamBoothConfig.caption_column:
        names = ", ".join(sorted(columns)) or "none"
        raise ConfigError(f"{source}: no column {config.caption_column!r} (caption_column), its columns: {names}")
    return present


def _clean_caption(caption: Any, where: str) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise ConfigError(f"{where}: the caption is {caption!r}, expected text: write it, or remove it to use instance_prompt")
    return " ".join(caption.split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}): save it as UTF-8") from error
