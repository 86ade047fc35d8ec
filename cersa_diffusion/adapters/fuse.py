"""Fusing: dense weights in the place of CERSA layers, and back, bit for bit.

A fused model runs at the speed of the dense one and is plain to other libraries (a LoRA can go on top of it); it holds the dense
weights beside the factors. `cersa_diffusion.merge` is the way without return.
"""

from collections.abc import Sequence

import torch
from torch import nn

from cersa_diffusion.adapters.compose import active_adapters, adapter_names, check_names, refuse_fused
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.layers.linear import CersaLinear, FusedLinear
from cersa_diffusion.layers.model import all_or_nothing, cersa_layers, fused_layers, replace_module


def fuse(model: nn.Module, names: str | Sequence[str] | None = None, *, scale: float = 1.0, safe: bool = False) -> None:
    """Puts dense weights in the place of all CERSA layers of a model.

    All or nothing. The adapters cannot be changed before `unfuse`.

    Args:
        model: an injected model; changed in place.
        names: the adapters that go into the weights, each at its strength; all active ones when left out.
        scale: factor of all of them.
        safe: refuse weights that hold NaN or infinity.

    Raises:
        ConfigError: nothing to fuse, fused already, or an adapter that is unknown or not active.
        NonFiniteError: `safe` and a layer's weight would hold NaN or infinity.
    """
    refuse_fused(model)
    if not cersa_layers(model):
        raise ConfigError(f"{type(model).__name__} has no CERSA layers to fuse: load or inject an adapter first")
    chosen = check_fusable(model, names)
    with all_or_nothing(model):
        for name, layer in cersa_layers(model).items():
            weight = layer.effective_weight(_strengths(layer, chosen, scale))
            if safe and not torch.isfinite(weight).all():
                raise NonFiniteError(f"layer {name}: fused, it would hold NaN or infinity; nothing was fused (safe_fusing)")
            replace_module(model, name, FusedLinear(layer, weight))


def unfuse(model: nn.Module) -> None:
    """Puts the CERSA layers of a fused model back, bit for bit; does nothing where nothing is fused.

    Raises:
        ConfigError: a LoRA was loaded on a fused layer; the model is left as it is.
    """
    refuse_lora_on_fused(model)
    with all_or_nothing(model):
        for name, fused in fused_layers(model).items():
            # Both may have changed while the factors were out of the model's reach.
            replace_module(model, name, fused.factored.to(fused.weight.device, fused.weight.dtype))


def refuse_lora_on_fused(model: nn.Module) -> None:
    """Raises ConfigError where peft has wrapped a fused layer: what lies under a LoRA must not be replaced."""
    wrapped = [name for name in fused_layers(model) if name.endswith(".base_layer")]
    if wrapped:
        raise ConfigError(f"{len(wrapped)} fused layers carry a LoRA, e.g. {wrapped[0]}: call unload_lora_weights() first")


def check_fusable(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    """The adapters that `fuse` would take.

    Raises:
        ConfigError: an adapter that is unknown or not active, or none is active.
    """
    active = active_adapters(model)
    if names is None:
        if not active:
            raise ConfigError(f"no active adapter to fuse, this model has {adapter_names(model)}: set or enable adapters first")
        return list(active)
    names = [names] if isinstance(names, str) else list(names)
    check_names(model, names)
    for name in names:
        if name not in active:
            raise ConfigError(f"adapter {name!r} is not active (active: {list(active)}): set its strength before fusing it")
    return names


def _strengths(layer: CersaLinear, chosen: list[str], scale: float) -> dict[str, float]:
    return {name: strength * scale for name, strength in layer.strengths.items() if name in chosen}
