"""Drawing and scoring of one cell: the same prompts and seeds for every row."""

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

# The validation draws from other noise, too.
FIRST_SEED = {VALIDATION: 1000, TEST: 0, "drift": 0}
BACKEND = "torchmetrics"
PROMPTS_FILE = "prompts.json"


def load_scorer(study: Study) -> Scorer:
    """The models that score."""
    return Scorer.load(study.place(study.scoring.clip), [BACKEND], vision=study.place(study.scoring.vision))


def judge(study: Study, cell: Cell, subject: Subject, part: str, pipeline: DiffusionPipeline, output: Path) -> dict:
    """Draws the prompts of a part, keeps the pictures and scores them; on the test part the drift prompts, too.

    Args:
        study: the comparison.
        cell: whose model it is.
        subject: of the cell.
        part: "validation" or "test".
        pipeline: the model, on the device that draws.
        output: folder of the comparison.

    Returns:
        "measures", by name, and "vision", what the features of the vision transformer are called.
    """
    prompts, scorer = subject.parts[part], load_scorer(study)
    samples = _drawn(study, cell, part, prompts.prompts, pipeline, output)
    references = [load_picture(path) for path in subject.references(part)]
    drift = _drift(study, cell, subject, pipeline, output) if part == TEST and subject.drift_prompts else None
    scored = [replace(sample, prompt=without_token(sample.prompt, study.unique_token)) for sample in samples]
    means = scorer.evaluate(scored, references, drift).means
    measures = {_measure(name, scorer.vision.label.lower().replace(" ", "_")): value for name, value in means.items()}
    if prompts.held_back:
        measures["distance"] = round(_distance(samples, prompts.held_back, pipeline), DIGITS)
    return {"measures": measures, "vision": scorer.vision.label}


def _measure(name: str, vision: str) -> str:
    """The comparison's name of a measure of the scorer: the same whichever models score."""
    if name.startswith("clipscore_"):
        return "clipscore"
    return "similarity" if name == vision else name.replace(f"_{vision}", "_similarity")


def _drawn(
    study: Study, cell: Cell, part: str, prompts: tuple[str, ...], pipeline: DiffusionPipeline, output: Path
) -> list[Sample]:
    sampling, first = study.sampling, FIRST_SEED[part]
    samples = draw(
        pipeline, prompts, range(first, first + sampling.pictures),
        steps=sampling.steps, guidance=sampling.guidance, batch_size=sampling.batch_size,
    )  # fmt: skip
    folder = cell.pictures(output, part)
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        sample.picture.save(folder / sample.name)
    write_json(folder / PROMPTS_FILE, {sample.name: sample.prompt for sample in samples})
    return samples


def _drift(study: Study, cell: Cell, subject: Subject, pipeline: DiffusionPipeline, output: Path) -> Drift | None:
    samples = _drawn(study, cell, "drift", subject.drift_prompts, pipeline, output)
    if cell == base_cell(cell.subject):
        return None
    base = read_pictures(base_cell(cell.subject).pictures(output, "drift"))
    return Drift([sample.picture for sample in samples], [base[sample.name] for sample in samples], pipeline.vae)


def _distance(samples: list[Sample], held_back: dict[str, Path], pipeline: DiffusionPipeline) -> float:
    """Mean latent distance of the pictures of held-back prompts to the picture that was held back for just that prompt."""
    pairs = [
        (sample.picture, load_picture(held_back[sample.prompt]).resize(sample.picture.size, Image.Resampling.BOX))
        for sample in samples
        if sample.prompt in held_back
    ]
    return latent_distance(*map(list, zip(*pairs, strict=True)), pipeline.vae)


def read_pictures(folder: Path) -> dict[str, Image.Image]:
    """File name -> picture of what a cell has drawn."""
    return {name: load_picture(folder / name) for name in json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))}
