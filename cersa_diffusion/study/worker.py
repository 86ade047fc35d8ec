"""Trains, draws and scores one cell in its own process, as far as this is not done yet. Started by the engines."""

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from filelock import FileLock
from transformers.utils import logging as transformers_logging

from cersa_diffusion.errors import CersaError, NonFiniteError
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.metrics.embedding import scoring_device
from cersa_diffusion.pipelines.draw import DRAWING_DTYPES, drawing_dtypes
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.study.cells import CLASS_PICTURES, TRAINING_FILE, Cell, base_cell, cell_settings, write_json
from cersa_diffusion.study.definition import Study
from cersa_diffusion.study.judging import judge
from cersa_diffusion.study.preflight import preflight
from cersa_diffusion.study.subjects import Subject
from cersa_diffusion.training import (
    DreamBoothConfig,
    RunStart,
    TrainingCallback,
    TrainingStopped,
    TrainResult,
    load_result,
    train_dreambooth,
)
from cersa_diffusion.training.callbacks import ProgressBar
from cersa_diffusion.training.data.classes import sample_class_pictures
from cersa_diffusion.training.run.result import RESULT_FILE

CLOCK_FILE = "clock.json"


class Clock(TrainingCallback):
    """Seconds and peak memory of a training, added up over its interrupted runs.

    Args:
        path: file with the values at each checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self.marks = json.loads(path.read_text()) if path.exists() else {}
        self.peak = 0

    def on_start(self, start: RunStart) -> None:
        self.before = self.marks.get(str(start.first_step), {"seconds": 0.0, "peak": 0})
        self.start = time.perf_counter()

    def on_step(self, progress) -> None:
        self.peak = progress.peak_memory

    def on_checkpoint(self, step: int, folder: Path) -> None:
        seconds = self.before["seconds"] + time.perf_counter() - self.start
        self.marks[str(step)] = {"seconds": seconds, "peak": max(self.peak, self.before["peak"])}
        write_json(self.path, self.marks)


def train(config: DreamBoothConfig, folder: Path) -> dict:
    """Trains a cell and returns its sizes and costs; an interrupted training goes on from its newest checkpoint.

    Args:
        config: the settings.
        folder: folder of the cell.
    """
    run_folder, clock = Path(config.output_dir), Clock(folder / CLOCK_FILE)
    if (run_folder / RESULT_FILE).is_file():
        result, earlier = TrainResult.read(run_folder), {"seconds": 0.0, "peak": 0}
    else:
        result = train_dreambooth(config, [ProgressBar(config), clock])
        earlier = clock.before
    for checkpoint in run_folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {
        "weights": os.path.relpath(result.weights_path, folder),
        "trainable_parameters": result.trainable_parameters,
        "trained_bytes": result.weight_bytes + result.gradient_bytes + result.optimizer_bytes,
        "file_bytes": result.file_bytes,
        "seconds": round(earlier["seconds"] + result.seconds, 2),
        "prepare_seconds": round(result.decompose_seconds, 2),
        "peak_memory_bytes": max(result.peak_memory_bytes, earlier["peak"]),
        "preparing_peak_bytes": result.preparing_peak_bytes,
    }


def open_untrained(study: Study, cell: Cell, subject: Subject, output: Path) -> DiffusionPipeline:
    """The truncated base, or the untouched base; before it the class pictures that all trainings share are drawn."""
    config = study.config(study.row(cell.row), subject, class_data_dir=_class_pictures(cell, output))
    is_base = cell == base_cell(cell.subject)
    if is_base and config.with_prior_preservation:
        sample_class_pictures(config, scoring_device(None))
    pipeline = load_base(study.place(study.base), dtype=_dtypes(study))
    if is_base:
        return pipeline
    components = config.family.components(pipeline, text_encoders=config.train_text_encoder)
    method = CersaMethod(config, config.targets)
    method.plan(components, torch.float32)
    for name, model in components.items():
        print(f"{name}: {method.prepare(name, model)}", flush=True)
    return pipeline


def open_trained(study: Study, cell: Cell, subject: Subject, output: Path) -> DiffusionPipeline:
    """The model of the cell in a new pipeline; trains it if this is not done yet."""
    folder, row = cell.folder(output), study.row(cell.row)
    if not (folder / TRAINING_FILE).is_file():
        config = study.config(
            row, subject, learning_rate=cell.rate, seed=cell.seed, output_dir=str(folder / "run"),
            class_data_dir=_class_pictures(cell, output),
        )  # fmt: skip
        write_json(folder / TRAINING_FILE, train(config, folder) | {"made_with": cell_settings(study, cell, subject)})
    training = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    return load_result(row.method, folder / training["weights"], study.place(study.base), dtype=_dtypes(study))


def _dtypes(study: Study) -> dict[str, torch.dtype]:
    return drawing_dtypes(DRAWING_DTYPES[study.sampling.dtype], scoring_device(None))


def run_cell(study: Study, cell: Cell, part: str, output: Path) -> None:
    """Runs the missing steps of a part ("validation" or "test") of a cell; records a training whose loss is not finite, too."""
    path = cell.result_file(output, part)
    cell.folder(output).mkdir(parents=True, exist_ok=True)
    # A process of a killed comparison may still be working on this cell.
    with FileLock(cell.folder(output) / "lock"):
        if path.exists():
            return
        subject = study.read_subjects()[cell.subject]
        try:
            pipeline = (open_untrained if cell.rate is None else open_trained)(study, cell, subject, output)
        except NonFiniteError as error:
            outcome = {"failed": str(error)}
        else:
            pipeline.set_progress_bar_config(disable=True)
            outcome = judge(study, cell, subject, part, pipeline.to(scoring_device(None)), output)
        write_json(path, outcome | {"made_with": cell_settings(study, cell, subject)})


def _class_pictures(cell: Cell, output: Path) -> str:
    return str(base_cell(cell.subject).folder(output) / CLASS_PICTURES)


def main() -> None:
    """The command line for the engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="study.json")
    parser.add_argument("--preflight", type=Path, help="only load all models, and write the rows of matched memory to this file")
    parser.add_argument("--cell", help="subject, row, rate and seed, as JSON")
    parser.add_argument("--part", help="validation or test")
    parser.add_argument("--output", type=Path, help="folder of the comparison")
    arguments = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        values = json.loads(arguments.study.read_text(encoding="utf-8"))
        study = Study.from_dict(values.get("study", values))
        if arguments.preflight:
            preflight(study, arguments.preflight)
        else:
            run_cell(study, Cell(*json.loads(arguments.cell)), arguments.part, arguments.output)
    except (CersaError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"stopped: {stop}")


if __name__ == "__main__":
    main()
