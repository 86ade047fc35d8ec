"""The layers of a model: which ones a specification names, whether they can be decomposed, finding and replacing them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.layers.kinds import KINDS, can_be_factored
from cersa_diffusion.layers.linear import CersaLinear, FusedLinear

# Dtypes of weights with enough digits for a decomposition; those of fewer bits are quantised, with scales of their own.
DECOMPOSABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def match_targets(
    model: nn.Module, target_modules: str | list[str], exclude_modules: str | list[str] | None = None
) -> dict[str, nn.Module]:
    """The layers that a target specification names, in model order.

    Args:
        model: any torch model.
        target_modules: "all-linear", a regular expression for whole names, or name endings ("to_q", "attn1.to_k").
        exclude_modules: the same forms without "all-linear".

    Returns:
        Module name -> layer, of the classes in `KINDS`.

    Raises:
        ConfigError: nothing matches; the message lists what could have.
    """
    candidates = {name: module for name, module in model.named_modules() if can_be_factored(module)}
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


def check_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Refuses layers that cannot be decomposed, before anything is changed.

    Raises:
        ConfigError: a meta tensor, a quantised weight (whatever dtype it claims), or a weight that two modules share.
        NonFiniteError: NaN or infinity in a weight.
    """
    check_untied(model, layers)
    for name, layer in layers.items():
        if isinstance(layer, FusedLinear):
            raise ConfigError(f"layer {name} is fused: call unfuse_cersa() (or cersa_diffusion.unfuse) first, or merge")
        weight = layer.weight
        if weight.is_meta:
            raise ConfigError(f"layer {name} is on the meta device: load the weights before injecting")
        if weight.dtype not in DECOMPOSABLE or type(weight) not in (torch.Tensor, nn.Parameter):
            raise ConfigError(
                f"layer {name} holds a {type(weight).__name__} of {weight.dtype}, expected a plain weight in one of "
                f"{', '.join(str(dtype) for dtype in DECOMPOSABLE)}: dequantise it (without layerwise casting) or exclude it"
            )
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"layer {name} holds NaN or infinity: this checkpoint is damaged")


def check_untied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
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


LONE_COMPONENT = "model"


def components_of(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The components of a model by name; a lone model is a component itself."""
    return {LONE_COMPONENT: model} if isinstance(model, nn.Module) else dict(model)


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """Undoes what the block did to layers, cores and strengths when it raises (an interrupt included).

    The tensors themselves are not copied: operations that write into cores undo that themselves.

    Args:
        models: the models that the block changes.
    """
    kinds = (*KINDS, CersaLinear, FusedLinear)
    places = [(model, name, module) for model in models for name, module in model.named_modules() if isinstance(module, kinds)]
    layers = [layer for model in models for layer in cersa_layers(model).values()]
    states = [(layer, dict(layer.cores.items()), dict(layer.strengths), layer.enabled) for layer in layers]
    try:
        yield
    except BaseException:
        for model, name, module in places:
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        for layer, cores, strengths, enabled in states:
            layer.cores = nn.ModuleDict(cores)
            layer.strengths, layer.enabled = strengths, enabled
        raise
