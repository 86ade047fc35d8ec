"""`save_pretrained` of models with CERSA layers: dense weights, which every stock loader reads to the same outputs.

Written as they are, the factors would be unknown keys to `from_pretrained`, and the weights missing ones.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cersa_diffusion.layers.kinds import as_dense
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import replace_module


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Plain layers with the effective weights (active adapters at their strengths), in CPU memory, for the time of the block."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CersaLinear)}
    try:
        for name, layer in layers.items():
            replace_module(model, name, as_dense(layer, layer.effective_weight().cpu()))
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


def save_dense(model_class: type) -> None:
    """Makes `save_pretrained` of a class of models (of diffusers or transformers) write dense weights."""
    original = model_class.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        with dense_weights(self):
            return original(self, *args, **kwargs)

    model_class.save_pretrained = save_pretrained
