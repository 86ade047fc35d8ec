"""Draws and scores the pictures of one cell, with the same prompts and seeds for every row."""

import json
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from cersa_diffusion.metrics.drawing import draw
from cersa_diffusion.metrics.evaluation import DIGITS, Drift, Sample, Scorer
from cersa_diffusion.metrics.prompts import without_token
from cersa_diffusion.metrics.similarity import latent_distance
from cersa_diffusion.pictures import load_picture
from cersa_diffusion.study.cells import Cell, base_cell, write_json
from cersa_diffusion.study.definition import Study
from cersa_diffusion.study.subjects import TEST, VALIDATION, Subject

# Validation also uses other noise than the test.
FIRST_SEED = {VALIDATION: 1000, TEST: 0, "drift": 0}
BACKEND = "torchmetrics"
PROMPTS_FILE = "prompts.json"


def load_scorer(study: Study) -> Scorer:
    """Loads the models that score."""
    return Scorer.load(study.place(study.scoring.clip), [BACKEND], vision=study.place(study.scoring.vision))


def judge(study: Study, cell: Cell, subject: Subject, part: str, pipeline: DiffusionPipeline, output: Path) -> dict:
    """Draws the prompts of a part with the model of a cell, saves the pictures to the output and scores them.

    The part is "validation" or "test"; for the test part it also draws the drift prompts. The pipeline draws on its device.

    Returns:
        "measures": name -> value; "vision": the name of the features of the vision transformer.
    """
    prompts, scorer = subject.parts[part], load_scorer(study)
    samples = _draw_and_save(study, cell, part, prompts.prompts, pipeline, output)
    references = [load_picture(path) for path in subject.references(part)]
    drift = _drift(study, cell, subject, pipeline, output) if part == TEST and subject.drift_prompts else None
    scored = [replace(sample, prompt=without_token(sample.prompt, study.unique_token)) for sample in samples]
    means = scorer.evaluate(scored, references, drift).means
    measures = {_measure_name(name, scorer.vision.label.lower().replace(" ", "_")): value for name, value in means.items()}
    if prompts.held_back:
        measures["distance"] = round(_distance(samples, prompts.held_back, pipeline), DIGITS)
    return {"measures": measures, "vision": scorer.vision.label}


def _measure_name(name: str, vision: str) -> str:
    """The name that the comparison uses for a measure of the scorer; it does not depend on the models that score."""
    if name.startswith("clipscore_"):
        return "clipscore"
    return "similarity" if name == vision else name.replace(f"_{vision}", "_similarity")


def _draw_and_save(
    study: Study, cell: Cell, part: str, prompts: tuple[str, ...], pipeline: DiffusionPipeline, output: Path
) -> list[Sample]:
    sampling = study.sampling
    seeds = range(FIRST_SEED[part], FIRST_SEED[part] + sampling.pictures)
    settings = {"steps": sampling.steps, "guidance": sampling.guidance, "batch_size": sampling.batch_size}
    samples = draw(pipeline, prompts, seeds, **settings)
    folder = cell.pictures(output, part)
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        sample.picture.save(folder / sample.name)
    write_json(folder / PROMPTS_FILE, {sample.name: sample.prompt for sample in samples})
    return samples


def _drift(study: Study, cell: Cell, subject: Subject, pipeline: DiffusionPipeline, output: Path) -> Drift | None:
    samples = _draw_and_save(study, cell, "drift", subject.drift_prompts, pipeline, output)
    if cell == base_cell(cell.subject):
        return None
    base = read_pictures(base_cell(cell.subject).pictures(output, "drift"))
    return Drift([sample.picture for sample in samples], [base[sample.name] for sample in samples], pipeline.vae)


def _distance(samples: list[Sample], held_back: dict[str, Path], pipeline: DiffusionPipeline) -> float:
    """Mean latent distance between the pictures of held-back prompts and the pictures that were held back for these prompts."""
    pairs = [
        (sample.picture, load_picture(held_back[sample.prompt]).resize(sample.picture.size, Image.Resampling.BOX))
        for sample in samples
        if sample.prompt in held_back
    ]
    return latent_distance(*map(list, zip(*pairs, strict=True)), pipeline.vae)


def read_pictures(folder: Path) -> dict[str, Image.Image]:
    """File name -> picture, for the pictures that a cell has drawn."""
    return {name: load_picture(folder / name) for name in json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))}
