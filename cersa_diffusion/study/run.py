"""The whole comparison: base, learning rates, all cells, table and report. Results that exist already are used."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.study.cells import TRAINING_FILE, Cell, read_result, write_json
from cersa_diffusion.study.definition import BASE_ROW, Study, tuning_subjects
from cersa_diffusion.study.engines import Engine, Task, run_in_turn
from cersa_diffusion.study.preflight import read_preflight
from cersa_diffusion.study.report import write_report
from cersa_diffusion.study.subjects import TEST, VALIDATION, Subject
from cersa_diffusion.study.table import Table, collect
from cersa_diffusion.study.tuning import Choice, choose_rates, tuning_cells

STUDY_FILE, PREFLIGHT_FILE = "study.json", "preflight.json"


def compare(study: Study, output: Path, *, engine: Engine = run_in_turn) -> Table:
    """Runs the missing cells of a comparison, and writes and returns its table; also writes the pictures and the report.

    Args:
        study: as `read_study` returns it.
        output: folder for all files; if it holds a part of the same comparison, this part is completed.
        engine: runs the tasks.

    Raises:
        ConfigError: a model or a folder cannot be used; raised before anything is trained.
        CersaError: a cell failed; the finished cells stay.
        KeyboardInterrupt: the running cells have written their checkpoints.
    """
    subjects = study.read_subjects()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file, expected a folder")
    _check_results(study, subjects, output)
    study = _check_with_models(study, output, engine)
    names_for_tuning = tuning_subjects(study, subjects)
    tuning = tuning_cells(study.rows, names_for_tuning)
    base = [Cell(subject, BASE_ROW) for subject in subjects]
    truncated = [Cell(s, row.name) for s in subjects for row in study.rows if not row.trained and row.name != BASE_ROW]
    trained_rows = sum(row.trained for row in study.rows)
    count = len(base) + len(tuning) + len(truncated) + len(subjects) * trained_rows * study.seeds

    with tqdm(total=count, desc="comparing", unit="cell") as bar:
        # The base is first, because the other cells are compared with its pictures and share the class pictures that it draws.
        _run_missing(study, output, base, TEST, engine, bar)
        _run_missing(study, output, tuning, VALIDATION, engine, bar)
        choices = choose_rates(study, subjects, names_for_tuning, output)
        _run_missing(study, output, [*truncated, *final_cells(study, subjects, choices)], TEST, engine, bar)
    table = collect(study, subjects, choices, output)
    table.write(output)
    write_report(study, subjects, choices, table, output)
    return table


def final_cells(study: Study, subjects: Mapping[str, Subject], choices: Mapping[str, Choice]) -> list[Cell]:
    """The trained cells of the table, seed by seed, so that an unfinished comparison already has all rows with the same seeds."""
    return [
        Cell(subject, row, choice.rate, seed)
        for seed in range(study.seeds)
        for subject in subjects
        for row, choice in choices.items()
    ]


def _check_results(study: Study, subjects: Mapping[str, Subject], output: Path) -> None:
    """Refuses a folder with results of other settings before any file in it changes."""
    for subject, row in product(subjects.values(), study.rows):
        seeds = range(study.seeds) if row.trained else (None,)
        for rate, seed in product(row.learning_rates or (None,), seeds):
            cell = Cell(subject.name, row.name, rate, seed)
            for name in (f"{VALIDATION}.json", f"{TEST}.json", TRAINING_FILE):
                read_result(study, cell, subject, cell.folder(output) / name)


def _check_with_models(study: Study, output: Path, engine: Engine) -> Study:
    """Loads every model in one process; returns the study with the rows of matched memory, and writes it to the output."""
    path = output / STUDY_FILE
    requested = study.to_dict()
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if saved.get("asked") == requested:
        return Study.from_dict(saved["study"])
    # The temporary folder is beside the output, because all machines of an engine can read files there.
    parent_folder = next(parent for parent in output.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".study-", dir=parent_folder) as folder:
        study_file, preflight_file = Path(folder) / STUDY_FILE, Path(folder) / PREFLIGHT_FILE
        write_json(study_file, requested)
        command = _worker_command(study_file, "--preflight", preflight_file)
        list(engine([Task("checking the models", command, Path(folder) / "log.txt")]))
        study = replace(study, rows=(*study.rows, *read_preflight(preflight_file)))
    write_json(path, {"asked": requested, "study": study.to_dict()})
    return study


def _worker_command(*arguments: Path | str) -> tuple[str, ...]:
    return (sys.executable, "-m", "cersa_diffusion.study.worker", *map(str, arguments))


def _run_missing(study: Study, output: Path, cells: Sequence[Cell], part: str, engine: Engine, bar: tqdm) -> None:
    subjects = study.read_subjects()
    missing = [cell for cell in cells if read_result(study, cell, subjects[cell.subject], cell.result_file(output, part)) is None]
    # Cells that existed before must not count in the estimate of the remaining time.
    bar.initial += len(cells) - len(missing)
    bar.update(len(cells) - len(missing))
    for _ in engine([_task(output.absolute(), cell, part) for cell in missing]) if missing else ():
        bar.update()


def _task(output: Path, cell: Cell, part: str) -> Task:
    identity = json.dumps([cell.subject, cell.row, cell.rate, cell.seed])
    command = _worker_command(output / STUDY_FILE, "--cell", identity, "--part", part, "--output", output)
    return Task(cell.name, command, cell.folder(output) / "log.txt")
