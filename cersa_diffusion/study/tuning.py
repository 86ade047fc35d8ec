"""Chooses the learning rate of every row on the validation prompts, so that each method is scored at its own best rate."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cersa_diffusion.study.cells import Cell, read_result
from cersa_diffusion.study.definition import SELECTABLE, Row, Study
from cersa_diffusion.study.subjects import VALIDATION, Subject

# Seed of the trainings that choose the learning rates; the table uses these trainings again.
TUNING_SEED = 0


@dataclass(frozen=True)
class Choice:
    """The learning rate of a row, and the scores of its candidates.

    Args:
        rate: the chosen learning rate.
        scores: candidate -> its mean on the validation prompts, or None if a training diverged; empty for a single candidate.
    """

    rate: float
    scores: Mapping[float, float | None]

    @property
    def at_edge(self) -> bool:
        """Whether the best candidate is the smallest or the largest; a better rate may then lie outside the candidates."""
        return len(self.scores) > 1 and self.rate in (min(self.scores), max(self.scores))


def tuning_cells(rows: Sequence[Row], subjects: Sequence[str]) -> list[Cell]:
    """The cells that are scored on the validation prompts: all candidates of the rows with several candidates."""
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
    """Row -> its learning rate: the candidate with the best mean over the tuning subjects, or the lowest of equal candidates.

    Args:
        study: the comparison.
        subjects: all subjects by name.
        tuning_subjects: names of the subjects whose validation prompts decide.
        output: folder with the results of `tuning_cells`.
    """
    choices = {}
    for row in (row for row in study.rows if row.trained):
        if len(row.learning_rates) == 1:
            choices[row.name] = Choice(row.learning_rates[0], {})
            continue
        cells = {rate: [Cell(name, row.name, rate, TUNING_SEED) for name in tuning_subjects] for rate in row.learning_rates}
        scores = {rate: _mean_score(study, cells[rate], subjects, output) for rate in row.learning_rates}
        valid = {rate: score for rate, score in scores.items() if score is not None}
        sign = 1 if SELECTABLE[study.select_by] else -1
        best = max(valid, key=lambda rate: (sign * valid[rate], -rate)) if valid else min(scores)
        choices[row.name] = Choice(best, scores)
    return choices


def _mean_score(study: Study, cells: Sequence[Cell], subjects: Mapping[str, Subject], output: Path) -> float | None:
    scores = []
    for cell in cells:
        result = read_result(study, cell, subjects[cell.subject], cell.result_file(output, VALIDATION))
        if "failed" in result:
            return None
        scores.append(result["measures"][study.select_by])
    return statistics.fmean(scores)
