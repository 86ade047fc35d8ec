"""The table of a comparison: mean and spread of every measure for each row, as CSV, Markdown and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cersa_diffusion.metrics.evaluation import DIGITS
from cersa_diffusion.study.cells import TRAINING_FILE, Cell, base_cell, read_result, write_atomically, write_json
from cersa_diffusion.study.definition import Study
from cersa_diffusion.study.subjects import TEST, Subject
from cersa_diffusion.study.tuning import Choice
from cersa_diffusion.text import csv_text, table

ALL = "all"


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Args:
        name: name in results and files.
        title: title in tables; "{vision}" stands for the name of the features of the vision transformer.
        better: "higher", "lower", or empty.
        digits: number of decimals.
        unit: divisor of the value.
    """

    name: str
    title: str
    better: str = ""
    digits: int = 3
    unit: float = 1


SCORES = (
    Measure("clipscore", "CLIPScore", "higher", 2),
    Measure("clip_i", "CLIP-I", "higher"),
    Measure("similarity", "{vision}", "higher"),
    Measure("distance", "distance", "lower"),
    Measure("drift_latent", "drift", "lower"),
    Measure("drift_clip", "drift, CLIP", "lower"),
    Measure("drift_similarity", "drift, {vision}", "lower"),
    Measure("diversity_clip", "diversity, CLIP", "higher"),
    Measure("diversity_similarity", "diversity, {vision}", "higher"),
)
SIZES = (
    Measure("trainable_parameters", "trained, M", "", 3, 1e6),
    Measure("trained_bytes", "bytes trained, MiB", "", 1, 2**20),
    Measure("file_bytes", "file, MiB", "", 2, 2**20),
)
# A second run gives other values; the costs have their own files, so that the table is the same byte for byte.
COSTS = (
    Measure("seconds", "training, s", "", 0),
    Measure("prepare_seconds", "preparing, s", "", 1),
    Measure("peak_memory_bytes", "peak of the steps, MiB", "", 0, 2**20),
    Measure("preparing_peak_bytes", "peak of preparing, MiB", "", 0, 2**20),
)


@dataclass(frozen=True)
class Figure:
    """The values of a measure in a row.

    Args:
        mean: mean over the cells.
        spread: sample standard deviation over the cells; None for a single cell.
        values: values of the cells, by subject and seed.
    """

    mean: float
    spread: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """The figure of the values of the cells."""
        spread = round(statistics.stdev(values), DIGITS) if len(values) > 1 else None
        return cls(round(statistics.fmean(values), DIGITS), spread, tuple(values))


@dataclass(frozen=True)
class Line:
    """A row for one subject or for all subjects.

    Args:
        row: name of the row.
        subject: name of the subject, or "all".
        rate: learning rate, or None.
        figures: measure -> its figure, without measures that do not apply.
        cells: number of scored cells.
        diverged: number of trainings whose loss was not finite.
    """

    row: str
    subject: str
    rate: float | None
    figures: Mapping[str, Figure]
    cells: int
    diverged: int

    def to_dict(self) -> dict:
        """Everything but the costs, as plain values for JSON."""
        costs = {measure.name for measure in COSTS}
        figures = {name: figure for name, figure in self.figures.items() if name not in costs}
        return vars(self) | {"figures": {k: vars(figure) | {"values": list(figure.values)} for k, figure in figures.items()}}


@dataclass(frozen=True)
class Table:
    """The table; ``str()`` is Markdown.

    Args:
        lines: for each row the line over all subjects, then a line for each subject.
        vision: name of the features of the vision transformer.
        choices: row -> its learning rate and the scores of the candidates.
    """

    lines: Sequence[Line]
    vision: str
    choices: Mapping[str, Choice]

    def title(self, measure: Measure) -> str:
        """Title of a column."""
        return measure.title.format(vision=self.vision)

    def measured(self, measures: Sequence[Measure]) -> list[Measure]:
        """The measures that at least one row has."""
        return [measure for measure in measures if any(measure.name in line.figures for line in self.lines)]

    def of(self, subject: str) -> list[Line]:
        """The lines of a subject, or of "all"."""
        return [line for line in self.lines if line.subject == subject]

    def render(self, measures: Sequence[Measure], subject: str = ALL) -> str:
        """The lines of a subject as a table in Markdown: mean ± spread of the measures."""
        measures = self.measured(measures)
        header = ["", "rate", *(self.title(measure) for measure in measures)]
        rows = [
            [
                f"{line.row} ({line.diverged} diverged)" if line.diverged else line.row,
                f"{line.rate:g}" if line.rate else "-",
                *(cell(line, measure) for measure in measures),
            ]
            for line in self.of(subject)
        ]
        return table(header, rows, markdown=True)

    def __str__(self) -> str:
        tables = [self.render((*SCORES, *SIZES))]
        subjects = list(dict.fromkeys(line.subject for line in self.lines if line.subject != ALL))
        if len(subjects) > 1:
            tables += [f"{subject}:\n\n{self.render(SCORES, subject)}" for subject in subjects]
        return "\n\n".join(tables)

    def write(self, output: Path) -> None:
        """Writes table.md, table.csv and table.json, and the costs as costs.md and costs.csv."""
        write_atomically(output / "table.md", f"{self}\n")
        write_atomically(output / "table.csv", self._csv((*SCORES, *SIZES)))
        write_atomically(output / "costs.md", f"{self.render(COSTS)}\n")
        write_atomically(output / "costs.csv", self._csv(COSTS))
        rates = {
            name: {"rate": choice.rate, "candidates": [[rate, score] for rate, score in choice.scores.items()]}
            for name, choice in self.choices.items()
        }
        write_json(output / "table.json", {"lines": [line.to_dict() for line in self.lines], "learning_rates": rates})

    def _csv(self, measures: Sequence[Measure]) -> str:
        rows = []
        for line in self.lines:
            row = {"row": line.row, "subject": line.subject, "learning_rate": line.rate, "cells": line.cells}
            row["diverged"] = line.diverged
            for measure in self.measured(measures):
                figure = line.figures.get(measure.name)
                row |= {measure.name: figure and figure.mean, f"{measure.name}_spread": figure and figure.spread}
            rows.append(row)
        return csv_text(rows)


def cell(line: Line, measure: Measure) -> str:
    """Mean and spread as text; a dash for a measure that the line does not have."""
    figure = line.figures.get(measure.name)
    if figure is None:
        return "-"
    mean = f"{figure.mean / measure.unit:.{measure.digits}f}"
    # The sizes do not depend on the seed.
    return f"{mean} ± {figure.spread / measure.unit:.{measure.digits}f}" if figure.spread and measure not in SIZES else mean


def collect(study: Study, subjects: Mapping[str, Subject], choices: Mapping[str, Choice], output: Path) -> Table:
    """The table of a finished comparison, from the files in its folder."""
    lines = []
    for row in study.rows:
        rate = choices[row.name].rate if row.trained else None
        seeds = range(study.seeds) if row.trained else (None,)
        values = {
            name: [_values_of_cell(study, Cell(name, row.name, rate, seed), subject, output) for seed in seeds]
            for name, subject in subjects.items()
        }
        lines.append(_line(row.name, ALL, rate, list(chain.from_iterable(values.values()))))
        lines += [_line(row.name, name, rate, values_of_subject) for name, values_of_subject in values.items()]
    name, subject = next(iter(subjects.items()))
    vision = read_result(study, base_cell(name), subject, base_cell(name).result_file(output, TEST))["vision"]
    return Table(lines, vision, choices)


def _values_of_cell(study: Study, cell: Cell, subject: Subject, output: Path) -> dict[str, float] | None:
    """Measure -> value of a cell, including sizes and costs; None if its training diverged."""
    result = read_result(study, cell, subject, cell.result_file(output, TEST))
    if "failed" in result:
        return None
    costs = {}
    if cell.rate is not None:
        training = read_result(study, cell, subject, cell.folder(output) / TRAINING_FILE)
        costs = {measure.name: training[measure.name] for measure in (*SIZES, *COSTS)}
    return result["measures"] | costs


def _line(row: str, subject: str, rate: float | None, cells: Sequence[Mapping[str, float] | None]) -> Line:
    scored = [values for values in cells if values is not None]
    names = [m.name for m in (*SCORES, *SIZES, *COSTS) if scored and all(m.name in values for values in scored)]
    figures = {name: Figure.of([values[name] for values in scored]) for name in names}
    return Line(row, subject, rate, figures, len(scored), len(cells) - len(scored))
