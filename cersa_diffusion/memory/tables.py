"""A memory plan for people: tables as plain text or Markdown."""

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
    """The plan as tables by layer kind and in total, and a sentence that compares CERSA with LoRA.

    Args:
        plan: the plan.
        markdown: GitHub-flavoured Markdown instead of plain text.
    """
    conditions = f"Sizes in MiB; optimizer {plan.optimizer}, compute dtype {plan.dtype_name}."
    return "\n\n".join([conditions, _table_by_kind(plan, markdown), _totals(plan, markdown), *_notes(plan)])


def _table_by_kind(plan: "MemoryPlan", markdown: bool) -> str:
    header = ["layer kind", "layers", "k / full", "r / full", "alpha", "lowest", "marked",
              "CERSA", f"LoRA r={plan.lora_rank}", "full", "CERSA / LoRA"]  # fmt: skip
    alphas, rows = plan.alpha_by_kind(), []
    for kind, layers in plan.by_kind().items():
        kept, core = (
            statistics.median(getattr(layer, rank) / min(layer.out_features, layer.in_features) for layer in layers)
            for rank in ("kept_rank", "core_rank")
        )
        shares = [f"{kept:.2f}", f"{core:.2f}", *(f"{alphas[kind][statistic]:.3f}" for statistic in ("mean", "lowest"))]
        sizes = [sum(layer.memory[method].total for layer in layers) for method in ("cersa", "lora", "full")]
        marked = sum(layer.unprofitable for layer in layers)
        ratio = f"{sizes[0] / sizes[1]:.2f}"
        rows.append([kind, str(len(layers)), *shares, str(marked), *map(mib, sizes), ratio])
    return table(header, rows, markdown=markdown)


def _totals(plan: "MemoryPlan", markdown: bool) -> str:
    totals = plan.totals()
    targets = totals["target_layers"].values()
    rows = [
        [title, *(mib(getattr(use, part)) for use in targets), "", ""]
        for part, title in PARTS.items()
        if part != "activations" or plan.activations_counted
    ]
    sums = {
        "target layers": [use.total for use in targets],
        "everything else": list(plan.untouched.values()),
        "whole model": [use.total for use in totals["whole_model"].values()],
    }
    for title, sizes in sums.items():
        rows.append([title, *map(mib, sizes), *(f"{sizes[0] / other:.2f}" if other else "" for other in sizes[1:])])
    header = ["", "CERSA", f"LoRA r={plan.lora_rank}", "full", "CERSA / LoRA", "CERSA / full"]
    return table(header, rows, markdown=markdown)


def _notes(plan: "MemoryPlan") -> list[str]:
    totals = plan.totals()["target_layers"]
    cersa, lora = totals["cersa"].total, totals["lora"].total
    comparison = f"{mib(cersa)} against {mib(lora)} MiB on the target layers, {cersa / lora:.2f} times as much"
    notes = [f"CERSA costs no more memory than LoRA here: {comparison}."]
    if cersa > lora:
        notes = [f"CERSA costs MORE memory than LoRA here: {comparison}. A lower alpha keeps less, a lower beta trains less."]
    if plan.memory_budget is not None:
        used, share = plan.totals()["whole_model"]["cersa"].total, statistics.fmean(layer.kept_energy for layer in plan.layers)
        notes.append(
            f"The budget of {mib(plan.memory_budget)} MiB chose the ranks: {mib(used)} MiB are used, and a layer keeps "
            f"{share:.1%} of its energy on average (columns alpha and lowest: the mean and the lowest share of each kind)."
        )
    marked = sum(layer.unprofitable for layer in plan.layers)
    if marked:
        skipped = sum(not layer.factored for layer in plan.layers)
        dense = f"; {skipped} of them stay dense and frozen" if skipped else ""
        notes.append(
            f"{marked} of {len(plan.layers)} layers are marked: factors and core are no smaller than the dense weight{dense}."
        )
    if plan.activations_counted:
        notes.append(
            "Saved activations are those of the target layers. The count includes inputs that a neighbouring operation keeps in "
            "any case (in float32 the output of fused attention): LoRA and full need that much less."
        )
    else:
        notes.append("Saved activations are not counted: the count needs a batch and a resolution, or tokens.")
    if plan.optimizer == "adamw8bit":
        notes.append("The optimizer state of adamw8bit is computed from the source code of bitsandbytes; it was not measured.")
    return notes
