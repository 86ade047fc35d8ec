"""Several adapters on one injected model: add, weigh, mix, switch, disable, delete. All of it happens in the small cores.

With no active adapter a model is the truncated base (or the whole one, where the residual is kept).
"""

from collections.abc import Sequence

from torch import nn

from cersa_diffusion.cores import MatrixCore
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.inject import cersa_layers


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters of a model, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in cersa_layers(model).values() for name in layer.cores))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Name -> strength of the adapters that take part in the forward pass; empty while adapters are disabled."""
    return {
        name: strength
        for layer in cersa_layers(model).values()
        if layer.enabled
        for name, strength in layer.strengths.items()
        if strength != 0
    }


def add_adapter(model: nn.Module, adapter_name: str, like: str = "default") -> None:
    """Adds a second adapter with zero cores to train, where and as large as an existing one; it alone stays trainable.

    Args:
        model: an injected model.
        adapter_name: a new name.
        like: the adapter whose layers and ranks it takes.

    Raises:
        ConfigError: the name is taken, or there is no adapter of the other name; nothing is changed.
    """
    _check_names(model, [like])
    if adapter_name in adapter_names(model):
        raise ConfigError(f"adapter {adapter_name!r} is already on this model: choose another name or delete it")
    model.requires_grad_(False)
    for layer in cersa_layers(model).values():
        if like in layer.cores:
            layer.add_core(adapter_name, MatrixCore(layer.cores[like].rank, layer.cores[like].offset))


def set_adapters(model: nn.Module, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
    """Makes these adapters active with these strengths, and no others.

    Args:
        model: an injected model.
        names: one or several adapters.
        weights: a strength for all of them, or one for each; 1 when left out.

    Raises:
        ConfigError: an unknown adapter, or not as many weights as names; nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    if weights is None or isinstance(weights, int | float):
        weights = [1.0 if weights is None else float(weights)] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: give one weight for all, or one for each")
    _check_names(model, names)
    chosen = dict(zip(names, map(float, weights), strict=True))
    for layer in cersa_layers(model).values():
        layer.strengths = {name: chosen.get(name, 0.0) for name in layer.strengths}


def disable_adapters(model: nn.Module) -> None:
    """Takes all adapters out of the forward pass; their strengths are kept for `enable_adapters`."""
    for layer in cersa_layers(model).values():
        layer.enabled = False


def enable_adapters(model: nn.Module) -> None:
    """Undoes `disable_adapters`."""
    for layer in cersa_layers(model).values():
        layer.enabled = True


def delete_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Removes adapters; the layers stay factored.

    Raises:
        ConfigError: an unknown adapter; nothing is changed.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(model, names)
    for layer in cersa_layers(model).values():
        for name in names:
            if name in layer.cores:
                layer.delete_core(name)


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no adapter named {', '.join(map(repr, unknown))}, this model has {known}")
