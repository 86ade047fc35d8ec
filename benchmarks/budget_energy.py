#!/usr/bin/env python
"""Which energy should a memory budget keep? Compares truncated, untrained bases with equal bytes for each way to choose ranks.

The error is the relative error of the UNet's prediction (with its truncated text encoder) against the prediction of the whole
base, as a root mean square over latents and time steps from drawings of these prompts by the base.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from cersa_diffusion import CersaConfig, inject_cersa
from cersa_diffusion.config import LayerRanks
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.memory.budget import TargetLayer, allocate, survey, untouched_bytes
from cersa_diffusion.memory.cost import cersa_memory
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.text import table

BASE = Path(__file__).resolve().parents[1] / "assets" / "emoji-base"
NAMES = ("fox", "grinning cat", "red apple", "rocket", "octopus", "umbrella", "tulip", "face with tears of joy")
STYLES, COLOURS = ("3d", "flat", "noto", "twemoji"), ("blue", "white", "red", "yellow")
PROMPTS = [f"a {STYLES[i % 4]} emoji of a {name} on a {COLOURS[i // 2]} background" for i, name in enumerate(NAMES)]
STEPS, EVERY = 20, 4
ENERGIES = ("product", "sum", "absolute")


def trajectory(pipeline: StableDiffusionPipeline) -> list[tuple[Tensor, Tensor]]:
    """(latents, time step) at every `EVERY`-th step of a drawing of all prompts."""
    recorded = []

    def record(pipeline, step, _, values):
        if step % EVERY == 0:
            recorded.append((values["latents"].clone(), pipeline.scheduler.timesteps[step + 1]))
        return {}

    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pipeline(PROMPTS, num_inference_steps=STEPS, generator=generators, callback_on_step_end=record, output_type="latent")
    return recorded


@torch.no_grad()
def predictions(pipeline: StableDiffusionPipeline, models: dict, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs of the UNet (inputs, ...)."""
    length = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=length, return_tensors="pt").input_ids
    states = models["text_encoder"](ids)[0]
    return torch.stack([models["unet"](latents, step, states).sample for latents, step in inputs])


def error(prediction: Tensor, expected: Tensor) -> float:
    """Relative error, as a root mean square over the inputs."""
    distances = (prediction - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(distances.square().mean().sqrt())


def truncated(models: dict, ranks: dict[str, LayerRanks]) -> dict:
    """Copies of the models with the layers truncated to these ranks."""
    copies = copy.deepcopy(models)
    for component, model in copies.items():
        config = CersaConfig(target_modules=STABLE_DIFFUSION.trained[component])
        ranks_of_model = {name.partition(".")[2]: rank for name, rank in ranks.items() if name.startswith(f"{component}.")}
        inject_cersa(model, config, ranks=ranks_of_model, show_progress=False)
    return copies


def by_alpha(layers: list[TargetLayer], alpha: float) -> dict[str, LayerRanks]:
    """The ranks of the layers if all have the same alpha."""
    return {layer.name: CersaConfig(alpha=alpha, rank_multiple=1).layer_ranks(layer.spectrum) for layer in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BASE), help="a Stable Diffusion pipeline")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.99, 0.95, 0.9, 0.8, 0.6], help="each sets a budget")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    pipeline = load_base(arguments.base)
    pipeline.set_progress_bar_config(disable=True)
    models = {component: getattr(pipeline, component) for component in STABLE_DIFFUSION.trained}
    targets = {
        f"{component}.{name}": (linear, CersaConfig(memory_budget=1, rank_multiple=1))
        for component, model in models.items()
        for name, linear in match_targets(model, STABLE_DIFFUSION.trained[component]).items()
    }
    layers = survey(models, targets)
    others = untouched_bytes(models, [linear for linear, _ in targets.values()], None)
    inputs = trajectory(pipeline)
    expected = predictions(pipeline, models, inputs)

    rows = []
    for alpha in arguments.alphas:
        uniform = by_alpha(layers, alpha)
        budget = sum(others.values()) + sum(
            cersa_memory(layer.dense, uniform[layer.name], layer.config).total for layer in layers
        )
        choices = {"one alpha": uniform} | {energy: allocate(layers, others, budget, energy=energy) for energy in ENERGIES}
        errors = {way: error(predictions(pipeline, truncated(models, ranks), inputs), expected) for way, ranks in choices.items()}
        rows.append({"alpha": alpha, "budget": budget, "errors": errors})
        print(f"alpha {alpha}: done", flush=True)
    header = ["alpha that sets the bytes", "MB in all", *rows[0]["errors"]]
    cells = [
        [str(row["alpha"]), f"{row['budget'] / 1e6:.1f}", *(f"{value:.1%}" for value in row["errors"].values())] for row in rows
    ]
    print(table(header, cells, markdown=True))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
