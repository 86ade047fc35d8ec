"""Checks before an adapter is loaded into layers that already carry another one."""

import warnings
from collections.abc import Iterable

from torch import nn

from cersa_diffusion.adapters.file import StoredLayer
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.linear import CersaLinear


def check_room(name: str, layer: CersaLinear, stored: StoredLayer, adapter_name: str) -> None:
    """Raises ConfigError if a stored layer changes components that a CERSA layer does not keep, or if the name is taken.

    Args:
        name: name of the layer, for messages.
        layer: the layer of the model.
        stored: the layer of the file.
        adapter_name: the name of the new adapter.
    """
    if adapter_name in layer.cores:
        raise ConfigError(f"adapter {adapter_name!r} is already loaded: choose another adapter_name or unload it")
    if (layer.residual is not None) != stored.residual_kept:
        model, adapter = ("keeps", "was trained without") if layer.residual is not None else ("drops", "was trained with")
        raise ConfigError(
            f"layer {name}: the model {model} the residual, but the adapter {adapter} it: unload the loaded adapter"
        )
    if stored.offset + stored.core_rank > layer.kept_rank:
        raise ConfigError(
            f"layer {name} keeps {layer.kept_rank} components, but the adapter changes {stored.core_rank} from component "
            f"{stored.offset} on: unload the loaded adapter and load this one first"
        )


def warn_of_other_truncation(layers: Iterable[tuple[str, nn.Module, StoredLayer]], source: str) -> None:
    """Warns if layers keep another number of components than in the training of the adapter.

    The weight changes of the adapter are still exact, because they use only kept components; the truncated base is another one.
    `layers` are name, module and stored layer of all layers that the adapter changes.
    """
    layers = list(layers)
    differing = [
        (name, module.kept_rank, stored.kept_rank)
        for name, module, stored in layers
        if isinstance(module, CersaLinear) and not stored.residual_kept and module.kept_rank != stored.kept_rank
    ]
    if differing:
        name, kept, trained = differing[0]
        warnings.warn(
            f"{source}: {len(differing)} of {len(layers)} layers keep another number of components than in its training (e.g. "
            f"{name}: {kept} instead of {trained}): its weight changes are exact, but the truncated base is that of the adapter "
            "that was loaded first",
            stacklevel=3,
        )
