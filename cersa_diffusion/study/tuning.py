"""Picking every row's learning rate on the validation prompts, so that no method is judged at the rate of another."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cersa_diffusion.study.cells import Cell, read_result
from cersa_diffusion.study.definition import SELECTABLE, Row, Study
from cersa_diffusion.study.subjects import VALIDATION, Subject

# The seed of the trainings that the rates are picked by; they are used again for the table.
TUNING_SEED = 0


@dataclass(frozen=True)
class Choice:
    """A row's learning rate, and what it was picked from.

    Args:
        rate: the chosen one.
        scores: candidate -> its mean on the validation prompts; None where the training diverged. Empty without a choice.
    """

    rate: float
    scores: Mapping[float, float | None]

    @property
    def at_edge(self) -> bool:
        """Whether the best candidate is the smallest or the largest: a better one may lie beyond."""
        return len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


def tuning_cells(rows: Sequence[Row], subjects: Sequence[str]) -> list[Cell]:
    """The cells that are scored on validation prompts: every candidate of the rows that have several."""
    return [
        Cell(subject, row.name, rate, TUNING_SEED)
        for row in rows
        if len(row.learning_rates) > 1
        for subject in subjects
        for rate in row.learning_rates
    ]


def choose_rates(
    study: Study, subjects: Mapping[str, Subject], tuning_subjects: Sequence[str], output: Path
) -> dict[str, Choice]:
    """Row -> its learning rate: the candidate with the best mean over the tuning subjects, of equal ones the lower.

    Args:
        study: the comparison.
        subjects: all of them by name.
        tuning_subjects: names of those whose validation prompts decide.
        output: folder with the results of `tuning_cells`.
    """
    choices = {}
    for row in (row for row in study.rows if row.trained):
        if len(row.learning_rates) == 1:
            choices[row.name] = Choice(row.learning_rates[0], {})
            continue
        scores = {rate: _score(study, row, rate, subjects, tuning_subjects, output) for rate in row.learning_rates}
        valid = {rate: score for rate, score in scores.items() if score is not None}
        sign = 1 if SELECTABLE[study.select_by] else -1
        best = max(valid, key=lambda rate: (sign * valid[rate], -rate)) if valid else min(scores)
        choices[row.name] = Choice(best, scores)
    return choices


def _score(
    study: Study, row: Row, rate: float, subjects: Mapping[str, Subject], tuning_subjects: Sequence[str], output: Path
) -> float | None:
    values = []
    for name in tuning_subjects:
        cell = Cell(name, row.name, rate, TUNING_SEED)
        result = read_result(study, cell, subjects[name], cell.result_file(output, VALIDATION))
        if "failed" in result:
            return None
        values.append(result["measures"][study.select_by])
    return statistics.fmean(values)
