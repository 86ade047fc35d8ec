"""`save_pretrained` of models with CERSA layers: it writes dense weights, and `from_pretrained` loads a model with equal outputs.

`from_pretrained` would not recognise the keys of the factors, and would report the weights as missing.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.fused import FusedFactors
from cersa_diffusion.layers.kinds import as_dense
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import replace_module


@contextmanager
def dense_layers(
    model: nn.Module,
    layers: Mapping[str, CersaLinear | FusedFactors],
    weight: Callable[[str, CersaLinear | FusedFactors], Tensor],
) -> Iterator[None]:
    """Replaces layers of a model by dense layers during the block.

    Args:
        model: the model.
        layers: name -> the layer there; for a fused layer, it or the CERSA layer in it.
        weight: (name, layer) -> dense weight.
    """
    present = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, as_dense(layer, weight(name, layer)))
        yield
    finally:
        for name, module in present.items():
            replace_module(model, name, module)


def save_dense(model_class: type) -> None:
    """Makes `save_pretrained` of a model class (of diffusers or transformers) write dense weights.

    They are the effective weights: the active adapters at their strengths. A model that was loaded quantised is refused: it would
    be loaded quantised again, with other outputs or not at all.
    """
    original = model_class.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        layers = {name: module for name, module in self.named_modules() if isinstance(module, CersaLinear | FusedFactors)}
        if layers and getattr(self, "hf_quantizer", None) is not None:
            raise ConfigError(
                f"{type(self).__name__} was loaded quantised, so that its CERSA layers cannot be saved as dense weights: save "
                "the adapter instead (save_cersa_weights, save_adapter)"
            )
        with dense_layers(self, layers, lambda _name, layer: layer.effective_weight().cpu()):
            return original(self, *args, **kwargs)

    model_class.save_pretrained = save_pretrained
