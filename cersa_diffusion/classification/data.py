"""Examples and their labels: from the sources to checked splits whose labels are numbers from 0."""

import csv
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict

from cersa_diffusion.classification.settings import SplitSettings
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.text import one_line

# "None", "NA" and "null" are classes and sentences like others.
_AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}
_READERS = {
    ".csv": ("csv", _AS_WRITTEN),
    # As GLUE's are: quotation marks stand for themselves, and a sentence may begin with one that none closes.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, **_AS_WRITTEN}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
LABELS = "labels"


@dataclass(frozen=True)
class Splits:
    """The examples of a run.

    Attributes:
        train: the examples to learn, with the column `labels` (pictures in the end as `images.Pictures`).
        validation: name -> examples to evaluate on, likewise.
        label_names: the classes in the order of their numbers; None where numbers are predicted.
    """

    train: Dataset
    validation: dict[str, Dataset]
    label_names: list[str] | None

    def map(self, change: Callable[[Dataset], Dataset]) -> "Splits":
        """The same splits, each of them changed."""
        return Splits(change(self.train), {name: change(split) for name, split in self.validation.items()}, self.label_names)


def read_file(path: str, what: str) -> Dataset:
    """The rows of a CSV, TSV, JSON or JSON-lines file.

    Args:
        path: the file.
        what: how error messages call it, e.g. "train_file".

    Raises:
        ConfigError: no such file, another kind of file, or one that cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        raise ConfigError(f"{what}: {path}: no such file")
    if suffix not in _READERS:
        raise ConfigError(f"{what}: {path}: expected one of {', '.join(_READERS)}")
    if not Path(path).read_bytes().strip():
        raise ConfigError(f"{what}: {path} is empty")
    reader, options = _READERS[suffix]
    try:
        return datasets.load_dataset(reader, data_files={"train": path}, split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error.__cause__ or error)
        raise ConfigError(f"{what}: {path} cannot be read as {suffix.removeprefix('.').upper()} ({reason})") from error


def load_named(settings: SplitSettings, validation_splits: tuple[str, ...] | None) -> tuple[Dataset, dict[str, Dataset]]:
    """The splits of a data set by its name.

    Args:
        settings: name, configuration and splits.
        validation_splits: those that the task says; None: what the settings say.

    Returns:
        Training examples, and name -> examples to evaluate on (none where they are to be held back).

    Raises:
        ConfigError: it cannot be had, or has no such split.
    """
    name, configuration = settings.dataset_name, settings.dataset_config_name
    try:
        # A folder that `save_to_disk` wrote is not for load_dataset.
        if (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        raise ConfigError(f"dataset_name: {name} (configuration {configuration}) cannot be loaded ({reason})") from error
    train = _split(loaded, settings.train_split, "train_split", name)
    if settings.validation_fraction is not None:
        return train, {}
    if settings.validation_split is not None:
        chosen = (settings.validation_split,)
    elif validation_splits is not None:
        chosen = validation_splits
    else:
        chosen = tuple(split for split in ("validation", "test") if split in loaded)[:1] or ("validation",)
    return train, {split: _split(loaded, split, "validation_split", name) for split in chosen}


def _split(loaded: DatasetDict, split: str, option: str, name: str) -> Dataset:
    if split not in loaded:
        raise ConfigError(f"{option}: {name} has no split {split!r}, only {', '.join(loaded)}: name one of them")
    return loaded[split]


def hold_back(
    train: Dataset, validation: dict[str, Dataset], settings: SplitSettings, seed: int
) -> tuple[Dataset, dict[str, Dataset]]:
    """Splits examples to evaluate on off the training examples, where the settings say so.

    Raises:
        ConfigError: no examples to evaluate on, or two sources of them.
    """
    fraction = settings.validation_fraction
    if fraction is None:
        if not validation:
            raise ConfigError("no examples to evaluate on: give a validation_file, validation_dir or validation_fraction")
        return train, validation
    if validation:
        raise ConfigError("validation_fraction holds training examples back, and others are given to evaluate on: leave one out")
    held = math.ceil(fraction * len(train))
    if held >= len(train):
        raise ConfigError(f"validation_fraction {fraction} of {len(train)} examples leaves none to train on")
    parts = train.train_test_split(test_size=held, seed=seed)
    return parts["train"], {"validation": parts["test"]}


def check_columns(splits: dict[str, Dataset], columns: dict[str, str]) -> None:
    """Refuses empty splits and missing columns.

    Args:
        splits: what error messages call a split -> its rows.
        columns: option -> the column that it names.

    Raises:
        ConfigError: the first such problem; the message lists the columns that are there.
    """
    for split, rows in splits.items():
        if not len(rows):
            raise ConfigError(f"{split}: no examples in it")
        for option, column in columns.items():
            if column not in rows.column_names:
                raise ConfigError(f"{option}: {split} has no column {column!r}, only {', '.join(rows.column_names)}")


def _values(rows: Dataset, column: str, split: str) -> list:
    """The labels as they are meant: names where the data set says what its numbers stand for."""
    values, feature = rows.with_format(None)[column][:], rows.features[column]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    # -1 is what data sets give instead of secret labels; where there are others it is one of them.
    if all(value == -1 for value in values):
        values = [None] * len(values)
    missing = [number for number, value in enumerate(values) if value is None or value != value]
    if missing:
        raise ConfigError(
            f"{split}: {len(missing)} of {len(values)} examples have no label, e.g. number {missing[0]}: leave them out "
            "(the test sets of GLUE have none at all)"
        )
    return values


def number_labels(
    train: Dataset, validation: dict[str, Dataset], label_column: str, *, regression: bool
) -> tuple[Dataset, dict[str, Dataset], list[str] | None]:
    """Adds the column `labels`: class numbers from 0, or the numbers to predict as they are.

    Classes are those of the training examples, sorted; numbers by size, names by the alphabet, and the classes of a data set
    that has its own order in that one.

    Args:
        train: examples to learn.
        validation: name -> examples to evaluate on.
        label_column: where the labels are.
        regression: the labels are numbers to predict.

    Returns:
        The splits, and the names of the classes (None for a regression).

    Raises:
        ConfigError: labels are missing, are no numbers where numbers are to be predicted or are fractions where classes are,
            there is only one class, or a class that is only in the examples to evaluate on.
    """
    splits = {"train": train, **validation}
    values = {split: _values(rows, label_column, split) for split, rows in splits.items()}
    if regression:
        wrong = next((v for own in values.values() for v in own if isinstance(v, bool | str)), None)
        if wrong is not None:
            raise ConfigError(f"label_column: {wrong!r} is no number to predict: leave regression out for classes")
        numbers, names = {split: [float(value) for value in own] for split, own in values.items()}, None
    else:
        fraction = next((v for own in values.values() for v in own if isinstance(v, float) and not v.is_integer()), None)
        if fraction is not None:
            raise ConfigError(f"label_column: {fraction} is no class: add --regression where numbers are to be predicted")
        texts = {split: [_class_name(value) for value in own] for split, own in values.items()}
        names = _class_names(train, label_column, texts["train"])
        place = {name: number for number, name in enumerate(names)}
        for split, own in texts.items():
            unknown = sorted(set(own) - set(place))
            if unknown:
                raise ConfigError(f"{split}: classes {unknown[:5]} do not occur in the training examples ({names[:10]})")
        numbers = {split: [place[text] for text in own] for split, own in texts.items()}
    done = {split: _with_labels(rows, label_column, numbers[split]) for split, rows in splits.items()}
    return done.pop("train"), done, names


def _class_name(value: object) -> str:
    # JSON and CSV files may hold 1.0 for 1.
    return str(int(value)) if isinstance(value, float) else str(value)


def _class_names(train: Dataset, label_column: str, texts: list[str]) -> list[str]:
    seen, feature = set(texts), train.features[label_column]
    if len(seen) < 2:
        raise ConfigError(f"train: all {len(texts)} examples are of one class, {texts[0]!r}: there is nothing to tell apart")
    if isinstance(feature, ClassLabel):
        absent = [name for name in feature.names if name not in seen]
        if absent:
            warnings.warn(f"no training examples of the classes {', '.join(absent[:10])}", stacklevel=2)
        return list(feature.names)
    numeric = all(text.lstrip("-").isdigit() for text in seen)
    return sorted(seen, key=int) if numeric else sorted(seen)


def _with_labels(rows: Dataset, label_column: str, numbers: list) -> Dataset:
    # Under a name of its own at first: the table must never be without a column, and may have one of this name.
    rows = rows.add_column("label numbers", numbers)
    return rows.remove_columns(list({label_column, LABELS} & set(rows.column_names))).rename_column("label numbers", LABELS)
