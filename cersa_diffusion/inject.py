"""Which layers of a model become CERSA layers, and replacing them in place."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from cersa_diffusion.cache import DecompositionCache, leading_factors
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.cores import Core, DiagonalCore, MatrixCore, SparseCore, banded_places, random_places, top_places
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.functional import Decomposition, float64
from cersa_diffusion.linear import CersaLinear


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
        if (target_modules == "all-linear" or _name_matches(name, target_modules))
        and not (exclude_modules and _name_matches(name, exclude_modules))
    }
    if not targets:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        already = sum(isinstance(module, CersaLinear) for module in model.modules())
        hint = f"; {already} layers are CERSA layers already" if already else ""
        raise ConfigError(
            f"target_modules={target_modules!r} matches no nn.Linear of {type(model).__name__}: "
            f"its linear layers end in {endings}{hint}"
        )
    return targets


def _name_matches(name: str, pattern: str | list[str]) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def check_layers(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Refuses layers that cannot be decomposed, before anything is changed.

    Raises:
        ConfigError: a meta tensor, a non-floating dtype, or a weight that two modules share.
        NonFiniteError: NaN or infinity in a weight.
    """
    owners: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(parameter_name)
    for name, layer in layers.items():
        weight = layer.weight
        if weight.is_meta:
            raise ConfigError(f"layer {name} is on the meta device: load the weights before injecting")
        if not weight.is_floating_point():
            raise ConfigError(f"layer {name} has dtype {weight.dtype}, expected a floating dtype: dequantise it or exclude it")
        if len(owners[id(weight)]) > 1:
            raise ConfigError(f"layer {name} shares its weight with {owners[id(weight)]}: untie it or add it to exclude_modules")
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"layer {name} holds NaN or infinity: this checkpoint is damaged")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the submodule of that name, keeping the training mode."""
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(getattr(parent, child_name).training)
    setattr(parent, child_name, module)


def replacement(
    linear: nn.Linear, factors: Decomposition, kept_rank: int, *, keep_residual: bool, keep_base: bool
) -> CersaLinear:
    """The CERSA layer for a linear layer, not yet in its place and without cores.

    Args:
        linear: the layer to replace.
        factors: its decomposition, at least the leading `kept_rank` triplets.
        kept_rank: k.
        keep_residual: keep the part of the weight outside these components, frozen and dense.
        keep_base: keep the weight in CPU memory.
    """
    weight, residual = linear.weight, None
    if keep_residual:
        # What the bases do not hold after they were rounded to the compute dtype: together they are the weight again.
        U, Vh = (float64(basis.to(weight.dtype)) for basis in (factors.U[:, :kept_rank], factors.Vh[:kept_rank]))
        residual = float64(weight) - (U * factors.s[:kept_rank].float().double()) @ Vh
    dense_weight = weight if keep_base else None
    return CersaLinear(factors, kept_rank, linear.bias, weight.dtype, weight.device, dense_weight, residual)


def new_core(config: CersaConfig, factors: Decomposition) -> Core:
    """The untrained core of a layer.

    Args:
        config: the settings.
        factors: the layer's decomposition, with the whole spectrum.
    """
    kept, rank = config.kept_rank(factors.s), config.core_rank(factors.s)
    if config.core == "sparse":
        places = banded_places(kept, min(config.off_diagonals, kept - 1))
        if config.sparse_pattern == "random":
            places = random_places(kept, places.shape[1])
        elif config.sparse_pattern == "top_k":
            places = top_places(factors.U[:, :kept], factors.Vh[:kept], places.shape[1])
        return SparseCore(kept, places)
    offset = kept - rank if config.block == "bottom" else 0
    return MatrixCore(rank, offset) if config.core == "matrix" else DiagonalCore(rank, offset)


def is_profitable(layer: CersaLinear) -> bool:
    """Whether bases and cores hold fewer numbers than the dense weight (design: m k + n k + r^2 < m n)."""
    trained = sum(parameter.numel() for parameter in layer.cores.parameters())
    m, n = layer.out_features, layer.in_features
    return (m + n) * layer.kept_rank + trained < m * n


def inject_cersa(
    model: nn.Module,
    config: CersaConfig,
    adapter_name: str = "default",
    *,
    keep_base: bool = False,
    show_progress: bool = True,
) -> InjectionReport:
    """Replaces the target linear layers of a model by CERSA layers with zero cores; only the cores stay trainable.

    All or nothing: every layer is checked and decomposed before the first one is replaced. Decompositions are kept in the
    on-disk cache (see `cersa_diffusion.cache`), from which the next injection or load takes them.

    Args:
        model: any torch model; changed in place.
        config: energy shares and targets.
        adapter_name: name of the cores.
        keep_base: keep the replaced weights in CPU memory, so that `restore_base` can put them back.
        show_progress: show a bar with layer names and remaining time.

    Returns:
        Shapes and ranks of all layers, and the seconds it took.

    Raises:
        ConfigError: nothing matches, or a target cannot be decomposed.
        NonFiniteError: NaN or infinity in a weight.
    """
    start = time.perf_counter()
    cache = DecompositionCache.default()
    targets = match_targets(model, config.target_modules, config.exclude_modules)
    check_layers(model, targets)
    replacements, rows, skipped = {}, [], []
    for name, linear in _progress(targets.items(), show_progress):
        factors = leading_factors(linear.weight, config.kept_rank, cache)
        layer = replacement(
            linear, factors, config.kept_rank(factors.s), keep_residual=config.residual == "keep", keep_base=keep_base
        )
        layer.add_core(adapter_name, new_core(config, factors))
        if config.unprofitable == "skip" and not is_profitable(layer):
            skipped.append(name)
            continue
        replacements[name] = layer
        rows.append(_report(name, layer, adapter_name, factors.s))
    if not replacements:
        raise ConfigError(f"unprofitable='skip' leaves none of the {len(skipped)} layers: lower alpha ({config.alpha})")
    if cache:
        cache.trim()
    model.requires_grad_(False)
    for name, layer in replacements.items():
        replace_module(model, name, layer)
    return InjectionReport(rows, skipped, time.perf_counter() - start)


def _report(name: str, layer: CersaLinear, adapter_name: str, singular_values: torch.Tensor) -> LayerReport:
    energy = singular_values.square()
    core = layer.cores[adapter_name]
    return LayerReport(
        name=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        kept_rank=layer.kept_rank,
        core_rank=core.rank,
        core_parameters=sum(parameter.numel() for parameter in core.parameters()),
        frozen_parameters=sum(buffer.numel() for buffer in layer.buffers()),
        kept_energy=float(energy[: layer.kept_rank].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)),
    )


def _progress(layers: Iterable[tuple[str, nn.Linear]], show: bool) -> Iterable[tuple[str, nn.Linear]]:
    bar = tqdm(list(layers), desc="decomposing", unit="layer", disable=not show)
    for name, layer in bar:
        bar.set_postfix_str(name[-40:], refresh=False)
        yield name, layer


def cersa_layers(model: nn.Module) -> dict[str, CersaLinear]:
    """Name -> layer of all CERSA layers of a model, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CersaLinear)}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer has to be given: those that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge(model: nn.Module) -> None:
    """Replaces every CERSA layer by a plain `nn.Linear` that holds its effective weight; not reversible."""
    for name, layer in cersa_layers(model).items():
        replace_module(model, name, _as_linear(layer, layer.effective_weight()))


def restore_base(model: nn.Module) -> None:
    """Puts the weights that injection replaced back, bit for bit, and removes all cores.

    Raises:
        ConfigError: the weights were not kept; the model is left as it is.
    """
    layers = cersa_layers(model)
    for name, layer in layers.items():
        if layer.dense_weight is None:
            raise ConfigError(f"the base weight of layer {name} was not kept: inject with keep_base=True, or load the model anew")
    for name, layer in layers.items():
        replace_module(model, name, _as_linear(layer, layer.dense_weight))


def _as_linear(layer: CersaLinear, weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(layer.U.device, layer.U.dtype), requires_grad=weight.requires_grad)
    linear.bias = layer.bias
    return linear
