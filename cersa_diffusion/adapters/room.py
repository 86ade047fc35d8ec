"""Whether an adapter goes onto layers that carry one already, and what its reader should know then."""

import warnings
from collections.abc import Iterable

from torch import nn

from cersa_diffusion.adapters.file import StoredLayer
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.linear import CersaLinear


def check_room(name: str, layer: CersaLinear, stored: StoredLayer, adapter_name: str) -> None:
    """Refuses a stored layer whose change does not lie within the components that a layer keeps.

    Args:
        name: of the layer, for messages.
        layer: where it is to go.
        stored: what the file holds.
        adapter_name: the name it is to have.

    Raises:
        ConfigError: it does not fit, or the name is taken.
    """
    if adapter_name in layer.cores:
        raise ConfigError(f"adapter {adapter_name!r} is already loaded: choose another adapter_name or unload it")
    if (layer.residual is not None) != stored.residual_kept:
        raise ConfigError(
            f"layer {name}: the residual is kept in one of the model and the adapter and dropped in the other: unload the loaded "
            "adapter first"
        )
    if stored.offset + stored.core_rank > layer.kept_rank:
        raise ConfigError(
            f"layer {name} keeps {layer.kept_rank} components, the adapter changes {stored.core_rank} from number "
            f"{stored.offset} on: unload the loaded adapter and load this one first"
        )


def warn_of_other_truncation(layers: Iterable[tuple[str, nn.Module, StoredLayer]], source: str) -> None:
    """Warns where layers keep another number of components than in the training of the adapter.

    Its weight changes are exact all the same, as they lie within these components; the truncated base under them is another one.

    Args:
        layers: name, module and stored layer, of all that the adapter changes.
        source: where the adapter is from.
    """
    layers = list(layers)
    others = [
        (name, module.kept_rank, stored.kept_rank)
        for name, module, stored in layers
        if isinstance(module, CersaLinear) and not stored.residual_kept and module.kept_rank != stored.kept_rank
    ]
    if others:
        name, kept, trained = others[0]
        warnings.warn(
            f"{source}: {len(others)} of {len(layers)} layers keep another number of components than in its training (e.g. "
            f"{name}: {kept} instead of {trained}): its weight changes are exact, but the truncated base under them is that of "
            "the adapter that was loaded first",
            stacklevel=3,
        )
