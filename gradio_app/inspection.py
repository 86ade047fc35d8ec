"""The figures of a base in the Inspect tab: spectra, ranks, and memory against alpha, all from the plans of the package."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from cersa_diffusion import CersaConfig, MemoryPlan, plan_memory
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.families.table import family_of
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.memory.budget import TargetLayer, survey
from cersa_diffusion.memory.cost import cersa_memory
from cersa_diffusion.memory.plot import plot_plan

# The figures are written to files by threads without a display.
matplotlib.use("agg")
ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
WIDTH, HEIGHT = 9.0, 4.2


def plan_of(pipeline: DiffusionPipeline, alpha: float, lora_rank: int) -> MemoryPlan:
    """The plan of a base, for all linear layers of its UNet and the attention of its text encoders.

    Args:
        pipeline: the untouched base, leased.
        alpha: share of the energy to keep.
        lora_rank: rank of the LoRA in the comparison.
    """
    components, configs = _targets(pipeline, alpha)
    return plan_memory(components, configs, lora_rank=lora_rank, weight_dtype=torch.float32, show_progress=False)


def _targets(pipeline: DiffusionPipeline, alpha: float) -> tuple[dict, dict[str, CersaConfig]]:
    family = family_of(type(pipeline).__name__)
    configs = {name: CersaConfig(alpha=alpha, target_modules=targets) for name, targets in family.trained.items()}
    return family.components(pipeline), configs


def surveyed(pipeline: DiffusionPipeline) -> list[TargetLayer]:
    """The target layers with their spectra.

    Args:
        pipeline: the untouched base, leased.
    """
    components, configs = _targets(pipeline, CersaConfig.alpha)
    targets = {
        f"{component}.{name}": (layer, configs[component])
        for component, model in components.items()
        for name, layer in match_targets(model, configs[component].target_modules).items()
    }
    return survey(components, targets, weight_dtype=torch.float32, show_progress=False)


def draw_ranks(plan: MemoryPlan, path: Path) -> None:
    """Writes the figure of `cersa plan --plot`: ranks by layer for five alphas and for the plan, and compression."""
    plot_plan(plan, path)


def draw_spectra(plan: MemoryPlan, kind: str, alpha: float, path: Path) -> None:
    """Writes the figure of the energy in the leading components, and of the singular values, for the layers of a kind.

    Args:
        plan: plan of the base.
        kind: "component kind", a key of `MemoryPlan.by_kind`.
        alpha: the alpha to mark.
        path: PNG file.

    Raises:
        ConfigError: there are no layers of this kind.
    """
    layers = plan.by_kind().get(kind)
    if layers is None:
        raise ConfigError(f"no layers of kind {str(kind)!r}: choose one from the list")
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    energy, values = figure.subplots(1, 2)
    for number, layer in enumerate(layers):
        spectrum = plan.spectra[layer.name].double().cpu()
        share = np.arange(1, len(spectrum) + 1) / len(spectrum)
        colour = matplotlib.colormaps["viridis"](number / max(1, len(layers) - 1))
        energy.plot(share, (spectrum.square().cumsum(0) / spectrum.square().sum()).numpy(), color=colour, linewidth=1)
        values.semilogy(share, (spectrum / spectrum[0]).clamp_min(1e-6).numpy(), color=colour, linewidth=1)
    energy.axhline(alpha, color="gray", linestyle="--", label=f"alpha = {alpha:g}")
    energy.set(title=f"energy kept, {kind} ({len(layers)} layers)", xlabel="k / full rank", ylabel="share of squared energy")
    values.set(xlabel="k / full rank", ylabel="relative to the first")
    values.set_title("singular values, first layer dark", loc="left")
    energy.legend()
    figure.savefig(path, dpi=110)


def memory_by_alpha(layers: list[TargetLayer]) -> dict[float, int]:
    """Alpha -> bytes of the target layers in a training with CERSA and AdamW, without saved activations.

    Args:
        layers: as `surveyed` returns them.
    """
    sizes = {}
    for alpha in ALPHAS:
        configs = [replace(layer.config, alpha=alpha) for layer in layers]
        sizes[alpha] = sum(
            cersa_memory(layer.dense, config.layer_ranks(layer.spectrum), config).total
            for layer, config in zip(layers, configs, strict=True)
        )
    return sizes


def draw_memory(plan: MemoryPlan, sizes: dict[float, int], alpha: float, path: Path) -> None:
    """Writes the figure of memory against alpha, with LoRA and full fine-tuning of the same layers.

    Args:
        plan: the plan for `alpha`.
        sizes: as `memory_by_alpha` returns them.
        alpha: the alpha to mark.
        path: PNG file.
    """
    totals = plan.totals()["target_layers"]
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(sizes), [size / 2**20 for size in sizes.values()], marker=".", label="CERSA")
    axes.plot([alpha], [totals["cersa"].total / 2**20], marker="o", color="C0", markersize=9)
    axes.axhline(totals["lora"].total / 2**20, color="C1", linestyle="--", label=f"LoRA r={plan.lora_rank}")
    axes.axhline(totals["full"].total / 2**20, color="C2", linestyle=":", label="full fine-tuning")
    axes.set(xlabel="alpha (= beta)", ylabel="MiB of the target layers", ylim=(0, None))
    axes.set_title("weights, gradients and AdamW", loc="left")
    axes.legend()
    figure.savefig(path, dpi=110)
