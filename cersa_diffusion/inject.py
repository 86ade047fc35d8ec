"""Which layers of a model become CERSA layers, and replacing them in place."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cersa_diffusion.budget import select_ranks
from cersa_diffusion.checkpoint import Checkpoint, StoredWeight, finest_weight
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.cores import Core, DiagonalCore, MatrixCore, SparseCore, banded_places, random_places, top_places
from cersa_diffusion.decomposition import LayerJob, decompose_layers
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.fingerprint import base_entries
from cersa_diffusion.functional import Decomposition, Pivots, float64, kept_energy
from cersa_diffusion.linear import CersaLinear, FusedLinear
from cersa_diffusion.memory import is_profitable

# Dtypes of weights with enough digits for a decomposition; those of fewer bits are quantised, with scales of their own.
DECOMPOSABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


def match_targets(
    model: nn.Module, target_modules: str | list[str], exclude_modules: str | list[str] | None = None
) -> dict[str, nn.Linear]:
    """The linear layers that a target specification names, in model order.

    Args:
        model: any torch model.
        target_modules: "all-linear", a regular expression for whole names, or name endings ("to_q", "attn1.to_k").
        exclude_modules: the same forms without "all-linear".

    Returns:
        Module name -> layer. Only plain `nn.Linear`: subclasses (quantised layers, LoRA wrappers) are read by others.

    Raises:
        ConfigError: nothing matches; the message lists what could have.
    """
    # By exact type: nn.MultiheadAttention reads the weight of its Linear subclass itself and would miss the replacement.
    candidates = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    targets = {
        name: module
        for name, module in candidates.items()
        if (target_modules == "all-linear" or name_matches(name, target_modules))
        and not (exclude_modules and name_matches(name, exclude_modules))
    }
    if not targets:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        already = sum(isinstance(module, CersaLinear) for module in model.modules())
        hint = f"; {already} layers are CERSA layers already: add_adapter adds an adapter to them" if already else ""
        raise ConfigError(
            f"target_modules={target_modules!r} matches no nn.Linear of {type(model).__name__}: "
            f"its linear layers end in {endings}{hint}"
        )
    return targets


def name_matches(name: str, pattern: str | list[str]) -> bool:
    """Whether a layer's name is what a pattern means: a regular expression for whole names, or a list of name endings."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def check_layers(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Refuses layers that cannot be decomposed, before anything is changed.

    Raises:
        ConfigError: a meta tensor, a quantised weight (whatever dtype it claims), or a weight that two modules share.
        NonFiniteError: NaN or infinity in a weight.
    """
    check_untied(model, layers)
    for name, layer in layers.items():
        weight = layer.weight
        if weight.is_meta:
            raise ConfigError(f"layer {name} is on the meta device: load the weights before injecting")
        if isinstance(layer, FusedLinear):
            raise ConfigError(f"layer {name} is fused: call unfuse_cersa() (or cersa_diffusion.unfuse) first, or merge")
        if weight.dtype not in DECOMPOSABLE or type(weight) not in (torch.Tensor, nn.Parameter):
            raise ConfigError(
                f"layer {name} holds a {type(weight).__name__} of {weight.dtype}, expected a plain weight in one of "
                f"{', '.join(str(dtype) for dtype in DECOMPOSABLE)}: dequantise it (without layerwise casting) or exclude it"
            )
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"layer {name} holds NaN or infinity: this checkpoint is damaged")


def check_untied(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Refuses layers whose weight another module has as well.

    Raises:
        ConfigError: such a layer, and what it shares its weight with.
    """
    owners: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(parameter_name)
    for name, layer in layers.items():
        if len(owners[id(layer.weight)]) > 1:
            names = owners[id(layer.weight)]
            raise ConfigError(f"layer {name} shares its weight with {names}: untie it or add it to exclude_modules")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the submodule of that name, keeping the training mode."""
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(getattr(parent, child_name).training)
    setattr(parent, child_name, module)


def replacement(
    linear: nn.Linear,
    factors: Decomposition,
    kept_rank: int,
    *,
    keep_residual: bool,
    keep_base: bool,
    stored: StoredWeight | None = None,
    pivots: Pivots | None = None,
) -> CersaLinear:
    """The CERSA layer for a linear layer, not yet in its place and without cores.

    Args:
        linear: the layer to replace.
        factors: its decomposition, at least the leading `kept_rank` triplets.
        kept_rank: k.
        keep_residual: keep the part of the weight outside these components, frozen and dense.
        keep_base: keep the weight for `restore_base`: in CPU memory, unless it can be read again from its checkpoint.
        stored: where the checkpoint has the weight, if it has.
        pivots: of the decomposition, where they are known.
    """
    weight, residual = linear.weight, None
    if keep_residual:
        # From the cache they come on the CPU.
        factors = Decomposition(*(factor.to(weight.device) for factor in (factors.U, factors.s, factors.Vh)))
        # What the bases do not hold after they were rounded to the compute dtype: together they are the weight again.
        U, Vh = (float64(basis.to(weight.dtype)) for basis in (factors.U[:, :kept_rank], factors.Vh[:kept_rank]))
        residual = float64(weight) - (U * factors.s[:kept_rank].float().double()) @ Vh
    dense_weight = (stored or weight) if keep_base else None
    layer = CersaLinear(factors, kept_rank, linear.bias, weight.dtype, weight.device, dense_weight, residual, pivots)
    layer.base_entries = base_entries(finest_weight(weight, stored))
    return layer


def new_core(name: str, config: CersaConfig, ranks: LayerRanks, factors: Decomposition) -> Core:
    """The untrained core of a layer.

    Args:
        name: of the layer, for the error.
        config: the settings.
        ranks: k and r.
        factors: the layer's decomposition, at least the leading k triplets.

    Raises:
        ConfigError: the pattern needs all components, and the layer keeps fewer (its weight has a lower rank).
    """
    kept, rank = ranks
    if config.core == "sparse":
        places = banded_places(kept, min(config.off_diagonals, kept - 1))
        if config.sparse_pattern == "random":
            places = random_places(kept, places.shape[1])
        elif config.sparse_pattern == "top_k":
            full = min(factors.U.shape[0], factors.Vh.shape[1])
            if kept < full:
                raise ConfigError(
                    f"layer {name} keeps {kept} components, sparse_pattern='top_k' needs all {full}: add it to exclude_modules "
                    "or set sparse_pattern='banded' or 'random'"
                )
            places = top_places(factors.U[:, :kept], factors.Vh[:kept], places.shape[1])
        return SparseCore(kept, places)
    offset = kept - rank if config.block == "bottom" else 0
    return MatrixCore(rank, offset) if config.core == "matrix" else DiagonalCore(rank, offset)


def _ranks_given(
    model: nn.Module,
    targets: dict[str, nn.Linear],
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
        shape = tuple(targets[name].weight.shape)
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
    on-disk cache (see `cersa_diffusion.cache`), from which the next injection or load takes them.

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
    targets: dict[str, nn.Linear],
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
        name: checkpoint.find(name, linear.weight, finer_only=not keep_base)
        for name, linear in targets.items()
        if ranks is None or ranks[name] is not None
    }
    jobs = [
        LayerJob.of(name, targets[name], lambda s, choose=by_name[name]: choose(s).kept, place) for name, place in stored.items()
    ]
    with decompose_layers(jobs, show_progress=show_progress) as decomposed:
        for name, factors in decomposed:
            linear, own = targets[name], by_name[name](factors.s)
            if ranks is None and config.unprofitable == "skip" and not is_profitable(*linear.weight.shape, own, config):
                continue
            keep_residual = config.residual == "keep"
            options = {"keep_residual": keep_residual, "keep_base": keep_base, "stored": stored[name], "pivots": factors.pivots}
            layer = replacement(linear, factors, own.kept, **options)
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


def cersa_layers(model: nn.Module) -> dict[str, CersaLinear]:
    """Name -> layer of all CERSA layers of a model, in model order; of fused ones the layer that was fused."""
    return {name: module.factored if isinstance(module, FusedLinear) else module for name, module in _places(model).items()}


def fused_layers(model: nn.Module) -> dict[str, FusedLinear]:
    """Name -> layer of all fused layers of a model, in model order."""
    return {name: module for name, module in _places(model).items() if isinstance(module, FusedLinear)}


def _places(model: nn.Module) -> dict[str, CersaLinear | FusedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CersaLinear | FusedLinear)}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer has to be given: those that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge(model: nn.Module) -> None:
    """Replaces every CERSA layer by a plain `nn.Linear` that holds its effective weight; not reversible."""
    for name, module in _places(model).items():
        if isinstance(module, FusedLinear):
            replace_module(model, name, as_linear(module.factored, module.weight))
        else:
            replace_module(model, name, as_linear(module, module.effective_weight()))


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
        replace_module(model, name, as_linear(layer, weights[name].to(weight.device, weight.dtype)))


def as_linear(layer: CersaLinear, weight: torch.Tensor) -> nn.Linear:
    """A plain layer with a dense (m, n) weight and the bias of a CERSA layer."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    linear.bias = layer.bias
    return linear
