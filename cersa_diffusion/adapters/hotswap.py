"""Hot-swapping: copying an adapter into the cores of a loaded one, without new layers, new shapes or a new compilation."""

from collections.abc import Mapping

import torch
from torch import nn

from cersa_diffusion.adapters.file import AdapterFile
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.core import Core, MatrixCore
from cersa_diffusion.layers.model import all_or_nothing, layers_by_key

_INCOMING = "incoming hotswap"


def hotswap_adapter(
    components: Mapping[str, nn.Module], adapter: AdapterFile, adapter_name: str, *, strength: float = 1.0, **settings
) -> None:
    """Copies an adapter into the cores of a loaded one; smaller cores are padded with zeros. All or nothing.

    Args:
        components: the models by name, with a loaded adapter.
        adapter: the adapter to copy.
        adapter_name: the name of the loaded adapter.
        strength: the new strength.
        settings: further arguments of `cersa_diffusion.load_adapter`.

    Raises:
        ConfigError: the new adapter changes layers or components that the loaded one does not change.
        AdapterFormatError, BaseMismatchError, NonFiniteError: see `cersa_diffusion.load_adapter`.
    """
    layers = layers_by_key(components)
    with all_or_nothing(*components.values()):
        load_adapter(components, adapter, adapter_name=_INCOMING, strength=0.0, **settings)
        incoming = {}
        for key, layer in layers_by_key(components).items():
            if _INCOMING in layer.cores:
                incoming[key] = layer.cores[_INCOMING]
                layer.delete_core(_INCOMING)
        loaded = {key: layer for key, layer in layers.items() if adapter_name in layer.cores}
        for key, core in incoming.items():
            _check_fit(key, core, loaded[key].cores[adapter_name] if key in loaded else None)
    for key, layer in loaded.items():
        _copy(layer.cores[adapter_name], incoming.get(key))
        layer.strengths[adapter_name] = strength


def _check_fit(key: str, new: Core, old: Core | None) -> None:
    remedy = "load it under another adapter_name instead of hotswap=True"
    if old is None:
        raise ConfigError(f"layer {key}: the new adapter changes it, but the loaded one does not: {remedy}")
    if not isinstance(old, MatrixCore):
        raise ConfigError(f"layer {key}: the loaded adapter has a {old.kind} core, but the new one is a matrix: {remedy}")
    if new.offset < old.offset or new.offset + new.rank > old.offset + old.rank:
        raise ConfigError(
            f"layer {key}: the loaded adapter changes components {old.offset} to {old.offset + old.rank - 1}, the new one "
            f"{new.offset} to {new.offset + new.rank - 1}: {remedy}"
        )


def _copy(old: MatrixCore, new: Core | None) -> None:
    with torch.no_grad():
        old.D.zero_()
        if new is not None:
            start = new.offset - old.offset
            old.D[start : start + new.rank, start : start + new.rank] = new.dense()
            old.facts, old.trained_kept_rank = new.facts, new.trained_kept_rank
