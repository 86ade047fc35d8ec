"""What adapter files are, and how two of them differ, for people."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cersa_diffusion.adapters.file import AdapterFile, StoredLayer
from cersa_diffusion.adapters.load import resolve_layers, solve_core
from cersa_diffusion.layers.kinds import matrix_of
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.stored import Checkpoint


def describe_adapter(adapter: AdapterFile) -> str:
    """What an adapter file is: base, settings, training, layers by component, and how exact it is."""
    lines = []
    for title, part in (("base model", adapter.base_model), ("settings", adapter.config), ("training", adapter.training)):
        lines.append(title)
        lines += [f"  {name}: {json.dumps(value)}" for name, value in part.items()] or ["  (nothing stored)"]
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
        notes += ["the residual kept"] if any(layer.residual_kept for layer in layers) else []
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
    """How a layer differs between two adapters.

    Attributes:
        name: "component.module".
        difference: ``|dW_a - dW_b| / |dW_a|`` (Frobenius); None where it cannot be said.
        exact: of the whole weight changes; otherwise of their stored blocks, which is an estimate.
        note: why it cannot be said.
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
        base: their base, as the components of a pipeline by name; decomposed, not changed. Without it blocks are compared, where
            both files have them at the same rows and columns.
        show_progress: show a bar while layers are decomposed.

    Raises:
        BaseMismatchError: the base lacks layers of the files, or has other shapes.
    """
    common = [name for name in a.layers if name in b.layers]
    rows = [_from_files(name, a.layers[name], b.layers[name]) for name in common]
    if base is not None:
        targets = {name: resolve_layers(file, base)[name] for name in common for file in (a, b)}
        checkpoints = {name: Checkpoint.of(model) for name, model in base.items()}
        jobs = []
        for name, (component, module_name, module, _) in targets.items():
            place = checkpoints[component].find(module_name, module.weight, finer_only=True)
            rank = max(a.layers[name].kept_rank, b.layers[name].kept_rank)
            jobs.append(LayerJob.of(name, matrix_of(module), lambda s, k=rank: k, place))
        with decompose_layers(jobs, show_progress=show_progress) as decomposed:
            rows = [_in_bases(name, factors, a.layers[name], b.layers[name]) for name, factors in decomposed]
    for own, other, title in ((a, b, "only in the first"), (b, a, "only in the second")):
        rows += [LayerDifference(name, None, False, title) for name in own.layers if name not in other.layers]
    return rows


def _from_files(name: str, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    if (a.out_features, a.in_features) != (b.out_features, b.in_features):
        return LayerDifference(name, None, False, "other shapes")
    if not torch.equal(a.rows, b.rows) or not torch.equal(a.columns, b.columns):
        return LayerDifference(name, None, False, "stored at other rows and columns: a base is needed")
    return LayerDifference(name, _relative(a.block(), b.block()), False)


def _in_bases(name: str, factors, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    size = max(a.kept_rank, b.kept_rank)
    cores = []
    for stored in (a, b):
        core = solve_core(factors, stored)
        if core is None:
            return LayerDifference(name, None, True, "cannot be solved for in this base")
        after = size - stored.offset - stored.core_rank
        cores.append(nn.functional.pad(core.double(), (stored.offset, after, stored.offset, after)))
    return LayerDifference(name, _relative(*cores), True)


def _relative(a: Tensor, b: Tensor) -> float:
    size, difference = float(a.norm()), float((a - b).norm())
    return difference / size if size else (float("inf") if difference else 0.0)


def difference_table(rows: list[LayerDifference]) -> str:
    """The comparison as text: what cannot be said, then the layers from the most different to the least."""
    known = sorted((row for row in rows if row.difference is not None), key=lambda row: -row.difference)
    lines = [f"{row.name}: {row.note}" for row in rows if row.difference is None]
    lines += [f"{row.name}: {row.difference:.2%}" for row in known]
    if known:
        how = "weight changes" if known[0].exact else "stored blocks (an estimate; with a base: exactly)"
        median = known[len(known) // 2].difference
        lines.append(f"{len(known)} layers, relative difference of their {how}: median {median:.2%}")
    return "\n".join(lines)
