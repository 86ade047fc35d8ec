"""Injection: replacing linear layers of a model by CERSA layers, and the ways back."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import kept_energy
from cersa_diffusion.layers.kinds import as_dense, build_layer, form_of, new_core, original_layer
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import (
    all_or_nothing,
    cersa_layers,
    check_layers,
    compute_dtype,
    finest_matrix,
    installed_layers,
    match_targets,
    placement,
    replace_module,
)
from cersa_diffusion.memory.budget import select_ranks
from cersa_diffusion.memory.cost import is_profitable
from cersa_diffusion.weights.cache import LeadingFactors
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.stored import Checkpoint, FinestWeight

# By layer name; None for a layer that stays dense.
RanksByLayer: TypeAlias = Mapping[str, LayerRanks | None]


@dataclass(frozen=True)
class LayerReport:
    """The result for one layer: its shape and ranks, the counts of trained and frozen numbers, and the kept share of energy."""

    name: str
    out_features: int
    in_features: int
    kept_rank: int
    core_rank: int
    core_parameters: int
    frozen_parameters: int
    kept_energy: float


@dataclass(frozen=True)
class InjectionReport:
    """The result of an injection; ``str()`` gives one line.

    Attributes:
        layers: the layers that were replaced.
        skipped: names of the targets that stayed dense (`unprofitable="skip"`).
        seconds: duration of the injection.
    """

    layers: list[LayerReport]
    skipped: list[str]
    seconds: float

    @property
    def trainable_parameters(self) -> int:
        """Count of the numbers in all cores."""
        return sum(layer.core_parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Count of the numbers in the replaced weights."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def frozen_parameters(self) -> int:
        """Count of the numbers in U, s, Vh and all other frozen tensors."""
        return sum(layer.frozen_parameters for layer in self.layers)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} left dense" if self.skipped else ""
        return (
            f"{len(self.layers)} layers decomposed in {self.seconds:.1f} s{skipped}: {self.dense_parameters / 1e6:.2f} M dense "
            f"-> {self.frozen_parameters / 1e6:.2f} M frozen + {self.trainable_parameters / 1e6:.2f} M trained"
        )


def _known_ranks(
    model: nn.Module, targets: dict[str, nn.Module], config: CersaConfig, ranks: RanksByLayer | None, show_progress: bool
) -> RanksByLayer | None:
    """The ranks that are known before the injection: the caller's, or those that need all layers; else None."""
    if ranks is None:
        if not config.needs_all_layers:
            return None
        candidates = {f"model.{name}": (linear, config) for name, linear in targets.items()}
        selected = select_ranks({"model": model}, candidates, show_progress=show_progress)
        return {layer.name.removeprefix("model."): layer_ranks for layer, layer_ranks in selected}
    if set(ranks) != set(targets):
        differing = sorted(set(ranks) ^ set(targets))
        raise ConfigError(f"ranks and targets differ in {len(differing)} layers, e.g. {differing[:3]}: give ranks for each")
    for name, layer_ranks in ranks.items():
        shape = form_of(targets[name]).shape
        if layer_ranks is not None and not 1 <= layer_ranks.core <= layer_ranks.kept <= min(shape):
            raise ConfigError(
                f"layer {name} of shape {shape} cannot have {layer_ranks}: expected 1 <= core <= kept <= {min(shape)}"
            )
    return ranks


def inject_cersa(
    model: nn.Module,
    config: CersaConfig,
    adapter_name: str = "default",
    *,
    ranks: RanksByLayer | None = None,
    keep_base: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    show_progress: bool = True,
) -> InjectionReport:
    """Replaces the target linear layers of a model by CERSA layers with zero cores; only the cores stay trainable.

    Layer by layer: the dense weight is dropped when its CERSA layer is in place, so that a model takes hardly more memory while
    it is prepared than before or after. All or nothing: if anything fails, the dense layers are put back, from the checkpoint
    where that holds them. The on-disk cache keeps the decompositions for the next injection or load, and for this one where all
    layers are decomposed before the first is replaced: with a memory budget or `uniform_blocks`.

    Args:
        model: any torch model; changed in place.
        config: energy shares and targets. A memory budget counts only this model, in its present dtypes and with AdamW.
        adapter_name: name of the cores.
        ranks: layer name -> ranks, or None for a layer that stays dense: the result of `choose_ranks` for a budget that several
            models share, or for other conditions of training. They take precedence over the settings.
        keep_base: keep the replaced weights for `restore_base`: as a copy in CPU memory, or as a reference to the checkpoint
            file if the weights in memory still equal those in it. Quantised layers are kept themselves, where they are.
        device, dtype: of the factors; default: those of the weights, or the dtype in which a quantised layer computes. A model
            in CPU memory can so be moved to a GPU without ever being there in dense form; move and cast the rest of it
            afterwards, biases included, with ``model.to(device, dtype)``.
        show_progress: show a bar with layer names and remaining time.

    Raises:
        ConfigError: no layer matches, a target cannot be decomposed, the budget is too small, or no repeated blocks are known.
        NonFiniteError: a weight holds NaN or infinity.
    """
    start = time.perf_counter()
    targets = match_targets(model, config.target_modules, config.exclude_modules)
    check_layers(model, targets)
    ranks = _known_ranks(model, targets, config, ranks, show_progress)
    shapes = {name: form_of(layer).shape for name, layer in targets.items() if ranks is None or ranks[name] is not None}
    names = list(targets)
    # The weights are dropped one by one, so nothing here may hold them.
    del targets
    rows, device = [], None if device is None else torch.device(device)
    with all_or_nothing(model):
        for name, layer, factors, layer_ranks in _built_layers(model, shapes, config, ranks, device, dtype, show_progress):
            # In this thread and in model order: random cores depend on the order.
            layer.add_core(adapter_name, new_core(name, config, layer_ranks, factors))
            replace_module(model, name, layer)
            rows.append(_report(name, layer, adapter_name, factors.s))
        if not rows:
            setting = f"alpha ({config.alpha})" if config.memory_budget is None else f"the budget ({config.memory_budget})"
            raise ConfigError(f"unprofitable='skip' skips all {len(names)} layers: lower {setting} or set unprofitable='factor'")
    model.requires_grad_(False)
    replaced = {row.name: model.get_submodule(row.name) for row in rows}
    for layer in replaced.values():
        layer.cores[adapter_name].requires_grad_(True)
        if not keep_base:
            layer.forget_base()
    return InjectionReport(rows, [name for name in names if name not in replaced], time.perf_counter() - start)


def _built_layers(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    config: CersaConfig,
    ranks: RanksByLayer | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    show_progress: bool,
) -> Iterator[tuple[str, CersaLinear, LeadingFactors, LayerRanks]]:
    """The CERSA layers without cores, in model order, with their factors and ranks; a target that stays dense has none."""
    checkpoint = Checkpoint.of(model)

    def job(name: str, shape: tuple[int, int]) -> LayerJob:
        def ranks_of(singular_values: torch.Tensor) -> LayerRanks:
            return config.layer_ranks(singular_values) if ranks is None else ranks[name]

        def build(weight: FinestWeight, factors: LeadingFactors) -> tuple | None:
            layer_ranks = ranks_of(factors.s)
            if ranks is None and config.unprofitable == "skip" and not is_profitable(*shape, layer_ranks, config):
                return None
            dense = model.get_submodule(name)
            options = {"keep_residual": config.residual == "keep", "device": device, "pivots": factors.pivots}
            layer = build_layer(dense, factors, layer_ranks.kept, weight, dtype=dtype or compute_dtype(model, dense), **options)
            return layer, factors, layer_ranks

        return LayerJob(name, shape, lambda: finest_matrix(model, name, checkpoint), lambda s: ranks_of(s).kept, build)

    with decompose_layers([job(*target) for target in shapes.items()], show_progress=show_progress) as results:
        for name, result in results:
            if result is not None:
                yield name, *result


def _report(name: str, layer: CersaLinear, adapter_name: str, singular_values: torch.Tensor) -> LayerReport:
    core = layer.cores[adapter_name]
    return LayerReport(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        kept_rank=layer.kept_rank,
        core_rank=core.rank,
        core_parameters=sum(parameter.numel() for parameter in core.parameters()),
        frozen_parameters=sum(tensor.numel() for tensor in layer.frozen_tensors().values()),
        kept_energy=kept_energy(singular_values, layer.kept_rank),
    )


def merge(model: nn.Module) -> None:
    """Replaces every CERSA layer by a plain `nn.Linear` that holds its effective weight; not reversible."""
    for name, module in installed_layers(model).items():
        replace_module(model, name, as_dense(module, module.effective_weight()))


def restore_base(model: nn.Module, layer_names: Iterable[str] | None = None) -> None:
    """Puts back the weights that injection replaced, bit for bit, or the quantised layers themselves, and removes all cores.

    The layers of a compressed checkpoint (`cersa_diffusion.load_compressed`) are the base itself: only their cores are removed.

    Args:
        model: an injected model; changed in place.
        layer_names: some of its CERSA layers; default: all.

    Raises:
        ConfigError: a weight was not kept; the model is not changed.
    """
    layers, modules = cersa_layers(model), installed_layers(model)
    if layer_names is not None:
        layers = {name: layers[name] for name in layer_names}
    # All weights are read before anything is changed, because a checkpoint on disk may be gone.
    replaced = {name: layer.replaced for name, layer in layers.items() if not layer.is_base}
    for name, weight in replaced.items():
        if weight is None:
            raise ConfigError(
                f"the base weight of layer {name} was not kept (inject with keep_base=True), or its file has changed since: load "
                "the model again"
            )
    for name, layer in layers.items():
        placed = placement(modules[name])
        if layer.is_base:
            for adapter_name in list(layer.cores):
                layer.delete_core(adapter_name)
            replace_module(model, name, layer.to(*placed))
        else:
            replace_module(model, name, original_layer(layer, replaced[name], *placed))
