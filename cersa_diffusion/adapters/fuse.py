"""Fusing: replacing CERSA layers by layers that compute faster, and the exact way back. `cersa_diffusion.merge` has none.

The dense form has the speed of the dense model, and other libraries see plain layers (a LoRA can be added to them). It holds the
dense weights in addition to the factors. The factored form is two products of thin matrices, fewer operations than the dense
form where the rank is low; it holds one of the two factors twice, the smaller one.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from cersa_diffusion.adapters.compose import active_adapters, adapter_names, check_names, refuse_fused
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.layers.fused import FusedFactors, FusedLinear
from cersa_diffusion.layers.model import all_or_nothing, cersa_layers, fused_layers, placement, replace_module

Form = Literal["dense", "factors"]
_CLASSES = {"dense": FusedLinear, "factors": FusedFactors}


def fuse(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    form: Form = "dense",
    scale: float = 1.0,
    safe: bool = False,
) -> None:
    """Replaces all CERSA layers of a model by dense weights, or by two factors of which one holds the change.

    All or nothing. The adapters cannot be changed before `unfuse`.

    Args:
        model: an injected model; changed in place.
        names: the adapters to add to the weights, each with its strength; default: all active ones.
        form: "dense" for one (m, n) weight a layer, or "factors" for two thin ones.
        scale: a further factor for all of them.
        safe: refuse weights that hold NaN or infinity.

    Raises:
        ConfigError: there is nothing to fuse, the model is already fused, an adapter is unknown or not active, or there is no
            such form.
        NonFiniteError: `safe` is set and the weight of a layer would hold NaN or infinity.
    """
    check_form(form)
    refuse_fused(model)
    layers = cersa_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no CERSA layers to fuse: load or inject an adapter first")
    fused_names = check_fusable(model, names)
    with all_or_nothing(model):
        for layer_name, layer in layers.items():
            strengths = {name: strength * scale for name, strength in layer.strengths.items() if name in fused_names}
            fused = _CLASSES[form](layer, strengths)
            if safe and not torch.isfinite(fused.changed_weight).all():
                raise NonFiniteError(
                    f"layer {layer_name}: the fused weight would hold NaN or infinity, nothing was fused (safe_fusing)"
                )
            replace_module(model, layer_name, fused)


def unfuse(model: nn.Module) -> None:
    """Puts back the CERSA layers of a fused model, bit for bit; does nothing if no layer is fused.

    Raises:
        ConfigError: a fused layer carries a LoRA; the model is not changed.
    """
    refuse_lora_on_fused(model)
    with all_or_nothing(model):
        for name, fused in fused_layers(model).items():
            # The model may have changed its device and dtype while the factors were not part of it.
            replace_module(model, name, fused.factored.to(*placement(fused)))


def check_form(form: str) -> None:
    """Raises ConfigError if layers cannot be fused into this form."""
    if form not in _CLASSES:
        raise ConfigError(f"form is {form!r}, expected one of {list(_CLASSES)}")


def refuse_lora_on_fused(model: nn.Module) -> None:
    """Raises ConfigError if peft has wrapped a fused layer, because the layer under a LoRA must not be replaced."""
    wrapped = [name for name in fused_layers(model) if name.endswith(".base_layer")]
    if wrapped:
        raise ConfigError(f"{len(wrapped)} fused layers carry a LoRA, e.g. {wrapped[0]}: call unload_lora_weights() first")


def check_fusable(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    """The names of the adapters that `fuse` would use.

    Raises:
        ConfigError: an adapter is unknown or not active, or no adapter is active.
    """
    active = active_adapters(model)
    if names is None:
        if not active:
            raise ConfigError(f"no active adapter to fuse, this model has {adapter_names(model)}: set or enable adapters first")
        return list(active)
    names = check_names(model, names)
    for name in names:
        if name not in active:
            raise ConfigError(f"adapter {name!r} is not active (active: {list(active)}): set its strength before fusing it")
    return names
