"""Plots of a memory plan: the figures of the paper that show the ranks of the layers and the compression."""

import os
from typing import TYPE_CHECKING

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank
from cersa_diffusion.text import mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cersa_diffusion.memory.plan import LayerPlan, MemoryPlan

PLOTTED_ALPHAS = (0.8, 0.85, 0.9, 0.92, 0.95)


def compression_rate(layers: list["LayerPlan"], ranks: list[int]) -> float:
    """``c = sum(m r + n r + 4 r^2) / sum(m n)``: numbers in training memory over numbers in dense weights (CERSA, section 3.4).

    Args:
        layers: rows of a plan.
        ranks: one rank per layer, both kept and trained.
    """
    factored = sum((layer.out_features + layer.in_features + 4 * r) * r for layer, r in zip(layers, ranks, strict=True))
    return factored / sum(layer.out_features * layer.in_features for layer in layers)


def plot_plan(plan: "MemoryPlan", path: str | os.PathLike) -> None:
    """Plots the ranks by layer and kind at five alphas (CERSA, Fig. 3) and as planned, and compression against alpha (Fig. 7).

    Args:
        plan: the plan.
        path: picture to write; its ending decides the format, e.g. PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is not installed: pip install 'cersa-diffusion[plot]'") from error
    figure = Figure(figsize=(20, 9), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    ranks = {
        f"rank at alpha = {alpha}": {layer.name: energy_rank(plan.spectra[layer.name], alpha) for layer in plan.layers}
        for alpha in PLOTTED_ALPHAS
    }
    planned = "as planned" if plan.memory_budget is None else f"in the budget of {mib(plan.memory_budget)} MiB"
    ranks[f"rank {planned}"] = {layer.name: layer.kept_rank for layer in plan.layers}
    largest = max(rank for ranks_by_layer in ranks.values() for rank in ranks_by_layer.values())
    for axes, (title, ranks_by_layer) in zip(panels, ranks.items(), strict=False):
        _draw_ranks(axes, plan, ranks_by_layer, title)
        axes.set_ylim(0, 1.05 * largest)
    _draw_compression(panels[6], plan)
    panels[7].axis("off")
    panels[7].legend(*panels[0].get_legend_handles_labels(), title="layer kinds", loc="upper left", ncols=2)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot {path} cannot be written ({error}): expected a .png file in an existing folder") from error


def _draw_ranks(axes: "Axes", plan: "MemoryPlan", ranks: dict[str, int], title: str) -> None:
    for number, (kind, layers) in enumerate(plan.by_kind().items()):
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "marker": "."}
        axes.plot([ranks[layer.name] for layer in layers], label=kind, **style)
    axes.set(title=title, xlabel="layer of this kind, in model order", ylabel="k")


def _draw_compression(axes: "Axes", plan: "MemoryPlan") -> None:
    alphas = torch.linspace(0.8, 0.95, 16).tolist()
    by_component: dict[str, list[LayerPlan]] = {"all target layers": plan.layers}
    for layer in plan.layers:
        by_component.setdefault(layer.component, []).append(layer)
    if len(by_component) == 2:
        by_component.popitem()
    for name, layers in by_component.items():
        rates = [compression_rate(layers, [energy_rank(plan.spectra[layer.name], alpha) for layer in layers]) for alpha in alphas]
        axes.plot(alphas, rates, label=name)
    dense = sum(layer.out_features * layer.in_features for layer in plan.layers)
    added = sum(4 * plan.lora_rank * (layer.out_features + layer.in_features) for layer in plan.layers)
    axes.axhline(1 + added / dense, color="gray", linestyle="--", label=f"LoRA r={plan.lora_rank}")
    axes.set(title="compression c = (m r + n r + 4 r²) / (m n)", xlabel="alpha = beta", ylabel="c")
    axes.legend()
