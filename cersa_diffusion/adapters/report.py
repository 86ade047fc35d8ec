"""Reports for people: the content of an adapter file, and the difference between two of them."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cersa_diffusion.adapters.file import AdapterFile, StoredLayer
from cersa_diffusion.adapters.load import resolve_layers, solve_core
from cersa_diffusion.layers.kinds import form_of
from cersa_diffusion.layers.model import finest_matrix
from cersa_diffusion.weights.cache import LeadingFactors
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.fingerprint import relative
from cersa_diffusion.weights.stored import Checkpoint


def describe_adapter(adapter: AdapterFile) -> str:
    """The content of an adapter file as text: base, settings, training, layers by component, and its accuracy."""
    lines = []
    for title, entry in (("base model", adapter.base_model), ("settings", adapter.config), ("training", adapter.training)):
        lines.append(title)
        lines += [f"  {name}: {json.dumps(value)}" for name, value in entry.items()] or ["  (nothing stored)"]
    by_component = defaultdict(list)
    for name, layer in adapter.layers.items():
        by_component[name.partition(".")[0]].append(layer)
    lines.append("layers")
    for component, layers in by_component.items():
        trained = sum(layer.core_rank**2 for layer in layers)
        shares = sorted(layer.kept_rank / min(layer.out_features, layer.in_features) for layer in layers)
        thin = sum(len(layer.factors) == 2 for layer in layers)
        notes = [f"{thin} of them stored as thin factors"] if thin else []
        notes += ["with their bases"] if any(layer.bases for layer in layers) else []
        notes += ["with the residual"] if any(layer.residual_kept for layer in layers) else []
        lines.append(
            f"  {component}: {len(layers)} layers, {trained / 1e6:.2f} M numbers in {layers[0].factors[0].dtype}; "
            f"kept rank / full rank {shares[0]:.2f} to {shares[-1]:.2f}, median {shares[len(shares) // 2]:.2f}"
            + "".join(f"; {note}" for note in notes)
        )
    errors = sorted((layer.error, name) for name, layer in adapter.layers.items())
    median, (worst, name) = errors[len(errors) // 2][0], errors[-1]
    lines.append(f"error of the weight changes by storage: median {median:.2%}, worst {worst:.2%} ({name})")
    return "\n".join(lines)


@dataclass(frozen=True)
class LayerDifference:
    """The difference of a layer between two adapters.

    Attributes:
        name: "component.module".
        difference: ``|dW_a - dW_b| / |dW_a|`` (Frobenius); None if it is unknown.
        exact: whether it was computed from the whole weight changes; the stored blocks give only an estimate.
        note: the reason if it is unknown.
    """

    name: str
    difference: float | None
    exact: bool
    note: str = ""


def compare_adapters(
    a: AdapterFile, b: AdapterFile, base: Mapping[str, nn.Module] | None = None, *, show_progress: bool = True
) -> list[LayerDifference]:
    """Compares the weight changes of two adapters layer by layer.

    Args:
        a: the reference.
        b: the other one.
        base: their base, as the components of a pipeline by name; it is decomposed, but not changed. Without it, only blocks are
            compared that both files store at the same rows and columns.
        show_progress: show a bar while layers are decomposed.

    Raises:
        BaseMismatchError: the base lacks layers of the files, or has other shapes.
    """
    common = [name for name in a.layers if name in b.layers]
    rows = [_compare_blocks(name, a.layers[name], b.layers[name]) for name in common]
    if base is not None:
        targets = {name: resolve_layers(file, base)[name] for name in common for file in (a, b)}
        checkpoints = {name: Checkpoint.of(model) for name, model in base.items()}
        jobs = []
        for name, (component, module_name, module, _) in targets.items():
            load = partial(finest_matrix, base[component], module_name, checkpoints[component])
            rank = max(a.layers[name].kept_rank, b.layers[name].kept_rank)
            jobs.append(LayerJob(name, form_of(module).shape, load, lambda s, k=rank: k))
        with decompose_layers(jobs, show_progress=show_progress) as decomposed:
            rows = [_compare_cores(name, factors, a.layers[name], b.layers[name]) for name, factors in decomposed]
    for adapter, other, note in ((a, b, "only in the first"), (b, a, "only in the second")):
        rows += [LayerDifference(name, None, False, note) for name in adapter.layers if name not in other.layers]
    return rows


def _compare_blocks(name: str, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    if (a.out_features, a.in_features) != (b.out_features, b.in_features):
        return LayerDifference(name, None, False, "other shapes")
    if not torch.equal(a.rows, b.rows) or not torch.equal(a.columns, b.columns):
        return LayerDifference(name, None, False, "stored at other rows and columns: a base is needed")
    return LayerDifference(name, _relative_difference(a.block(), b.block()), False)


def _compare_cores(name: str, factors: LeadingFactors, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    size = max(a.kept_rank, b.kept_rank)
    cores = []
    for stored in (a, b):
        core = solve_core(factors, stored)
        if core is None:
            return LayerDifference(name, None, True, "cannot be solved for in this base")
        after = size - stored.offset - stored.core_rank
        cores.append(nn.functional.pad(core.double(), (stored.offset, after, stored.offset, after)))
    return LayerDifference(name, _relative_difference(*cores), True)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return relative(float((a - b).norm()), float(a.norm()))


def difference_table(rows: list[LayerDifference]) -> str:
    """The comparison as text: first the unknown differences, then the layers from the most different to the least."""
    known = sorted((row for row in rows if row.difference is not None), key=lambda row: -row.difference)
    lines = [f"{row.name}: {row.note}" for row in rows if row.difference is None]
    lines += [f"{row.name}: {row.difference:.2%}" for row in known]
    if known:
        compared = "weight changes" if known[0].exact else "stored blocks (an estimate; exact with a base)"
        median = known[len(known) // 2].difference
        lines.append(f"{len(known)} layers, relative difference of their {compared}: median {median:.2%}")
    return "\n".join(lines)
