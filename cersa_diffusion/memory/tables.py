"""A memory plan for people: tables as text or Markdown, and the figures of the paper that show where the ranks are."""

import statistics
from typing import TYPE_CHECKING

from cersa_diffusion.text import mib, table

if TYPE_CHECKING:
    from cersa_diffusion.memory.plan import MemoryPlan

PARTS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "saved activations",
}


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
    return table(header, rows, markdown=markdown)


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
    return table(header, rows, markdown=markdown)


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
