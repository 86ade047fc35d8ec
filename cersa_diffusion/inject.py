"""Which layers of a model become CERSA layers, and replacing them in place."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import kept_energy
from cersa_diffusion.layers.kinds import as_dense, build_layer, matrix_of, new_core
from cersa_diffusion.layers.linear import CersaLinear, FusedLinear
from cersa_diffusion.layers.model import _places, cersa_layers, check_layers, fused_layers, match_targets, replace_module
from cersa_diffusion.memory.budget import select_ranks
from cersa_diffusion.memory.cost import is_profitable
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers
from cersa_diffusion.weights.stored import Checkpoint


@dataclass(frozen=True)
class LayerReport:
    """What injection did to one layer: shapes, ranks, numbers trained and frozen, and the share of energy that is kept."""

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
    """What injection did to a model; ``str()`` is one line.

    Attributes:
        layers: the layers that were replaced.
        skipped: names of the targets that were left alone (`unprofitable="skip"`).
        seconds: time it took.
    """

    layers: list[LayerReport]
    skipped: list[str]
    seconds: float

    @property
    def trainable_parameters(self) -> int:
        """Numbers in all cores."""
        return sum(layer.core_parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weights that were replaced."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def frozen_parameters(self) -> int:
        """Numbers in U, s, Vh and what else is kept frozen."""
        return sum(layer.frozen_parameters for layer in self.layers)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} left dense" if self.skipped else ""
        return (
            f"{len(self.layers)} layers decomposed in {self.seconds:.1f} s{skipped}: {self.dense_parameters / 1e6:.2f} M dense "
            f"-> {self.frozen_parameters / 1e6:.2f} M frozen + {self.trainable_parameters / 1e6:.2f} M trained"
        )


def _ranks_given(
    model: nn.Module,
    targets: dict[str, nn.Module],
    config: CersaConfig,
    ranks: Mapping[str, LayerRanks | None] | None,
    show_progress: bool,
) -> Mapping[str, LayerRanks | None] | None:
    """The ranks that are known before the decomposition: the caller's, or those a memory budget comes to; None: by alpha."""
    if ranks is None:
        if config.memory_budget is None:
            return None
        named = {f"model.{name}": (linear, config) for name, linear in targets.items()}
        selected = select_ranks({"model": model}, named, show_progress=show_progress)
        return {layer.name.removeprefix("model."): own for layer, own in selected}
    if set(ranks) != set(targets):
        differing = sorted(set(ranks) ^ set(targets))
        raise ConfigError(f"ranks and targets differ in {len(differing)} layers, e.g. {differing[:3]}: give ranks for each")
    for name, own in ranks.items():
        shape = tuple(matrix_of(targets[name]).shape)
        if own is not None and not 1 <= own.core <= own.kept <= min(shape):
            raise ConfigError(f"layer {name} of shape {shape} cannot have {own}: expected 1 <= core <= kept <= {min(shape)}")
    return ranks


def inject_cersa(
    model: nn.Module,
    config: CersaConfig,
    adapter_name: str = "default",
    *,
    ranks: Mapping[str, LayerRanks | None] | None = None,
    keep_base: bool = False,
    show_progress: bool = True,
) -> InjectionReport:
    """Replaces the target linear layers of a model by CERSA layers with zero cores; only the cores stay trainable.

    All or nothing: every layer is checked and decomposed before the first one is replaced. Decompositions are kept in the
    on-disk cache (see `cersa_diffusion.weights.cache`), from which the next injection or load takes them.

    Args:
        model: any torch model; changed in place.
        config: energy shares and targets. A memory budget counts this model alone, in the dtypes it has and with AdamW.
        adapter_name: name of the cores.
        ranks: layer name -> ranks, or None for a layer that stays dense: what `choose_ranks` made of a budget that several
            models share, or of other conditions of training. They come before those of the settings.
        keep_base: see to it that `restore_base` can put the replaced weights back: a copy in CPU memory, or where they lie on
            disk when the model still is as its checkpoint has it.
        show_progress: show a bar with layer names and remaining time.

    Returns:
        Shapes and ranks of all layers, and the seconds it took.

    Raises:
        ConfigError: nothing matches, a target cannot be decomposed, or a budget cannot be met.
        NonFiniteError: NaN or infinity in a weight.
    """
    start = time.perf_counter()
    targets = match_targets(model, config.target_modules, config.exclude_modules)
    check_layers(model, targets)
    ranks = _ranks_given(model, targets, config, ranks, show_progress)
    prepared = list(_prepared(model, targets, config, adapter_name, ranks, keep_base, show_progress))
    layers = {row.name: layer for layer, row in prepared}
    skipped = [name for name in targets if name not in layers]
    if not layers:
        remedy = f"lower alpha ({config.alpha})" if config.memory_budget is None else f"lower the budget ({config.memory_budget})"
        raise ConfigError(f"unprofitable='skip' leaves none of the {len(skipped)} layers: {remedy} or factor them all")
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return InjectionReport([row for _, row in prepared], skipped, time.perf_counter() - start)


def _prepared(
    model: nn.Module,
    targets: dict[str, nn.Module],
    config: CersaConfig,
    adapter_name: str,
    ranks: Mapping[str, LayerRanks | None] | None,
    keep_base: bool,
    show_progress: bool,
) -> Iterator[tuple[CersaLinear, LayerReport]]:
    """The layers with untrained cores for the places of the targets, in model order; none for a target that stays dense."""
    by_name = {name: config.layer_ranks if ranks is None else (lambda _, own=ranks[name]: own) for name in targets}
    checkpoint = Checkpoint.of(model)
    stored = {
        name: checkpoint.find(name, matrix_of(linear), finer_only=not keep_base)
        for name, linear in targets.items()
        if ranks is None or ranks[name] is not None
    }
    jobs = [
        LayerJob.of(name, matrix_of(targets[name]), lambda s, choose=by_name[name]: choose(s).kept, place)
        for name, place in stored.items()
    ]
    with decompose_layers(jobs, show_progress=show_progress) as decomposed:
        for name, factors in decomposed:
            linear, own = targets[name], by_name[name](factors.s)
            if ranks is None and config.unprofitable == "skip" and not is_profitable(*matrix_of(linear).shape, own, config):
                continue
            keep_residual = config.residual == "keep"
            options = {"keep_residual": keep_residual, "keep_base": keep_base, "stored": stored[name], "pivots": factors.pivots}
            layer = build_layer(linear, factors, own.kept, **options)
            layer.add_core(adapter_name, new_core(name, config, own, factors))
            yield layer, _report(name, layer, adapter_name, factors.s)


def _report(name: str, layer: CersaLinear, adapter_name: str, singular_values: torch.Tensor) -> LayerReport:
    core = layer.cores[adapter_name]
    return LayerReport(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        kept_rank=layer.kept_rank,
        core_rank=core.rank,
        core_parameters=sum(parameter.numel() for parameter in core.parameters()),
        frozen_parameters=sum(buffer.numel() for buffer in layer.buffers()),
        kept_energy=kept_energy(singular_values, layer.kept_rank),
    )


def merge(model: nn.Module) -> None:
    """Replaces every CERSA layer by a plain `nn.Linear` that holds its effective weight; not reversible."""
    for name, module in _places(model).items():
        if isinstance(module, FusedLinear):
            replace_module(model, name, as_dense(module.factored, module.weight))
        else:
            replace_module(model, name, as_dense(module, module.effective_weight()))


def restore_base(model: nn.Module, layer_names: Iterable[str] | None = None) -> None:
    """Puts the weights that injection replaced back, bit for bit, and removes all cores.

    Layers of a compressed checkpoint (`cersa_diffusion.load_compressed`) are the base themselves: they only lose their cores.

    Args:
        model: an injected model; changed in place.
        layer_names: some of its CERSA layers; all when left out.

    Raises:
        ConfigError: the weights were not kept; the model is left as it is.
    """
    layers, fused = cersa_layers(model), fused_layers(model)
    if layer_names is not None:
        layers = {name: layers[name] for name in layer_names}
    # Read once, and before anything is changed: a checkpoint on disk may be gone.
    weights = {name: layer.dense_weight for name, layer in layers.items() if not layer.is_base}
    for name, weight in weights.items():
        if weight is None:
            raise ConfigError(
                f"the base weight of layer {name} was not kept (inject with keep_base=True), or its file has changed since: load "
                "the model anew"
            )
    for name, layer in layers.items():
        weight = fused[name].weight if name in fused else layer.U
        if layer.is_base:
            for adapter_name in list(layer.cores):
                layer.delete_core(adapter_name)
            replace_module(model, name, layer.to(weight.device, weight.dtype))
            continue
        replace_module(model, name, as_dense(layer, weights[name].to(weight.device, weight.dtype)))
