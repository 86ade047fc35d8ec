"""The cells of a comparison (subject x row x rate x seed), where their files are, and whether those belong to this study."""

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
        subject: name.
        row: name.
        rate: learning rate; None where nothing is trained.
        seed: of the training; None where nothing is trained.
    """

    subject: str
    row: str
    rate: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Its folder below the output, and what messages call it."""
        tail = "" if self.rate is None else f"/lr-{self.rate:g}/seed-{self.seed}"
        return f"{self.subject}/{self.row}{tail}"

    def folder(self, output: Path) -> Path:
        """Folder of its files."""
        return output / "cells" / self.name

    def result_file(self, output: Path, part: str) -> Path:
        """The scores of a part of the prompts; its presence says that this part is done."""
        return self.folder(output) / f"{part}.json"

    def pictures(self, output: Path, part: str) -> Path:
        """Folder of the pictures of a part ("validation", "test" or "drift")."""
        return self.folder(output) / part


def base_cell(subject: str) -> Cell:
    """The untouched base."""
    return Cell(subject, BASE_ROW)


def cell_settings(study: Study, cell: Cell, subject: Subject) -> dict:
    """Everything that a cell's result depends on, as plain values: kept with the result, and compared before it is used."""
    row = study.row(cell.row)
    return json.loads(
        json.dumps(
            {
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
        )
    )


def read_result(study: Study, cell: Cell, subject: Subject, path: Path) -> dict | None:
    """A finished file of a cell; None if there is none yet.

    Raises:
        ConfigError: it was made with other settings.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): delete it, and it is made anew") from error
    expected, found = cell_settings(study, cell, subject), result.get("made_with", {})
    changed = sorted(_differences(expected, found))
    if changed:
        raise ConfigError(
            f"{path}: made with another {', '.join(changed)} than the study now says: take the study back, choose another "
            "--output, or delete this cell's folder"
        )
    return result


def _differences(expected: Mapping, found: Mapping, prefix: str = "") -> Iterator[str]:
    for name in expected.keys() | found.keys():
        one, other = expected.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name}"


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a kill or a power cut leaves the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: object) -> None:
    """The same for JSON."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
