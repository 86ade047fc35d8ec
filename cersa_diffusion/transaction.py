"""All or nothing: a model whose layers and adapters are as before when an operation fails halfway."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cersa_diffusion.inject import cersa_layers, replace_module
from cersa_diffusion.linear import CersaLinear, FusedLinear


@contextmanager
def all_or_nothing(*models: nn.Module) -> Iterator[None]:
    """Undoes what the block did to layers, cores and strengths when it raises (an interrupt included).

    The tensors themselves are not copied: operations that write into cores undo that themselves.

    Args:
        models: the models that the block changes.
    """
    kinds = nn.Linear | CersaLinear | FusedLinear
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
