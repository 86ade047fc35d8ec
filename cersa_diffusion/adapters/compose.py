"""Several adapters on one injected model: add, weight, mix, switch, disable, delete. Only the small cores change.

Without an active adapter the model computes with the truncated base (or with the whole one, if the residual is kept).
"""

from collections.abc import Sequence

from torch import nn

from cersa_diffusion.adapters.strengths import Strength, layer_strengths
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.core import MatrixCore
from cersa_diffusion.layers.model import cersa_layers, fused_layers


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in cersa_layers(model).values() for name in layer.cores))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Name -> strength of the adapters in the forward pass; empty while adapters are disabled.

    If the strengths of the layers differ (see `set_adapters`), it is the one with the largest absolute value.
    """
    active: dict[str, float] = {}
    for layer in cersa_layers(model).values():
        for name, strength in layer.strengths.items() if layer.enabled else ():
            if abs(strength) > abs(active.get(name, 0.0)):
                active[name] = strength
    return {name: active[name] for name in adapter_names(model) if name in active}


def add_adapter(model: nn.Module, adapter_name: str, like: str | None = None) -> None:
    """Adds an adapter with zero cores for training, in the layers and ranks of an existing one; only the new one is trainable.

    Args:
        model: an injected model, or one from `cersa_diffusion.load_compressed`.
        adapter_name: a new name.
        like: the adapter whose layers and ranks are used; default: the first one. On a model without adapters, all kept
            components of every CERSA layer are trained.

    Raises:
        ConfigError: the name is taken, `like` does not exist, or the model has no CERSA layers; nothing is changed.
    """
    refuse_fused(model)
    existing, layers = adapter_names(model), cersa_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no CERSA layers: create them and an adapter with inject_cersa")
    if like is not None:
        check_names(model, like)
    if adapter_name in existing:
        raise ConfigError(f"adapter {adapter_name!r} is already on this model: choose another name or delete it")
    like = like or next(iter(existing), None)
    model.requires_grad_(False)
    for layer in layers.values():
        if like is None:
            layer.add_core(adapter_name, MatrixCore(layer.kept_rank))
        elif like in layer.cores:
            layer.add_core(adapter_name, MatrixCore(layer.cores[like].rank, layer.cores[like].offset))


def set_adapters(
    model: nn.Module, names: str | Sequence[str], weights: Strength | Sequence[Strength | None] | None = None
) -> None:
    """Activates these adapters with these strengths, and deactivates all others.

    Args:
        model: an injected model.
        names: one or several adapters.
        weights: one strength for all of them, or a list with one for each; default: 1. A strength is a number or, for a UNet, a
            mapping with a strength for each block: see `cersa_diffusion.adapters.strengths`.

    Raises:
        ConfigError: an adapter or block is unknown, or there are not as many weights as names; nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: give one weight for all, or one for each")
    refuse_fused(model)
    check_names(model, names)
    layers, module_names = cersa_layers(model), [name for name, _ in model.named_modules()]
    strengths = {
        name: layer_strengths(1.0 if weight is None else weight, list(layers), module_names)
        for name, weight in zip(names, weights, strict=True)
    }
    for layer_name, layer in layers.items():
        layer.strengths = {name: strengths[name][layer_name] if name in strengths else 0.0 for name in layer.strengths}


def disable_adapters(model: nn.Module) -> None:
    """Removes all adapters from the forward pass and keeps their strengths; raises ConfigError if the model is fused."""
    _set_enabled(model, False)


def enable_adapters(model: nn.Module) -> None:
    """Undoes `disable_adapters`; raises ConfigError if the model is fused."""
    _set_enabled(model, True)


def _set_enabled(model: nn.Module, enabled: bool) -> None:
    refuse_fused(model)
    for layer in cersa_layers(model).values():
        layer.enabled = enabled


def delete_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Removes adapters; the layers stay factored.

    Raises:
        ConfigError: an adapter is unknown, or the model is fused; nothing is changed.
    """
    refuse_fused(model)
    names = check_names(model, names)
    for layer in cersa_layers(model).values():
        for name in names:
            if name in layer.cores:
                layer.delete_core(name)


def refuse_fused(model: nn.Module) -> None:
    """Raises ConfigError if CERSA layers are fused, because changes of their adapters would have no effect."""
    fused = fused_layers(model)
    if fused:
        raise ConfigError(f"{len(fused)} layers of {type(model).__name__} are fused: unfuse them first (pipe.unfuse_cersa())")


def check_names(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """The given names as a list; raises ConfigError if the model has no adapter of one of these names."""
    names, known = [names] if isinstance(names, str) else list(names), adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no adapter named {', '.join(map(repr, unknown))}, this model has {known}")
    return names
