"""The layers of a model: selecting them by name, checking whether they can be decomposed, finding and replacing them."""

import math
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from cersa_diffusion.errors import CersaError, ConfigError, NonFiniteError
from cersa_diffusion.layers.factored import FactoredLinear
from cersa_diffusion.layers.fused import Fused
from cersa_diffusion.layers.kinds import KINDS, can_be_factored, form_of, is_quantised, matrix_of, original_layer
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.quantised import quantised_format
from cersa_diffusion.weights.stored import Checkpoint, FinestWeight

# Dtypes of plain weights with enough digits for a decomposition; dtypes with fewer bits are quantised and need separate scales.
DECOMPOSABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of a model, in model order, without the modules inside of CERSA layers."""
    factored = (module for module in model.modules() if isinstance(module, FactoredLinear))
    inside = {part for layer in factored for part in layer.modules() if part is not layer}
    return {name: module for name, module in model.named_modules() if module not in inside}


def match_targets(
    model: nn.Module, target_modules: str | list[str], exclude_modules: str | list[str] | None = None
) -> dict[str, nn.Module]:
    """The layers that a target specification selects, in model order.

    Args:
        model: any torch model.
        target_modules: "all-linear", a regular expression for whole names, or name endings ("to_q", "attn1.to_k").
        exclude_modules: the same forms without "all-linear".

    Returns:
        Module name -> layer, of the classes in `KINDS` or quantised.

    Raises:
        ConfigError: no layer matches; the message lists the endings of all possible layers.
    """
    candidates = {name: module for name, module in named_layers(model).items() if can_be_factored(module)}
    targets = {
        name: module
        for name, module in candidates.items()
        if (target_modules == "all-linear" or name_matches(name, target_modules))
        and not (exclude_modules and name_matches(name, exclude_modules))
    }
    if not targets:
        endings = sorted({name.rsplit(".", 1)[-1] for name in candidates})
        replaced = sum(isinstance(module, CersaLinear) for module in model.modules())
        hint = f"; {replaced} layers are already CERSA layers: add_adapter adds an adapter to them" if replaced else ""
        others = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}
        others -= {type(module).__name__ for module in (*candidates.values(), *installed_layers(model).values())}
        hint += f"; layers of the classes {sorted(others)} cannot be decomposed" if others else ""
        raise ConfigError(
            f"target_modules={target_modules!r} matches no nn.Linear of {type(model).__name__}: "
            f"its linear layers end in {endings}{hint}"
        )
    return targets


def name_matches(name: str, pattern: str | list[str]) -> bool:
    """Whether a layer's name matches a regular expression for whole names, or one of a list of name endings."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in pattern)


def check_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Refuses layers that cannot be decomposed. Quantised layers are dequantised for it, one at a time.

    Raises:
        ConfigError: a weight is on the meta device, is quantised in an unknown way or cannot be dequantised now, or is shared by
            two modules.
        NonFiniteError: a weight holds NaN or infinity.
    """
    for name, layer in layers.items():
        if isinstance(layer, Fused):
            raise ConfigError(f"layer {name} is fused: call unfuse_cersa() (or cersa_diffusion.unfuse) first, or merge")
    check_untied(model, layers)
    for name, layer in layers.items():
        weight, form = layer.weight, quantised_format(layer)
        if weight.is_meta:
            raise ConfigError(f"layer {name} is on the meta device: load the weights before injecting")
        if form is None and (weight.dtype not in DECOMPOSABLE or type(weight) not in (torch.Tensor, nn.Parameter)):
            raise ConfigError(
                f"layer {name} holds a {type(weight).__name__} of {weight.dtype}, expected a plain weight in one of "
                f"{', '.join(str(dtype) for dtype in DECOMPOSABLE)}, or one quantised by bitsandbytes, gguf or torchao: "
                "dequantise it (without layerwise casting) or exclude it"
            )
        problem = form and form.problem(layer)
        if problem:
            raise ConfigError(f"layer {name} ({type(layer).__name__} of {form.library}) cannot be dequantised: {problem}")
        # The extremes pass NaN on, and one pass over the weight needs no memory.
        if not all(map(math.isfinite, torch.stack(matrix_of(layer).detach().aminmax()).tolist())):
            raise NonFiniteError(f"layer {name} holds NaN or infinity: this checkpoint is damaged")


def check_untied(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raises ConfigError for a layer whose weight is also a parameter of another module, and names all these parameters."""
    parameter_names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        parameter_names.setdefault(id(parameter), []).append(parameter_name)
    for name, layer in layers.items():
        sharing = parameter_names[id(layer.weight)]
        if len(sharing) > 1:
            raise ConfigError(f"layer {name} shares its weight with {sharing}: untie it or add it to exclude_modules")


def finest_matrix(model: nn.Module, name: str, checkpoint: Checkpoint) -> FinestWeight:
    """The matrix of a dense layer with the most exact numbers that memory and checkpoint hold.

    Looked up by name, so that a caller need not hold the layer until then. A quantised layer multiplies by its own numbers, not
    by those of a checkpoint.
    """
    layer = model.get_submodule(name)
    return FinestWeight(matrix_of(layer).cpu()) if is_quantised(layer) else checkpoint.finest(name, matrix_of(layer))


def compute_dtype(model: nn.Module, layer: nn.Module) -> torch.dtype:
    """The dtype that a dense layer computes in; for a quantised layer that takes any, the dtype of the rest of the model."""
    return form_of(layer).dtype or _dtype_outside_quantised_layers(model)


def _dtype_outside_quantised_layers(model: nn.Module) -> torch.dtype:
    others = (module for module in model.modules() if not is_quantised(module))
    parameters = (parameter for module in others for parameter in module.parameters(recurse=False))
    # The biases of quantised layers come last: their layers may cast them.
    biases = (module.bias for module in model.modules() if is_quantised(module) and module.bias is not None)
    floating = (parameter.dtype for parameter in chain(parameters, biases) if parameter.is_floating_point())
    return next(floating, torch.get_default_dtype())


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule of this name by another module, which takes over the training mode."""
    parent_name, _, child_name = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module.train(getattr(parent, child_name).training)
    setattr(parent, child_name, module)


def installed_layers(model: nn.Module) -> dict[str, CersaLinear | Fused]:
    """Name -> module of all CERSA layers and fused layers of a model, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CersaLinear | Fused)}


def cersa_layers(model: nn.Module) -> dict[str, CersaLinear]:
    """Name -> layer of all CERSA layers of a model, in model order; a fused layer is represented by the CERSA layer in it."""
    modules = installed_layers(model)
    return {name: module.factored if isinstance(module, Fused) else module for name, module in modules.items()}


def layers_by_key(components: Mapping[str, nn.Module]) -> dict[str, CersaLinear]:
    """ "component.name" -> layer of all CERSA layers of several models."""
    models = components.items()
    return {f"{component}.{name}": layer for component, model in models for name, layer in cersa_layers(model).items()}


def fused_layers(model: nn.Module) -> dict[str, Fused]:
    """Name -> layer of all fused layers of a model, in model order."""
    return {name: module for name, module in installed_layers(model).items() if isinstance(module, Fused)}


def placement(layer: CersaLinear | Fused) -> tuple[torch.device, torch.dtype]:
    """The device and the compute dtype of a CERSA layer or of a fused one."""
    weight = layer.U if isinstance(layer, FactoredLinear) else layer.weight
    return weight.device, weight.dtype


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for the optimizer: those that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


LONE_COMPONENT = "model"


def components_of(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The components of a pipeline by name; a single model becomes the only component."""
    return {LONE_COMPONENT: model} if isinstance(model, nn.Module) else dict(model)


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """Undoes the changes of the block to layers, cores and strengths of the models if it raises (an interrupt included).

    The tensors themselves are not copied: operations that write into cores must undo this themselves. The dense layers that the
    block replaces are not held, so that their memory is free at once: the CERSA layers in their place know the way back.
    """
    classes = (*KINDS, CersaLinear, Fused)
    present = [
        (model, name, module) for model in models for name, module in named_layers(model).items() if isinstance(module, classes)
    ]
    dense = [_DenseLayer(*layer) for layer in present if can_be_factored(layer[2])]
    modules = [layer for layer in present if not can_be_factored(layer[2])]
    del present
    layers = [layer for model in models for layer in cersa_layers(model).values()]
    states = [(layer, dict(layer.cores.items()), dict(layer.strengths), layer.enabled) for layer in layers]
    try:
        yield
    except BaseException:
        for model, name, module in modules:
            if model.get_submodule(name) is not module:
                replace_module(model, name, module)
        for layer, cores, strengths, enabled in states:
            layer.cores = nn.ModuleDict(cores)
            layer.strengths, layer.enabled = strengths, enabled
        for layer in dense:
            layer.put_back()
        raise


class _DenseLayer:
    """A dense layer of a model, without holding it."""

    def __init__(self, model: nn.Module, name: str, module: nn.Module):
        self.model, self.name, self.module, self.device = model, name, weakref.ref(module), form_of(module).device

    def put_back(self) -> None:
        """Puts the layer back in its place: the module itself if somebody still holds it, else one with its weight."""
        current, module = self.model.get_submodule(self.name), self.module()
        if current is module or (module is None and can_be_factored(current)):
            return  # an inner block has put it back
        if module is None:
            replaced = current.replaced
            if replaced is None:
                raise CersaError(
                    f"layer {self.name} cannot be put back, because the file of its weight has changed: load the model again"
                )
            module = original_layer(current, replaced, self.device)
        replace_module(self.model, self.name, module)
