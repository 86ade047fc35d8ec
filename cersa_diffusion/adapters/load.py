"""Loading an adapter file into any model of the same base."""

import os
import warnings
from collections.abc import Iterator, Mapping, Set
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from cersa_diffusion.adapters.file import AdapterFile, StoredLayer, read_adapter_file
from cersa_diffusion.adapters.room import check_room, warn_of_other_truncation
from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError
from cersa_diffusion.functional import Decomposition, block_to_core, float64
from cersa_diffusion.layers.core import MatrixCore
from cersa_diffusion.layers.fused import Fused
from cersa_diffusion.layers.kinds import KINDS, build_layer, form_of
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import (
    LONE_COMPONENT,
    all_or_nothing,
    check_layers,
    components_of,
    compute_dtype,
    finest_matrix,
    named_layers,
    replace_module,
)
from cersa_diffusion.weights.cache import LeadingFactors
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.fingerprint import base_difference
from cersa_diffusion.weights.stored import Checkpoint, FinestWeight


def load_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    source: str | os.PathLike | AdapterFile,
    *,
    adapter_name: str = "default",
    strength: float = 1.0,
    keep_base: bool = True,
    allow_base_mismatch: bool = False,
    show_progress: bool = True,
) -> None:
    """Loads an adapter into a model: layers that are still dense are decomposed first, unless the file contains the bases.

    All or nothing: the file is read and the layers are checked before the first one is replaced, and if anything fails later, the
    dense layers are put back. Every dense weight is dropped when its CERSA layer is in place. Layers that already carry an
    adapter keep their truncation, with a warning if this adapter was trained with another number of components. If the checkpoint
    on disk stores a weight in more bits than memory, that weight is decomposed (`cersa_diffusion.weights.stored`).

    Args:
        model: a model of the base that the adapter was trained on, or the components of a pipeline by name.
        source: a file, or its content.
        adapter_name: name for the cores that this model does not use yet.
        strength: factor of the adapter; 0 gives the truncated base.
        keep_base: keep the replaced weights for `restore_base`, as in `cersa_diffusion.inject_cersa`.
        allow_base_mismatch: warn instead of raising if the weights of the model are not those of the adapter's base.
        show_progress: show a bar while layers are decomposed.

    Raises:
        AdapterFormatError: the file cannot be read, or holds NaN.
        BaseMismatchError: the model lacks layers of the file, has other shapes or other weights.
        ConfigError: the adapter name is taken, or CERSA layers of the model keep too few components for the adapter, or the
            residual is kept in the layers and was dropped in training (or the reverse).
        NonFiniteError: a weight of the model holds NaN or infinity.
    """
    adapter = source if isinstance(source, AdapterFile) else read_adapter_file(source)
    components = components_of(model)
    targets = resolve_layers(adapter, components)
    dense: dict[str, dict[str, nn.Module]] = {component: {} for component in components}
    for target in targets.values():
        if isinstance(target.module, CersaLinear):
            check_room(f"{target.component}.{target.name}", target.module, target.stored, adapter_name)
        else:
            dense[target.component][target.name] = target.module
    for component, layers in dense.items():
        check_layers(components[component], layers)
    # The dense layers are dropped one by one, so nothing here may hold them.
    targets = {key: target._replace(module=None) for key, target in targets.items()}
    replaced = {key for key, target in targets.items() if target.name in dense[target.component]}
    del dense, layers

    with all_or_nothing(*components.values()):
        solved = _solved_layers(targets, replaced, components, show_progress)
        differences = _place(solved, targets, replaced, components, adapter, adapter_name, strength, allow_base_mismatch)
        _check_bases(differences, adapter, allow_base_mismatch)
    modules = {key: components[target.component].get_submodule(target.name) for key, target in targets.items()}
    if not keep_base:
        for key in replaced:
            modules[key].forget_base()
    warn_of_other_truncation(((key, modules[key], target.stored) for key, target in targets.items()), adapter.source)


def _place(
    solved: Iterator["_Solved"],
    targets: Mapping[str, "Target"],
    replaced: Set[str],
    components: Mapping[str, nn.Module],
    adapter: AdapterFile,
    adapter_name: str,
    strength: float,
    allow_base_mismatch: bool,
) -> dict[str, tuple[float, float]]:
    """Gives every layer its core and puts new layers in place; returns by how much the bases differ (`base_difference`)."""
    header = {"config": adapter.config, "base_model": adapter.base_model, "training": adapter.training}
    differences: dict[str, tuple[float, float]] = {}
    for key, layer, values, difference in solved:
        component, name, _, stored = targets[key]
        differences[key] = difference
        if values is None:
            # The reason may be that this is another base.
            _check_bases(differences, adapter, allow_base_mismatch)
            raise AdapterFormatError(f"{adapter.source}: layer {key}: its pivot rows or columns are dependent in this base")
        core = MatrixCore(stored.core_rank, stored.offset, values).requires_grad_(False)
        core.facts, core.trained_kept_rank = header, stored.kept_rank
        layer.add_core(adapter_name, core, strength)
        if key in replaced:
            replace_module(components[component], name, layer)
    return differences


class Target(NamedTuple):
    """A stored layer and the module of the model that it belongs to."""

    component: str
    name: str
    module: nn.Module
    stored: StoredLayer


def resolve_layers(adapter: AdapterFile, components: Mapping[str, nn.Module]) -> dict[str, Target]:
    """Finds the module of every stored layer among the components, by the key of the layer in the file.

    Raises:
        BaseMismatchError: layers are missing, have other shapes or are not linear layers; one message names all of them.
    """
    lone = set(components) == {LONE_COMPONENT} and len({key.partition(".")[0] for key in adapter.layers}) == 1
    modules = {component: named_layers(model) for component, model in components.items()}
    targets: dict[str, Target] = {}
    problems: dict[str, list[str]] = {}
    taken: set[tuple[str, str]] = set()
    for key, stored in adapter.layers.items():
        component, _, module_name = key.partition(".")
        component = LONE_COMPONENT if lone else component
        if component not in modules:
            problems.setdefault(f"the model has no {component!r}, only {sorted(components)}", []).append(key)
            continue
        possible_names = (module_name, module_name.removeprefix("text_model."), f"text_model.{module_name}")
        name = next((name for name in possible_names if name in modules[component]), None)
        module = modules[component].get(name)
        problem = _misfit(module, stored) or ("named twice" if (component, name) in taken else None)
        if problem:
            problems.setdefault(problem, []).append(key)
            continue
        taken.add((component, name))
        targets[key] = Target(component, name, module, stored)
    if problems:
        listing = "; ".join(f"{problem}: {_shortened(keys)}" for problem, keys in problems.items())
        count = sum(map(len, problems.values()))
        raise BaseMismatchError(
            f"{adapter.source}: {count} of {len(adapter.layers)} layers do not fit this model: {listing[:2000]}. "
            f"Load it into its own base{_base_name(adapter)}"
        )
    return targets


def _misfit(module: nn.Module | None, stored: StoredLayer) -> str | None:
    if module is None:
        return "no such layer in the model"
    if not isinstance(module, (*KINDS, CersaLinear, Fused)):
        return f"the module is from {type(module).__module__} (unload other adapters first)"
    shape, expected = (module.out_features, module.in_features), (stored.out_features, stored.in_features)
    return None if shape == expected else f"the model has shape {shape}, the adapter {expected}"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:200] for name in names[:5]) + more


def _base_name(adapter: AdapterFile) -> str:
    name = adapter.base_model.get("name_or_path")
    return f" ({name})" if name else ""


class _Solved(NamedTuple):
    """A layer for the model, its core (None if it cannot be solved for), and the result of `base_difference` for its base."""

    key: str
    layer: CersaLinear
    values: torch.Tensor | None
    difference: tuple[float, float]


def _solved_layers(
    targets: dict[str, Target], replaced: set[str], components: Mapping[str, nn.Module], show_progress: bool
) -> Iterator[_Solved]:
    """The layers that are CERSA layers already, then those with bases in the file, then those that are decomposed."""
    checkpoints = {name: Checkpoint.of(model) for name, model in components.items()}
    jobs = []
    for key, (component, name, _, stored) in targets.items():
        module = components[component].get_submodule(name)
        if key not in replaced:
            factors = Decomposition(module.U, module.s, module.Vh)
            yield _Solved(key, module, solve_core(factors, stored), _base_difference(module.s, module.base_entries, stored))
            continue
        load = partial(finest_matrix, components[component], name, checkpoints[component])
        build = partial(_build, key, components[component], targets[key])
        if stored.bases is None:
            jobs.append(LayerJob(key, form_of(module).shape, load, lambda s, k=stored.kept_rank: k, build))
        else:
            factors = Decomposition(*(factor.to(form_of(module).device, torch.float32) for factor in stored.bases))
            del module
            yield build(load(), factors)
    with decompose_layers(jobs, show_progress=show_progress) as solved:
        yield from (layer for _, layer in solved)


def _build(key: str, model: nn.Module, target: Target, weight: FinestWeight, factors: Decomposition | LeadingFactors) -> _Solved:
    stored, singular_values, pivots = target.stored, factors.s, None
    if stored.bases is None:
        pivots = factors.pivots
    else:
        # There is no decomposition: the present weight is projected on the stored vectors.
        leading = slice(len(stored.leading_singular_values))
        matrix = float64(weight.tensor.to(factors.U.device))
        singular_values = ((float64(factors.U[:, leading]).T @ matrix) * float64(factors.Vh[leading])).sum(1)
    dense = model.get_submodule(target.name)
    options = {"dtype": compute_dtype(model, dense), "keep_residual": stored.residual_kept, "pivots": pivots}
    layer = build_layer(dense, factors, stored.kept_rank, weight, **options)
    difference = _base_difference(singular_values, layer.base_entries, stored)
    # The core is computed from the factors before the layer rounds them to its dtype.
    return _Solved(key, layer, solve_core(factors, stored), difference)


def _base_difference(singular_values: torch.Tensor, entries: tuple[float, ...], stored: StoredLayer) -> tuple[float, float]:
    return base_difference(singular_values, entries, stored.leading_singular_values[: len(singular_values)], stored.entries)


def solve_core(factors: Decomposition, stored: StoredLayer) -> torch.Tensor | None:
    """The (r, r) float32 core of a stored layer in the coordinates of a decomposition of its base.

    `factors` hold at least the kept singular triplets. The result is None if their pivot rows or columns are dependent.
    """
    region = slice(stored.offset, stored.offset + stored.core_rank)
    try:
        core = block_to_core(stored.block(), factors.U[:, region], factors.Vh[region], stored.rows, stored.columns).float()
    except torch.linalg.LinAlgError:
        return None
    return core if torch.isfinite(core).all() else None


def _check_bases(differences: Mapping[str, tuple[float, float]], adapter: AdapterFile, allowed: bool) -> None:
    differing = {key: difference for key, difference in differences.items() if difference[1] > 1}
    if not differing:
        return
    most_different = sorted(differing, key=lambda key: -differing[key][1])[:3]
    listing = ", ".join(f"{key} ({differing[key][0]:.2%})" for key in most_different)
    message = (
        f"{adapter.source}: trained on another base model{_base_name(adapter)}: the weights of {len(differing)} of "
        f"{len(differences)} layers differ from those of this model, most of all {listing}"
    )
    if not allowed:
        raise BaseMismatchError(f"{message}: load it into its own base, or pass allow_base_mismatch=True to try it anyway")
    warnings.warn(f"{message}; loaded anyway (allow_base_mismatch)", stacklevel=3)
