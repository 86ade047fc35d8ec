"""The cells of a comparison (subject x row x rate x seed), the places of their files, and the check of their settings."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.study.definition import BASE_ROW, Study
from cersa_diffusion.study.subjects import Subject

TRAINING_FILE = "training.json"
CLASS_PICTURES = "class_pictures"


@dataclass(frozen=True)
class Cell:
    """One model to be judged.

    Args:
        subject: name of the subject.
        row: name of the row.
        rate: learning rate; None for a row that is not trained.
        seed: seed of the training; None for a row that is not trained.
    """

    subject: str
    row: str
    rate: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Folder of the cell below the output; messages use it as the name of the cell."""
        training = "" if self.rate is None else f"/lr-{self.rate:g}/seed-{self.seed}"
        return f"{self.subject}/{self.row}{training}"

    def folder(self, output: Path) -> Path:
        """Folder of the files of the cell."""
        return output / "cells" / self.name

    def result_file(self, output: Path, part: str) -> Path:
        """File with the scores of a part of the prompts; the part is done if the file exists."""
        return self.folder(output) / f"{part}.json"

    def pictures(self, output: Path, part: str) -> Path:
        """Folder with the pictures of a part ("validation", "test" or "drift")."""
        return self.folder(output) / part


def base_cell(subject: str) -> Cell:
    """The cell of the untouched base."""
    return Cell(subject, BASE_ROW)


def cell_settings(study: Study, cell: Cell, subject: Subject) -> dict:
    """Everything that determines the result of a cell, as plain values; saved with the result and compared before it is used."""
    row = study.row(cell.row)
    settings = {
        "base": study.base,
        "subject": subject.digest,
        "method": row.method,
        "settings": dict(row.settings),
        "learning_rate": cell.rate,
        "seed": cell.seed,
        "training": dict(study.training),
        "text_encoder_rate": study.text_encoder_rate,
        "unique_token": study.unique_token,
        "sampling": asdict(study.sampling),
        "scoring": asdict(study.scoring),
    }
    return json.loads(json.dumps(settings))


def read_result(study: Study, cell: Cell, subject: Subject, path: Path) -> dict | None:
    """The content of a finished file of a cell; None if the file does not exist yet.

    Raises:
        ConfigError: the file cannot be read, or it was made with other settings.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): delete the file, and the next run makes it again") from error
    changed = sorted(_changed_settings(cell_settings(study, cell, subject), result.get("made_with", {})))
    if changed:
        raise ConfigError(
            f"{path}: it was made with other values of {', '.join(changed)} than the study has now: undo the change, "
            "choose another --output, or delete the folder of this cell"
        )
    return result


def _changed_settings(current: Mapping, saved: Mapping, prefix: str = "") -> Iterator[str]:
    for name in current.keys() | saved.keys():
        value, saved_value = current.get(name), saved.get(name)
        if isinstance(value, dict) and isinstance(saved_value, dict):
            yield from _changed_settings(value, saved_value, f"{prefix}{name}.")
        elif value != saved_value:
            yield f"{prefix}{name}"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; after a kill or a power cut the file is the old one or the new one, and never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: object) -> None:
    """Writes values as JSON in the same way."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
