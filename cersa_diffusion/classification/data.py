"""Reads examples from files and data sets, checks them, and numbers their labels from 0."""

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

# "None", "NA" and "null" are valid class names and sentences, not missing values.
_ONLY_EMPTY_IS_MISSING = {"keep_default_na": False, "na_values": [""]}
_READERS = {
    ".csv": ("csv", _ONLY_EMPTY_IS_MISSING),
    # As in the files of GLUE: quotation marks are plain text, and a sentence may begin with one that is never closed.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, **_ONLY_EMPTY_IS_MISSING}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
LABELS = "labels"
# Training examples, and split name -> examples to evaluate on.
Loaded = tuple[Dataset, dict[str, Dataset]]


@dataclass(frozen=True)
class Splits:
    """The examples of a run.

    Attributes:
        train: the training examples, with the column `labels`; `with_pixels` turns pictures into `images.Pictures`.
        validation: split name -> examples to evaluate on, in the same form.
        label_names: the class names in the order of their numbers; None for a regression.
    """

    train: Dataset
    validation: dict[str, Dataset]
    label_names: list[str] | None

    def map(self, change: Callable[[Dataset], Dataset]) -> "Splits":
        """Applies a function to every split."""
        return Splits(change(self.train), {name: change(split) for name, split in self.validation.items()}, self.label_names)


def read_file(path: str, what: str) -> Dataset:
    """Reads the rows of a CSV, TSV, JSON or JSON-lines file.

    Args:
        path: the file.
        what: the setting that error messages name, e.g. "train_file".

    Raises:
        ConfigError: the file does not exist, has another suffix, is empty or cannot be read.
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


def load_named(settings: SplitSettings, validation_splits: tuple[str, ...] | None) -> Loaded:
    """Loads the splits of a named data set.

    Args:
        settings: name, configuration and splits of the data set.
        validation_splits: the splits to evaluate on if the settings name none; None: validation, or else test.

    Returns:
        The training examples, and split name -> examples to evaluate on (empty if training examples will be held back).

    Raises:
        ConfigError: the data set cannot be loaded, or has no such split.
    """
    name, configuration = settings.dataset_name, settings.dataset_config_name
    try:
        # load_dataset does not read folders that `save_to_disk` wrote.
        if (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"dataset_name: {name} (configuration {configuration}) cannot be loaded ({one_line(error)})") from error
    train = _split(loaded, settings.train_split, "train_split", name)
    if settings.validation_fraction is not None:
        return train, {}
    if settings.validation_split is not None:
        validation_splits = (settings.validation_split,)
    elif validation_splits is None:
        validation_splits = ("test",) if "test" in loaded and "validation" not in loaded else ("validation",)
    return train, {split: _split(loaded, split, "validation_split", name) for split in validation_splits}


def _split(loaded: DatasetDict, split: str, option: str, name: str) -> Dataset:
    if split not in loaded:
        raise ConfigError(f"{option}: {name} has no split {split!r}, only {', '.join(loaded)}: name one of them")
    return loaded[split]


def make_splits(
    loaded: Loaded, settings: SplitSettings, seed: int, *, columns: dict[str, str], check: Callable, regression: bool
) -> Splits:
    """Checks loaded examples, holds some of them back if the settings say so, and numbers the labels.

    Args:
        loaded: training examples, and split name -> examples to evaluate on.
        settings: `validation_fraction` is the share of the training examples that is held back.
        seed: decides which examples are held back.
        columns: option -> the column that it names; one of the options is "label_column".
        check: refuses rows whose inputs cannot be used; its arguments are the rows and the name of their split.
        regression: the labels are numbers to predict.

    Raises:
        ConfigError: examples, columns or labels are missing or cannot be used.
    """
    splits = {"train": loaded[0], **loaded[1]}
    for split, rows in splits.items():
        if not len(rows):
            raise ConfigError(f"{split}: there are no examples in this split")
        for option, column in columns.items():
            if column not in rows.column_names:
                raise ConfigError(f"{option}: {split} has no column {column!r}, only {', '.join(rows.column_names)}")
    for split, rows in splits.items():
        check(rows, split)
    train, validation = _hold_back(*loaded, settings.validation_fraction, seed)
    return Splits(*number_labels(train, validation, columns["label_column"], regression=regression))


def _hold_back(train: Dataset, validation: dict[str, Dataset], fraction: float | None, seed: int) -> Loaded:
    if fraction is None:
        if not validation:
            raise ConfigError("no examples to evaluate on: give a validation_file, validation_dir or validation_fraction")
        return train, validation
    if validation:
        raise ConfigError("validation_fraction holds back training examples, but others to evaluate on are given: leave one out")
    held_back = math.ceil(fraction * len(train))
    if held_back >= len(train):
        raise ConfigError(f"validation_fraction {fraction} of {len(train)} examples leaves no examples to train on")
    splits = train.train_test_split(test_size=held_back, seed=seed)
    return splits["train"], {"validation": splits["test"]}


def _read_labels(rows: Dataset, column: str, split: str) -> list:
    """The labels of all rows; class names if the data set names its class numbers."""
    labels, feature = rows.with_format(None)[column][:], rows.features[column]
    if isinstance(feature, ClassLabel):
        labels = [None if label is None or label < 0 else feature.int2str(label) for label in labels]
    # Data sets with secret labels have -1 in every row; beside other values, -1 is a label.
    if all(label == -1 for label in labels):
        labels = [None] * len(labels)
    missing = [number for number, label in enumerate(labels) if label is None or label != label]
    if missing:
        raise ConfigError(
            f"{split}: {len(missing)} of {len(labels)} examples have no label, e.g. number {missing[0]}: leave them out "
            "(the test sets of GLUE have no labels at all)"
        )
    return labels


def number_labels(
    train: Dataset, validation: dict[str, Dataset], label_column: str, *, regression: bool
) -> tuple[Dataset, dict[str, Dataset], list[str] | None]:
    """Adds the column `labels`: class numbers from 0, or for a regression the unchanged numbers.

    The classes are those of the training examples: numbers sorted by size, names alphabetically. A data set that defines its
    own order of the classes keeps it.

    Args:
        train: training examples.
        validation: split name -> examples to evaluate on.
        label_column: the column with the labels.
        regression: the labels are numbers to predict.

    Returns:
        The splits, and the names of the classes (None for a regression).

    Raises:
        ConfigError: labels are missing; a regression has labels that are not numbers; classes are fractions; there is only one
            class; or a class occurs only in the examples to evaluate on.
    """
    splits = {"train": train, **validation}
    labels = {split: _read_labels(rows, label_column, split) for split, rows in splits.items()}
    all_labels = [label for split_labels in labels.values() for label in split_labels]
    if regression:
        wrong = next((label for label in all_labels if isinstance(label, bool | str)), None)
        if wrong is not None:
            raise ConfigError(f"label_column: {wrong!r} is not a number, as regression expects: leave regression out for classes")
        numbers, names = {split: list(map(float, split_labels)) for split, split_labels in labels.items()}, None
    else:
        fraction = next((label for label in all_labels if isinstance(label, float) and not label.is_integer()), None)
        if fraction is not None:
            raise ConfigError(f"label_column: {fraction} is not a class: add --regression to predict numbers")
        classes = {split: list(map(_class_name, split_labels)) for split, split_labels in labels.items()}
        names = _class_names(train, label_column, classes["train"])
        number_of = {name: number for number, name in enumerate(names)}
        for split, split_classes in classes.items():
            unknown = sorted(set(split_classes) - set(number_of))
            if unknown:
                raise ConfigError(f"{split}: classes {unknown[:5]} do not occur in the training examples ({names[:10]})")
        numbers = {split: [number_of[name] for name in split_classes] for split, split_classes in classes.items()}
    numbered = {split: _with_labels(rows, label_column, numbers[split]) for split, rows in splits.items()}
    return numbered.pop("train"), numbered, names


def _class_name(label: object) -> str:
    # JSON and CSV files may hold 1.0 instead of 1.
    return str(int(label)) if isinstance(label, float) else str(label)


def _class_names(train: Dataset, label_column: str, classes: list[str]) -> list[str]:
    seen, feature = set(classes), train.features[label_column]
    if len(seen) < 2:
        raise ConfigError(f"train: all {len(classes)} examples have the class {classes[0]!r}, expected at least two classes")
    if isinstance(feature, ClassLabel):
        absent = [name for name in feature.names if name not in seen]
        if absent:
            warnings.warn(f"there are no training examples of the classes {', '.join(absent[:10])}", stacklevel=2)
        return list(feature.names)
    numeric = all(name.lstrip("-").isdigit() for name in seen)
    return sorted(seen, key=int) if numeric else sorted(seen)


def _with_labels(rows: Dataset, label_column: str, numbers: list) -> Dataset:
    # First under a temporary name: a table needs at least one column, and this one may already have a column `labels`.
    rows = rows.add_column("label numbers", numbers)
    return rows.remove_columns(list({label_column, LABELS} & set(rows.column_names))).rename_column("label numbers", LABELS)
