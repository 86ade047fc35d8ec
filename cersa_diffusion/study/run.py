"""The comparison from beginning to end: base, learning rates, all cells, table and report; whatever is there already is used."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.study.cells import TRAINING_FILE, Cell, read_result, write_json
from cersa_diffusion.study.definition import BASE_ROW, Row, Study, tuning_subjects
from cersa_diffusion.study.engines import Engine, Task, run_in_turn
from cersa_diffusion.study.preflight import read_preflight
from cersa_diffusion.study.report import write_report
from cersa_diffusion.study.subjects import TEST, VALIDATION, Subject
from cersa_diffusion.study.table import Table, collect
from cersa_diffusion.study.tuning import Choice, choose_rates, tuning_cells

STUDY_FILE, PREFLIGHT_FILE = "study.json", "preflight.json"


def compare(study: Study, output: Path, *, engine: Engine = run_in_turn) -> Table:
    """Runs what is missing of a comparison and writes its table, pictures and report.

    Args:
        study: of `read_study`.
        output: folder for everything; one that holds a part of the same comparison is completed.
        engine: runs the tasks.

    Returns:
        The table.

    Raises:
        ConfigError: a model or a folder that cannot be used, found before anything is trained.
        CersaError: a cell failed; the finished ones stay.
        KeyboardInterrupt: the running cells have written their checkpoints.
    """
    subjects = study.read_subjects()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file, expected a folder")
    _check_results(study, subjects, output)
    study = _checked_by_models(study, output, engine)
    tuned = tuning_subjects(study, subjects)
    tuning = tuning_cells(study.rows, tuned)
    untrained, trained = ([row for row in study.rows if row.trained == flag] for flag in (False, True))
    base = [Cell(subject, BASE_ROW) for subject in subjects]
    others = [Cell(subject, row.name) for subject in subjects for row in untrained if row.name != BASE_ROW]
    count = len(base) + len(tuning) + len(others) + len(subjects) * len(trained) * study.seeds

    with tqdm(total=count, desc="comparing", unit="cell") as bar:
        # The base first: the others are compared with its pictures, and share the class pictures that it draws.
        for cells, part in ((base, TEST), (tuning, VALIDATION)):
            _run(study, output, cells, part, engine, bar)
        choices = choose_rates(study, subjects, tuned, output)
        _run(study, output, [*others, *final_cells(study, subjects, choices)], TEST, engine, bar)
    table = collect(study, subjects, choices, output)
    table.write(output)
    write_report(study, subjects, choices, table, output)
    return table


def final_cells(study: Study, subjects: Mapping[str, Subject], choices: Mapping[str, Choice]) -> list[Cell]:
    """The trained cells of the table; all rows of a seed before the next seed, so that an early look compares like with like."""
    return [
        Cell(subject, row, choice.rate, seed)
        for seed in range(study.seeds)
        for subject in subjects
        for row, choice in choices.items()
    ]


def _check_results(study: Study, subjects: Mapping[str, Subject], output: Path) -> None:
    """Refuses a folder with results of other settings before anything is done in it."""
    rates: Callable[[Row], Sequence] = lambda row: row.learning_rates or (None,)  # noqa: E731
    for subject in subjects.values():
        for row in study.rows:
            for rate in rates(row):
                for seed in range(study.seeds) if row.trained else (None,):
                    cell = Cell(subject.name, row.name, rate, seed)
                    for name in (f"{VALIDATION}.json", f"{TEST}.json", TRAINING_FILE):
                        read_result(study, cell, subject, cell.folder(output) / name)


def _checked_by_models(study: Study, output: Path, engine: Engine) -> Study:
    """The study with the rows of matched memory, after one process has loaded every model; written to the output."""
    path = output / STUDY_FILE
    asked = study.to_dict()
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("asked") == asked:
        return Study.from_dict(before["study"])
    # Beside the output, where every machine that an engine uses can see it.
    beside = next(parent for parent in output.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".study-", dir=beside) as folder:
        write_json(Path(folder) / STUDY_FILE, asked)
        rows = Path(folder) / PREFLIGHT_FILE
        command = _command(Path(folder) / STUDY_FILE, "--preflight", rows)
        list(engine([Task("checking the models", command, Path(folder) / "log.txt")]))
        study = replace(study, rows=(*study.rows, *read_preflight(rows)))
    write_json(path, {"asked": asked, "study": study.to_dict()})
    return study


def _command(*arguments: Path | str) -> tuple[str, ...]:
    return (sys.executable, "-m", "cersa_diffusion.study.worker", *map(str, arguments))


def _run(study: Study, output: Path, cells: Sequence[Cell], part: str, engine: Engine, bar: tqdm) -> None:
    subjects = study.read_subjects()
    missing = [cell for cell in cells if read_result(study, cell, subjects[cell.subject], cell.result_file(output, part)) is None]
    # What was there already says nothing about the time that is left.
    bar.initial += len(cells) - len(missing)
    bar.update(len(cells) - len(missing))
    tasks = _tasks(output, missing, part)
    for _ in engine(list(tasks)) if missing else ():
        bar.update()


def _tasks(output: Path, cells: Sequence[Cell], part: str) -> Iterator[Task]:
    for cell in cells:
        identity = json.dumps([cell.subject, cell.row, cell.rate, cell.seed])
        arguments = ("--cell", identity, "--part", part, "--output", output.absolute())
        yield Task(cell.name, _command(output.absolute() / STUDY_FILE, *arguments), cell.folder(output.absolute()) / "log.txt")
