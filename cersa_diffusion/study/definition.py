"""The definition of a comparison: base, subjects, methods as named rows, seeds, candidate learning rates, and common settings."""

import json
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import NEITHER, is_hub_id
from cersa_diffusion.methods.settings import READ_BY
from cersa_diffusion.pipelines.draw import DRAWING_DTYPES
from cersa_diffusion.study.subjects import VALIDATION, Subject, read_subject
from cersa_diffusion.training.settings.checks import check_names
from cersa_diffusion.training.settings.config import DreamBoothConfig

BASE_ROW = "base"
UNTRAINED = ("base", "truncated")
# Name in `--rows` for the two rows of matched memory, whose settings are not known before the models are loaded.
MATCHED = "matched"
# Settings that the [training] table must not contain: other parts of the study set them, or they differ between cells.
_SET_ELSEWHERE = {
    "pretrained_model_name_or_path", "instance_prompt", "instance_data_dir", "dataset_name", "class_data_dir",
    "class_prompt", "output_dir", "seed", "method", "learning_rate", "text_encoder_lr", "resume_from_checkpoint",
    "num_train_epochs", "validation_prompt", "push_to_hub", "report_to",
}  # fmt: skip
# Measure -> whether a higher value is better.
SELECTABLE = {"distance": False, "clipscore": True, "clip_i": True, "similarity": True}
_ROW_NAME = re.compile(r"[\w.@=+-]+")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: name of the row and of its folder.
        method: a method of `DreamBoothConfig`, or "base" or "truncated", which are not trained.
        settings: settings of the method (alpha, rank, ...).
        learning_rates: candidates.
    """

    name: str
    method: str
    settings: Mapping[str, object] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether the method needs a training."""
        return self.method not in UNTRAINED


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, in the same way for every row and with the scheduler of the base.

    Args:
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance.
        pictures: number of pictures per prompt, from seeds that are the same for every row.
        batch_size: number of pictures per batch.
        dtype: of the pipelines that draw, a key of `DRAWING_DTYPES`.
    """

    steps: int = 25
    guidance: float = 4.0
    pictures: int = 4
    batch_size: int = 16
    dtype: str = "auto"


@dataclass(frozen=True)
class Scoring:
    """The models that score.

    Args:
        clip: folder or hub id of a CLIP in transformers' format.
        vision: folder or hub id of a vision transformer, such as DINO.
    """

    clip: str
    vision: str


@dataclass(frozen=True)
class MatchedMemory:
    """Two further rows, LoRA and CERSA, that take the same number of bytes in training.

    Args:
        learning_rates: candidates of the methods "lora" and "cersa".
        lora_rank: rank of LoRA; CERSA gets the bytes of this LoRA as its memory budget.
        budget: instead of `lora_rank`: LoRA gets the highest rank that fits, and CERSA gets the bytes of this LoRA.
    """

    learning_rates: Mapping[Literal["lora", "cersa"], tuple[float, ...]]
    lora_rank: int | None = None
    budget: str | None = None


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        root: folder to which relative paths refer.
        base: folder or hub id of the base pipeline.
        subjects: folders of the subjects.
        rows: the methods; the untouched base is always the first row.
        scoring: the models that score.
        training: settings of `DreamBoothConfig` that all trained rows share; max_train_steps is required.
        sampling: how pictures are drawn.
        seeds: number of trainings for each row and subject.
        tuning_subjects: names of the subjects whose scores choose the learning rates; None: the first subject.
        select_by: the measure that chooses them, a key of `SELECTABLE`.
        text_encoder_rate: learning rate of the text encoder, as a factor of the learning rate.
        unique_token: word that is removed from the prompts before they are scored.
        matched_memory: two further rows, or None.
    """

    root: Path
    base: str
    subjects: tuple[str, ...]
    rows: tuple[Row, ...]
    scoring: Scoring
    training: Mapping[str, object]
    sampling: Sampling = Sampling()
    seeds: int = 3
    tuning_subjects: tuple[str, ...] | None = None
    select_by: str = "distance"
    text_encoder_rate: float = 1.0
    unique_token: str = "sks"
    matched_memory: MatchedMemory | None = None

    def place(self, name_or_path: str) -> str:
        """The path relative to the folder of the study; a hub id is returned unchanged."""
        path = self.root / name_or_path
        return str(path) if path.exists() or name_or_path.startswith((".", "/")) else name_or_path

    def read_subjects(self) -> dict[str, Subject]:
        """Name -> subject, in the order of the study.

        Raises:
            ConfigError: a subject cannot be used, or two subjects have the same name.
        """
        subjects = [read_subject(Path(self.place(folder))) for folder in self.subjects]
        names = [subject.name for subject in subjects]
        if len(set(names)) != len(names):
            raise ConfigError(f"subjects are called {', '.join(names)}: expected different names")
        return dict(zip(names, subjects, strict=True))

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)

    def config(self, row: Row, subject: Subject, **of_cell) -> DreamBoothConfig:
        """The settings of a training; for a truncated row, the settings of its truncation.

        Args:
            row: the method.
            subject: the subject to learn.
            of_cell: settings of the cell: learning_rate, seed, output_dir, class_data_dir.

        Raises:
            ConfigError: the settings cannot be used.
        """
        settings = {"checkpointing_steps": 100, "checkpoints_total_limit": 1, **self.training, **row.settings, **of_cell}
        if settings.get("train_text_encoder", True) and "learning_rate" in of_cell:
            settings["text_encoder_lr"] = of_cell["learning_rate"] * self.text_encoder_rate
        if settings.get("with_prior_preservation"):
            settings["class_prompt"] = subject.class_prompt
        else:
            settings.pop("class_data_dir", None)
        return DreamBoothConfig(
            pretrained_model_name_or_path=self.place(self.base),
            instance_prompt=subject.instance_prompt,
            instance_data_dir=str(subject.instance_data_dir),
            method=row.method if row.trained else "cersa",
            resume_from_checkpoint="latest",
            **settings,
        )

    def to_dict(self) -> dict:
        """The study as plain values for JSON."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict) -> "Study":
        """The inverse of `to_dict`."""
        rows = tuple(Row(**row | {"learning_rates": tuple(row["learning_rates"])}) for row in values["rows"])
        converted = {"root": Path(values["root"]), "rows": rows, "subjects": tuple(values["subjects"])}
        converted |= {"sampling": Sampling(**values["sampling"]), "scoring": Scoring(**values["scoring"])}
        converted |= {"matched_memory": MatchedMemory(**values["matched_memory"]) if values["matched_memory"] else None}
        converted |= {"tuning_subjects": values["tuning_subjects"] and tuple(values["tuning_subjects"])}
        return cls(**values | converted)


def read_study(path: str | Path, **changes) -> Study:
    """Reads a study from a TOML file.

    Args:
        path: the file; the paths in it are relative to its folder.
        changes: values that replace those of the file: `subjects` and `rows` (some of its names), `seeds`, `steps` (of the
            training), `dtype` (of the sampling), `lora_rank` or `budget` (of matched memory); None keeps the value of the file.

    Raises:
        ConfigError: the file cannot be read, or the study cannot be run.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"study {path}: cannot be read as TOML ({error})") from error
    try:
        study = _replace_values(_study_from_toml(values, path.absolute().parent), **changes)
        check_study(study)
    except ConfigError as error:
        raise ConfigError(f"study {path}: {error}") from error
    return study


def _study_from_toml(values: dict, root: Path) -> Study:
    known = {f.name for f in fields(Study)} - {"root"}
    _check_keys(values, known, {"base", "subjects", "rows", "scoring", "training"}, "the study")
    converted = {name: _table(kind, values.get(name, {}), name) for name, kind in (("sampling", Sampling), ("scoring", Scoring))}
    converted |= {name: tuple(_texts(values[name], name)) for name in ("subjects", "tuning_subjects") if name in values}
    rows = [Row(BASE_ROW, BASE_ROW), *(_row_from_toml(name, row) for name, row in _dict(values["rows"], "rows").items())]
    if "matched_memory" in values:
        matched = dict(_dict(values["matched_memory"], "matched_memory"))
        matched["learning_rates"] = {
            method: _rates(matched.pop(f"{method}_learning_rates", None), f"matched_memory.{method}_learning_rates")
            for method in ("lora", "cersa")
        }
        converted["matched_memory"] = _table(MatchedMemory, matched, "matched_memory")
    training = _dict(values["training"], "training")
    return Study(**values | converted | {"root": root, "rows": tuple(rows), "training": training})


def _replace_values(
    study: Study, *, subjects=None, rows=None, seeds=None, steps=None, dtype=None, lora_rank=None, budget=None
) -> Study:
    if subjects is not None:
        folders = {read_subject(Path(study.place(folder))).name: folder for folder in study.subjects}
        study = replace(study, subjects=tuple(folders[name] for name in _chosen_names(subjects, folders, "subjects")))
    if rows is not None:
        rows_by_name = {row.name: row for row in study.rows}
        known = rows_by_name | ({MATCHED: None} if study.matched_memory else {})
        chosen = dict.fromkeys([BASE_ROW, *_chosen_names(rows, known, "rows")])
        matched = study.matched_memory if MATCHED in chosen else None
        study = replace(study, rows=tuple(rows_by_name[name] for name in chosen if name in rows_by_name), matched_memory=matched)
    if seeds is not None:
        study = replace(study, seeds=seeds)
    if steps is not None:
        study = replace(study, training=study.training | {"max_train_steps": steps})
    if dtype is not None:
        study = replace(study, sampling=replace(study.sampling, dtype=dtype))
    if lora_rank is not None or budget is not None:
        if study.matched_memory is None:
            raise ConfigError("lora_rank and budget need the learning rates of a [matched_memory] table")
        study = replace(study, matched_memory=replace(study.matched_memory, lora_rank=lora_rank, budget=budget))
    return study


def _row_from_toml(name: str, row: object) -> Row:
    settings = dict(_dict(row, f"rows.{name}"))
    method, rates = settings.pop("method", None), settings.pop("learning_rates", None)
    if not isinstance(method, str) or method == BASE_ROW or name == BASE_ROW:
        raise ConfigError(
            f"row {name}: method is {method!r}, expected a method of the trainer or 'truncated'; the base is always a row"
        )
    if not _ROW_NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"row {name!r}: the name is also a folder name: expected letters, digits and . _ - + = @, no dot first")
    for setting in settings:
        if setting not in READ_BY:
            raise ConfigError(f"row {name}: {setting} is not a setting of a method, expected some of {', '.join(READ_BY)}")
    if method == "truncated":
        if rates is not None:
            raise ConfigError(f"row {name}: a truncated base is not trained: leave learning_rates out")
        return Row(name, method, settings)
    return Row(name, method, settings, _rates(rates, f"rows.{name}.learning_rates"))


def check_study(study: Study) -> None:
    """Refuses a study that cannot be run, before anything is loaded or written.

    Raises:
        ConfigError: the first fault of the study, and what to do.
    """
    if not isinstance(study.seeds, int) or study.seeds < 1:
        raise ConfigError(f"seeds is {study.seeds!r}, expected the number of trainings for each row, at least 1")
    for name in ("steps", "pictures", "batch_size", "guidance"):
        if not getattr(study.sampling, name) > 0:
            raise ConfigError(f"sampling.{name} is {getattr(study.sampling, name)}, expected more than 0")
    if study.sampling.dtype not in DRAWING_DTYPES:
        raise ConfigError(f"sampling.dtype is {study.sampling.dtype!r}, expected one of {', '.join(DRAWING_DTYPES)}")
    for name in (study.base, study.scoring.clip, study.scoring.vision):
        place = study.place(name)
        if not Path(place).is_dir() and not is_hub_id(name):
            raise ConfigError(f"{place}: {NEITHER}")
    _check_training(study)
    subjects = study.read_subjects()
    if not subjects:
        raise ConfigError("subjects is empty, expected folders of subjects")
    names_for_tuning = tuning_subjects(study, subjects)
    if study.select_by not in SELECTABLE:
        raise ConfigError(f"select_by is {study.select_by!r}, expected one of {', '.join(SELECTABLE)}")
    for name in names_for_tuning:
        if study.select_by == "distance" and not subjects[name].parts[VALIDATION].held_back:
            raise ConfigError(
                f"select_by = 'distance' compares with held-back pictures, but subject {name} has none in its validation part: "
                "expected 'similarity', 'clip_i' or 'clipscore'"
            )
    matched = study.matched_memory
    if matched and (matched.lora_rank is None) == (matched.budget is None):
        raise ConfigError("matched_memory needs either lora_rank or budget")
    for row in study.rows:
        with warnings.catch_warnings():
            # In a comparison a setting without effect is a mistake.
            warnings.simplefilter("error")
            try:
                for rate in row.learning_rates or (None,):
                    learning_rate = {} if rate is None else {"learning_rate": rate}
                    study.config(row, next(iter(subjects.values())), class_data_dir="class_pictures", **learning_rate)
            except (ConfigError, UserWarning) as error:
                raise ConfigError(f"row {row.name}: {error}") from error


def tuning_subjects(study: Study, subjects: Mapping[str, Subject]) -> tuple[str, ...]:
    """Names of the subjects whose scores choose the learning rates.

    Raises:
        ConfigError: a name is not a subject of the study.
    """
    if study.tuning_subjects is None:
        return (next(iter(subjects)),)
    return tuple(_chosen_names(study.tuning_subjects, subjects, "tuning_subjects"))


def _check_training(study: Study) -> None:
    check_names(DreamBoothConfig, list(study.training))
    for name in study.training:
        if name in _SET_ELSEWHERE or name in READ_BY:
            owner = "the row" if name in READ_BY or name in ("method", "learning_rate") else "the comparison"
            raise ConfigError(f"training.{name} is set by {owner} and is not the same for all rows: leave it out of [training]")
    if "max_train_steps" not in study.training:
        raise ConfigError("training.max_train_steps is missing: expected the number of steps for which every row is trained")
    if not study.text_encoder_rate > 0:
        raise ConfigError(f"text_encoder_rate is {study.text_encoder_rate}, expected a factor of the learning rate above 0")


def _chosen_names(names: Sequence[str], known: Mapping[str, object], what: str) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what}: there is no {name!r}, expected some of {', '.join(known)}")
    if not names:
        raise ConfigError(f"{what} is empty, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _dict(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}, expected a table")
    return value


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name} is {value!r}, expected a list of texts")
    return value


def _rates(value: object, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(rate, int | float) and rate > 0 for rate in value):
        raise ConfigError(f"{name} is {value!r}, expected a list of learning rates to try, such as [3e-4, 1e-3]")
    return tuple(sorted({float(rate) for rate in value}))


def _check_keys(values: dict, known: set[str], needed: set[str], what: str) -> None:
    unknown, missing = sorted(set(values) - known), sorted(needed - set(values))
    if unknown:
        raise ConfigError(f"{what} has {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}")


def _table(kind: type, values: object, name: str):
    known = {f.name for f in fields(kind)}
    _check_keys(_dict(values, name), known, {"clip", "vision"} & known, f"[{name}]")
    return kind(**values)
