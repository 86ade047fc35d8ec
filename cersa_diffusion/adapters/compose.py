"""Several adapters on one injected model: add, weigh, mix, switch, disable, delete. All of it happens in the small cores.

With no active adapter a model is the truncated base (or the whole one, where the residual is kept).
"""

from collections.abc import Sequence

from torch import nn

from cersa_diffusion.adapters.strengths import Strength, layer_strengths
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.core import MatrixCore
from cersa_diffusion.layers.model import cersa_layers, fused_layers


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters of a model, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in cersa_layers(model).values() for name in layer.cores))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Name -> strength of the adapters that take part in the forward pass; empty while adapters are disabled.

    Where layers differ (see `set_adapters`) it is the largest strength in size.
    """
    active: dict[str, float] = {}
    for layer in cersa_layers(model).values():
        for name, strength in layer.strengths.items() if layer.enabled else ():
            if abs(strength) > abs(active.get(name, 0.0)):
                active[name] = strength
    return {name: active[name] for name in adapter_names(model) if name in active}


def add_adapter(model: nn.Module, adapter_name: str, like: str | None = None) -> None:
    """Adds an adapter with zero cores to train, where and as large as an existing one; it alone stays trainable.

    Args:
        model: an injected model, or one that `cersa_diffusion.load_compressed` made.
        adapter_name: a new name.
        like: the adapter whose layers and ranks it takes; default: the first there is. On a model without adapters it trains all
            kept components of every CERSA layer.

    Raises:
        ConfigError: the name is taken, there is no adapter of the other name, or no CERSA layer; nothing is changed.
    """
    refuse_fused(model)
    present, layers = adapter_names(model), cersa_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no CERSA layers: inject_cersa makes them, with an adapter")
    if like is not None:
        check_names(model, [like])
    if adapter_name in present:
        raise ConfigError(f"adapter {adapter_name!r} is already on this model: choose another name or delete it")
    like = like or next(iter(present), None)
    model.requires_grad_(False)
    for layer in layers.values():
        if like is None:
            layer.add_core(adapter_name, MatrixCore(layer.kept_rank))
        elif like in layer.cores:
            layer.add_core(adapter_name, MatrixCore(layer.cores[like].rank, layer.cores[like].offset))


def set_adapters(
    model: nn.Module, names: str | Sequence[str], weights: Strength | Sequence[Strength | None] | None = None
) -> None:
    """Makes these adapters active with these strengths, and no others.

    Args:
        model: an injected model.
        names: one or several adapters.
        weights: a strength for all of them, or one for each; 1 when left out. A strength is a number or, for a UNet, a
            mapping that gives one by block: see `cersa_diffusion.adapters.strengths`.

    Raises:
        ConfigError: an unknown adapter or block, or not as many weights as names; nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: give one weight for all, or one for each")
    refuse_fused(model)
    check_names(model, names)
    layers, module_names = cersa_layers(model), [name for name, _ in model.named_modules()]
    chosen = {
        name: layer_strengths(1.0 if weight is None else weight, list(layers), module_names)
        for name, weight in zip(names, weights, strict=True)
    }
    for layer_name, layer in layers.items():
        layer.strengths = {name: chosen[name][layer_name] if name in chosen else 0.0 for name in layer.strengths}


def disable_adapters(model: nn.Module) -> None:
    """Takes all adapters out of the forward pass; their strengths are kept for `enable_adapters`.

    Raises:
        ConfigError: the model is fused.
    """
    refuse_fused(model)
    for layer in cersa_layers(model).values():
        layer.enabled = False


def enable_adapters(model: nn.Module) -> None:
    """Undoes `disable_adapters`.

    Raises:
        ConfigError: the model is fused.
    """
    refuse_fused(model)
    for layer in cersa_layers(model).values():
        layer.enabled = True


def delete_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Removes adapters; the layers stay factored.

    Raises:
        ConfigError: an unknown adapter, or the model is fused; nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    refuse_fused(model)
    check_names(model, names)
    for layer in cersa_layers(model).values():
        for name in names:
            if name in layer.cores:
                layer.delete_core(name)


def refuse_fused(model: nn.Module) -> None:
    """Raises ConfigError where CERSA layers are fused into dense weights: their adapters have no effect of their own."""
    fused = fused_layers(model)
    if fused:
        raise ConfigError(f"{len(fused)} layers of {type(model).__name__} are fused: unfuse them first (pipe.unfuse_cersa())")


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError for names that no adapter of the model has."""
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no adapter named {', '.join(map(repr, unknown))}, this model has {known}")
