"""A memory plan for people: tables as text or Markdown, and the figures of the paper that show where the ranks are."""

import os
import statistics
from typing import TYPE_CHECKING

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cersa_diffusion.planner import LayerPlan, MemoryPlan

PARTS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "saved activations",
}
PLOTTED_ALPHAS = (0.8, 0.85, 0.9, 0.92, 0.95)


def render_plan(plan: "MemoryPlan", *, markdown: bool) -> str:
    """The plan as tables by layer kind and in total, with a sentence on who wins.

    Args:
        plan: the plan.
        markdown: GitHub-flavoured Markdown instead of plain text.
    """
    conditions = f"Sizes in MiB; optimizer {plan.optimizer}, compute dtype {plan.dtype_name}."
    parts = [conditions, _kinds(plan, markdown), _totals(plan, markdown), *_notes(plan)]
    return "\n\n".join(parts)


def _kinds(plan: "MemoryPlan", markdown: bool) -> str:
    header = ["layer kind", "layers", "k / full", "r / full", "alpha", "lowest", "marked",
              "CERSA", f"LoRA r={plan.lora_rank}", "full", "CERSA / LoRA"]  # fmt: skip
    alphas, rows = plan.alpha_by_kind(), []
    for kind, layers in plan.by_kind().items():
        kept, core = (
            statistics.median(getattr(layer, rank) / min(layer.out_features, layer.in_features) for layer in layers)
            for rank in ("kept_rank", "core_rank")
        )
        shares = [f"{share:.2f}" for share in (kept, core)] + [f"{alphas[kind][which]:.3f}" for which in ("mean", "lowest")]
        sizes = [sum(layer.memory[method].total for layer in layers) for method in ("cersa", "lora", "full")]
        marked = sum(layer.unprofitable for layer in layers)
        ratio = f"{sizes[0] / sizes[1]:.2f}"
        rows.append([kind, str(len(layers)), *shares, str(marked), *map(mib, sizes), ratio])
    return text_table(header, rows, markdown)


def _totals(plan: "MemoryPlan", markdown: bool) -> str:
    totals = plan.totals()
    targets, whole = totals["target_layers"], totals["whole_model"]
    rows = [
        [title, *(mib(getattr(use, part)) for use in targets.values()), "", ""]
        for part, title in PARTS.items()
        if part != "activations" or plan.activations_counted
    ]
    sums = {
        "target layers": [use.total for use in targets.values()],
        "everything else": list(plan.untouched.values()),
        "whole model": [use.total for use in whole.values()],
    }
    for title, sizes in sums.items():
        rows.append([title, *map(mib, sizes), *(f"{sizes[0] / other:.2f}" if other else "" for other in sizes[1:])])
    header = ["", "CERSA", f"LoRA r={plan.lora_rank}", "full", "CERSA / LoRA", "CERSA / full"]
    return text_table(header, rows, markdown)


def _notes(plan: "MemoryPlan") -> list[str]:
    totals = plan.totals()["target_layers"]
    cersa, lora = totals["cersa"].total, totals["lora"].total
    comparison = f"{mib(cersa)} against {mib(lora)} MiB on the target layers, {cersa / lora:.2f} times"
    if cersa > lora:
        notes = [f"CERSA costs MORE memory than LoRA here: {comparison}. A lower alpha keeps less, a lower beta trains less."]
    else:
        notes = [f"CERSA costs no more memory than LoRA here: {comparison}."]
    if plan.memory_budget is not None:
        used, share = plan.totals()["whole_model"]["cersa"].total, statistics.fmean(layer.kept_energy for layer in plan.layers)
        notes.append(
            f"The budget of {mib(plan.memory_budget)} MiB chose the ranks: {mib(used)} MiB are used, and a layer keeps "
            f"{share:.1%} of its energy on average (columns alpha and lowest: by kind, mean and least)."
        )
    marked = sum(layer.unprofitable for layer in plan.layers)
    if marked:
        skipped = sum(not layer.factored for layer in plan.layers)
        left = f"; {skipped} of them stay dense and frozen" if skipped else ""
        notes.append(
            f"{marked} of {len(plan.layers)} layers are marked: factors and core are no smaller than the dense weight{left}."
        )
    if plan.activations_counted:
        notes.append(
            "Saved activations are those of the target layers. An input that a neighbour keeps anyway (in float32 the output of "
            "fused attention) is counted here as well: LoRA and full need that much less."
        )
    else:
        notes.append("Saved activations are not counted: they need a batch and a resolution, or tokens.")
    if plan.optimizer == "adamw8bit":
        notes.append("The optimizer state of adamw8bit follows the source of bitsandbytes; it was not measured.")
    return notes


def mib(size: int) -> str:
    """Bytes as MiB with two decimals."""
    return f"{size / 2**20:.2f}"


def text_table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Cells in columns, numbers to the right.

    Args:
        header: titles of the columns.
        rows: as many cells each.
        markdown: GitHub-flavoured Markdown instead of plain text.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])
    rule = [f"{'-' * (width - 1)}{':' if number else '-'}" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def compression_rate(layers: list["LayerPlan"], ranks: list[int]) -> float:
    """``c = sum(m r + n r + 4 r^2) / sum(m n)``, training memory in numbers against the dense weights (CERSA, section 3.4).

    Args:
        layers: rows of a plan.
        ranks: one rank per row, kept and trained.
    """
    factored = sum((layer.out_features + layer.in_features + 4 * r) * r for layer, r in zip(layers, ranks, strict=True))
    return factored / sum(layer.out_features * layer.in_features for layer in layers)


def plot_plan(plan: "MemoryPlan", path: str | os.PathLike) -> None:
    """Draws rank by layer and kind, at five alphas (CERSA, Fig. 3) and as planned, and compression against alpha (Fig. 7).

    Args:
        plan: the plan.
        path: picture to write, PNG or what else the ending says.

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
    by = "as planned" if plan.memory_budget is None else f"in the budget of {mib(plan.memory_budget)} MiB"
    ranks[f"rank {by}"] = {layer.name: layer.kept_rank for layer in plan.layers}
    largest = max(rank for own in ranks.values() for rank in own.values())
    for axes, (title, own) in zip(panels, ranks.items(), strict=False):
        _draw_ranks(axes, plan, own, title)
        axes.set_ylim(0, 1.05 * largest)
    _draw_compression(panels[6], plan)
    panels[7].axis("off")
    panels[7].legend(*panels[0].get_legend_handles_labels(), title="layer kinds", loc="upper left", ncols=2)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"plot {path}: cannot be written ({error}): expected a file ending in .png in a folder that exists"
        ) from error


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
        rates = [compression_rate(layers, [energy_rank(plan.spectra[layer.name], a) for layer in layers]) for a in alphas]
        axes.plot(alphas, rates, label=name)
    dense = sum(layer.out_features * layer.in_features for layer in plan.layers)
    added = sum(4 * plan.lora_rank * (layer.out_features + layer.in_features) for layer in plan.layers)
    axes.axhline(1 + added / dense, color="gray", linestyle="--", label=f"LoRA r={plan.lora_rank}")
    axes.set(title="compression c = (m r + n r + 4 r²) / (m n)", xlabel="alpha = beta", ylabel="c")
    axes.legend()
