"""The pictures of a run with their prompts: from a folder with captions beside the pictures, or from a data set."""

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
    """A picture in a row of a data set, read anew whenever it is opened.

    Args:
        dataset: the data set; its pictures are not decoded by it.
        column: the column of the pictures.
        row: the number of the row.
    """

    dataset: "Dataset" = field(repr=False, compare=False)
    column: str
    row: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"row {self.row}"

    def open(self) -> BinaryIO:
        """The picture's file."""
        cell = self.dataset[self.row][self.column]
        if cell is None:
            raise ValueError("there is no picture in it")
        return open(cell["path"], "rb") if cell["bytes"] is None else io.BytesIO(cell["bytes"])


@dataclass(frozen=True)
class Example:
    """A picture to learn and the prompt that says what it shows.

    Args:
        picture: a file, or a row of a data set.
        prompt: its own caption, or the prompt of the run.
    """

    picture: Path | DatasetPicture
    prompt: str

    @property
    def name(self) -> str:
        """How messages call it."""
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
    """The instance pictures of a run, each with its own caption or else with `instance_prompt`.

    In a folder the caption is in a text file of the picture's name, or in `METADATA_FILE`; the text file comes first.

    Args:
        config: names the folder or the data set, and the columns.

    Returns:
        The usable pictures, those of a folder sorted by name; the others are skipped with one warning.

    Raises:
        ConfigError: no folder, no data set, no such column, no usable picture, a caption that is empty or cannot be read, or the
            `datasets` package is missing.
    """
    return _from_folder(config) if config.dataset_name is None else _from_dataset(config)


def class_examples(paths: list[Path], config: DreamBoothConfig) -> list[Example]:
    """The class pictures of a run, all with `class_prompt`.

    Args:
        paths: of `picture_paths`; none without prior preservation.
        config: says the prompt.
    """
    return [Example(path, config.class_prompt) for path in paths]


def caption_summary(examples: list[Example], config: DreamBoothConfig) -> str:
    """A line that says how many pictures there are and how many have captions of their own."""
    own = sum(example.prompt != config.instance_prompt for example in examples)
    pictures = f"{len(examples)} picture{'s' * (len(examples) != 1)}"
    return f"{pictures}, {own} with captions of their own" if own else f"{pictures}, all of '{config.instance_prompt}'"


def _from_folder(config: DreamBoothConfig) -> list[Example]:
    folder = Path(config.instance_data_dir)
    paths = picture_paths(folder, "instance_data_dir")
    listed = _metadata_captions(folder / METADATA_FILE, config)
    unused = sorted(listed.keys() - {path.name for path in paths})
    warn_of_skipped([(name, "not among the pictures used") for name in unused], f"{folder / METADATA_FILE}: rows left out")
    examples = []
    for path in paths:
        side_car = path.with_suffix(".txt")
        caption = config.instance_prompt
        if side_car.is_file():
            caption = _checked(_text(side_car), str(side_car))
        elif path.name in listed:
            caption = _checked(listed[path.name], f"{folder / METADATA_FILE}: {config.caption_column!r} of {path.name}")
        examples.append(Example(path, caption))
    return examples


def _metadata_captions(file: Path, config: DreamBoothConfig) -> dict[str, Any]:
    """File name -> caption of the metadata file, unchecked; nothing where it has no captions."""
    rows: dict[str, dict] = {}
    # Split at line ends alone: JSON texts may hold Unicode's other line separators.
    for number, line in enumerate(_text(file).split("\n") if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[Path(row["file_name"]).as_posix()] = row
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{file}: line {number} is no JSON object with a file_name: {line[:60]!r}") from error
    if not _captions_are_in({name for row in rows.values() for name in row}, config, str(file)):
        return {}
    return {name: row.get(config.caption_column) for name, row in rows.items()}


def _from_dataset(config: DreamBoothConfig) -> list[Example]:
    dataset = _load_dataset(config)
    name, column = f"dataset_name: {config.dataset_name}", config.image_column
    pictures = _undecoded(dataset, column, name)
    captions = None
    if _captions_are_in(dataset.column_names, config, name):
        captions = dataset[config.caption_column]
    examples, skipped = [], []
    for row in range(len(pictures)):
        picture = DatasetPicture(pictures, column, row)
        fault = _fault_of_row(picture)
        if fault is not None:
            skipped.append((picture.name, fault))
            continue
        caption = config.instance_prompt
        if captions is not None:
            caption = _checked(captions[row], f"{name}: {config.caption_column!r} of {picture.name}")
        examples.append(Example(picture, caption))
    warn_of_skipped(skipped, f"{name}: skipped")
    if not examples:
        raise ConfigError(f"{name}: no usable pictures in column {column!r} of its {len(pictures)} rows")
    return examples


def _load_dataset(config: DreamBoothConfig) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset_name needs the datasets package: pip install cersa-diffusion[train]") from error
    try:
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        raise ConfigError(f"dataset_name: {config.dataset_name} cannot be loaded with a split 'train' ({reason})") from error


def _undecoded(dataset: "Dataset", column: str, name: str) -> "Dataset":
    import datasets

    if column not in dataset.column_names:
        raise ConfigError(f"{name}: no column {column!r} (image_column), it has {', '.join(dataset.column_names)}")
    if not isinstance(dataset.features[column], datasets.Image):
        raise ConfigError(f"{name}: column {column!r} (image_column) holds {dataset.features[column]}, expected pictures")
    # Decoded here, a picture out of a data set is treated like one out of a folder.
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _fault_of_row(picture: DatasetPicture) -> str | None:
    try:
        file = picture.open()
    except (OSError, ValueError) as error:
        return str(error)
    with file:
        return picture_fault(file)


def _captions_are_in(columns: Collection[str], config: DreamBoothConfig, source: str) -> bool:
    """Whether there is a column of captions; only the one that nobody asked for may be missing."""
    if config.caption_column in columns:
        return True
    if config.caption_column != DreamBoothConfig.caption_column:
        found = ", ".join(sorted(columns)) or "none"
        raise ConfigError(f"{source}: no column {config.caption_column!r} (caption_column), its columns: {found}")
    return False


def _checked(caption: Any, where: str) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise ConfigError(f"{where}: the caption is {caption!r}, expected a text: write one, or remove it to use instance_prompt")
    return " ".join(caption.split())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}): save it as UTF-8") from error
