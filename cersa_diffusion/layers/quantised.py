"""Linear layers with quantised weights: of bitsandbytes (8 and 4 bits), of GGUF files as diffusers loads them, and of torchao.

A weight is dequantised by the function of its own library, so that it holds the numbers that the layer multiplies by. These
libraries are optional and slow to import: a class of theirs is only looked for where the library is already imported, without
which no layer can be of that class.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cersa_diffusion.private_names import DEQUANTIZE_GGUF, GGUF_LINEAR


@dataclass(frozen=True)
class QuantisedFormat:
    """How a library stores the weights of linear layers.

    Attributes:
        library: its name.
        holds: whether a layer is one of its layers.
        dequantise: the (m, n) weight of such a layer, in the floating dtype and on the device that the library chooses.
        dtype: the dtype that such a layer computes in; None: that of its input.
        tensors: everything that the weight is stored in, scales included.
        problem: why such a layer cannot be dequantised now and what to do, or None if it can.
    """

    library: str
    holds: Callable[[nn.Module], bool]
    dequantise: Callable[[nn.Module], Tensor]
    dtype: Callable[[nn.Module], torch.dtype | None]
    tensors: Callable[[nn.Module], Iterator[Tensor]]
    problem: Callable[[nn.Module], str | None] = lambda layer: None


def _is_one_of(module_name: str, *class_names: str) -> Callable[[nn.Module], bool]:
    """A function that says whether the class of a layer is exactly one of these; false while their library is not imported."""

    def holds(layer: nn.Module) -> bool:
        library = sys.modules.get(module_name)
        return any(type(layer) is getattr(library, name, None) for name in class_names)

    return holds


def _bitsandbytes():
    return sys.modules["bitsandbytes"]


NOT_YET = "it is quantised when it is moved to a device: move the model there first"


def _state_4bit(layer: nn.Module):
    # Sharded weights lose the state that the layer keeps.
    return layer.weight.quant_state or layer.quant_state


def _problem_4bit(layer: nn.Module) -> str | None:
    state = _state_4bit(layer)
    if state is None:
        return NOT_YET
    if getattr(state, "packing_format_for_cpu", False):
        return "a forward pass on this CPU has packed it in another order: load the model again and change it before it computes"
    return None


def _tensors_4bit(layer: nn.Module) -> Iterator[Tensor]:
    yield layer.weight.data
    yield from (value for value in _state_4bit(layer).as_dict().values() if isinstance(value, Tensor))


def _scales_8bit(layer: nn.Module) -> Tensor | None:
    # The first forward pass moves them from the weight to the layer.
    return layer.weight.SCB if layer.state.SCB is None else layer.state.SCB


def _dequantise_8bit(layer: nn.Module) -> Tensor:
    weight = layer.weight.data
    return _bitsandbytes().functional.int8_vectorwise_dequant(weight, _scales_8bit(layer).to(weight.device))


def _stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass consists of, by torch's protocol for such subclasses."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored_tensors(getattr(tensor, name))


def _problem_torchao(layer: nn.Module) -> str | None:
    weight_class = type(layer.weight)
    if weight_class.dequantize is torch.Tensor.dequantize:
        return f"torchao cannot dequantise its {weight_class.__name__}: quantise the model in another way"
    return None


FORMATS = (
    QuantisedFormat(
        library="bitsandbytes",
        holds=_is_one_of("bitsandbytes.nn", "Linear4bit", "LinearNF4", "LinearFP4"),
        dequantise=lambda layer: _bitsandbytes().functional.dequantize_4bit(layer.weight.data, _state_4bit(layer)),
        dtype=lambda layer: None,
        tensors=_tensors_4bit,
        problem=_problem_4bit,
    ),
    QuantisedFormat(
        library="bitsandbytes",
        holds=_is_one_of("bitsandbytes.nn", "Linear8bitLt"),
        dequantise=_dequantise_8bit,
        dtype=lambda layer: None,
        tensors=lambda layer: iter((layer.weight.data, _scales_8bit(layer))),
        problem=lambda layer: NOT_YET if layer.weight.dtype != torch.int8 else None,
    ),
    QuantisedFormat(
        library="gguf",
        holds=_is_one_of(GGUF_LINEAR.module, GGUF_LINEAR.name),
        dequantise=lambda layer: DEQUANTIZE_GGUF.get()(layer.weight),
        dtype=lambda layer: layer.compute_dtype,
        tensors=lambda layer: iter((layer.weight.as_tensor(),)),
    ),
    QuantisedFormat(
        library="torchao",
        holds=lambda layer: type(layer) is nn.Linear and type(layer.weight).__module__.partition(".")[0] == "torchao",
        dequantise=lambda layer: layer.weight.detach().dequantize(),
        dtype=lambda layer: layer.weight.dtype,
        tensors=lambda layer: _stored_tensors(layer.weight.detach()),
        problem=_problem_torchao,
    ),
)


def quantised_format(layer: nn.Module) -> QuantisedFormat | None:
    """How the weight of a layer is quantised; None for a layer that is not quantised in one of the known ways."""
    return next((form for form in FORMATS if form.holds(layer)), None)


def dequantise(layer: nn.Module) -> Tensor:
    """The (m, n) weight of a quantised layer as its own library dequantises it: a new tensor, without gradient."""
    return quantised_format(layer).dequantise(layer).detach()


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of the weight of a quantised layer as it is stored, scales included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in quantised_format(layer).tensors(layer))
