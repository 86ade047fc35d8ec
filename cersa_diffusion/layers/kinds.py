"""The classes of layers that can become CERSA layers: their matrix, how to build the CERSA layer, and the way back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, Pivots, float64
from cersa_diffusion.layers.core import Core, DiagonalCore, MatrixCore, SparseCore, banded_places, random_places, top_places
from cersa_diffusion.layers.fused import Fused
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.quantised import dequantise, quantised_format
from cersa_diffusion.weights.fingerprint import base_entries
from cersa_diffusion.weights.stored import FinestWeight


class MatrixForm(NamedTuple):
    """What is known of the matrix of a layer without dequantising it.

    Attributes:
        shape: (m, n).
        dtype: the dtype that the layer computes in; None: that of its input.
        device: where its weight is.
    """

    shape: tuple[int, int]
    dtype: torch.dtype | None
    device: torch.device


@dataclass(frozen=True)
class LayerKind:
    """How layers of one class become CERSA layers and dense layers again.

    Attributes:
        matrix: returns the (m, n) matrix that the layer multiplies by.
        form: what is known of that matrix without computing it.
        cersa_class: the layer that replaces it.
        dense: makes a layer of this class from an (m, n) matrix and the bias of a CERSA layer or fused layer.
    """

    matrix: Callable[[nn.Module], Tensor]
    form: Callable[[nn.Module], MatrixForm]
    cersa_class: type[CersaLinear]
    dense: Callable[[CersaLinear | Fused, Tensor], nn.Module]


def _linear(layer: CersaLinear | Fused, matrix: Tensor) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.detach(), requires_grad=matrix.requires_grad)
    linear.bias = layer.bias
    return linear


# By exact class: subclasses (quantised layers, LoRA wrappers) store their weight in another form, and nn.MultiheadAttention
# reads the weight of its Linear subclass directly and would ignore the replacement.
KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(
        matrix=lambda layer: layer.weight,
        form=lambda layer: MatrixForm(tuple(layer.weight.shape), layer.weight.dtype, layer.weight.device),
        cersa_class=CersaLinear,
        dense=_linear,
    )
}


def _quantised_form(layer: nn.Module) -> MatrixForm:
    dtype = quantised_format(layer).dtype(layer)
    return MatrixForm((layer.out_features, layer.in_features), dtype, layer.weight.device)


# The classes of optional libraries, or plain layers whose weight is quantised: `layers.quantised` recognises them.
QUANTISED = LayerKind(matrix=dequantise, form=_quantised_form, cersa_class=CersaLinear, dense=_linear)


def can_be_factored(module: nn.Module) -> bool:
    """Whether there is a CERSA layer for this module."""
    return type(module) in KINDS or is_quantised(module)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is dequantised before it is decomposed."""
    return quantised_format(module) is not None


def matrix_of(layer: nn.Module) -> Tensor:
    """The (m, n) matrix that a dense layer multiplies by; it also accepts a subclass whose weight is a plain one.

    A quantised layer is dequantised anew for every call.
    """
    return _kind(layer).matrix(layer)


def form_of(layer: nn.Module) -> MatrixForm:
    """Shape, dtype and device of the matrix of a dense layer, which is not dequantised for it."""
    return _kind(layer).form(layer)


def _kind(layer: nn.Module) -> LayerKind:
    if is_quantised(layer):
        return QUANTISED
    return next(kind for module_class, kind in KINDS.items() if isinstance(layer, module_class))


def build_layer(
    dense: nn.Module,
    factors: Decomposition,
    kept_rank: int,
    weight: FinestWeight,
    *,
    dtype: torch.dtype,
    keep_residual: bool,
    device: torch.device | None = None,
    pivots: Pivots | None = None,
) -> CersaLinear:
    """The CERSA layer for a dense layer, without cores and not yet part of the model.

    It keeps the way back to the dense layer: a reference to its file or, if no file holds it, the weight itself in CPU memory. A
    quantised layer is kept itself, where it is: its library may store it in another form elsewhere.

    Args:
        dense: the layer to replace.
        factors: its decomposition, at least the leading `kept_rank` triplets.
        kept_rank: k.
        weight: the weight that was decomposed.
        dtype: compute dtype of the new layer. The bias is shared and stays as it is; only that of a quantised layer, which may
            have another dtype, is copied then.
        keep_residual: keep the part of the weight outside these components, frozen and dense.
        device: of the new layer; default: that of the dense layer.
        pivots: the pivots of the decomposition, if they are known.
    """
    residual, bias, quantised = None, dense.bias, is_quantised(dense)
    device = device or form_of(dense).device
    if keep_residual:
        # The cache returns tensors on the CPU.
        factors = Decomposition(*(factor.to(device) for factor in (factors.U, factors.s, factors.Vh)))
        # Computed from the bases as rounded to the compute dtype, so that bases and residual add up to the weight.
        U, Vh = (float64(basis.to(dtype)) for basis in (factors.U[:, :kept_rank], factors.Vh[:kept_rank]))
        residual = float64(matrix_of(dense).to(device)) - (U * factors.s[:kept_rank].float().double()) @ Vh
    if quantised and bias is not None and bias.dtype != dtype:
        bias = nn.Parameter(bias.detach().to(device, dtype), bias.requires_grad)
    way_back = dense if quantised else weight.stored or matrix_of(dense)
    layer = _kind(dense).cersa_class(factors, kept_rank, bias, dtype, device, way_back, residual, pivots)
    layer.base_entries = base_entries(weight.tensor)
    return layer


def new_core(name: str, config: CersaConfig, ranks: LayerRanks, factors: Decomposition) -> Core:
    """The untrained core of a layer.

    Args:
        name: name of the layer, for the error.
        config: the settings.
        ranks: k and r.
        factors: the decomposition of the layer, at least the leading k triplets.

    Raises:
        ConfigError: the pattern needs all components, but the layer keeps fewer (its weight has a lower rank).
    """
    kept, rank = ranks
    if config.core == "sparse":
        places = banded_places(kept, min(config.off_diagonals, kept - 1))
        if config.sparse_pattern == "random":
            places = random_places(kept, places.shape[1])
        elif config.sparse_pattern == "top_k":
            full = min(factors.U.shape[0], factors.Vh.shape[1])
            if kept < full:
                raise ConfigError(
                    f"layer {name} keeps {kept} components, sparse_pattern='top_k' needs all {full}: add it to exclude_modules "
                    "or set sparse_pattern='banded' or 'random'"
                )
            places = top_places(factors.U[:, :kept], factors.Vh[:kept], places.shape[1])
        return SparseCore(kept, places)
    offset = kept - rank if config.block == "bottom" else 0
    return MatrixCore(rank, offset) if config.core == "matrix" else DiagonalCore(rank, offset)


def as_dense(layer: CersaLinear | Fused, matrix: Tensor) -> nn.Module:
    """A layer of the replaced class with a dense (m, n) matrix and the bias of the CERSA layer or fused layer."""
    cersa_class = type(layer.factored if isinstance(layer, Fused) else layer)
    kind = next(kind for kind in KINDS.values() if kind.cersa_class is cersa_class)
    return kind.dense(layer, matrix)


def original_layer(
    layer: CersaLinear, replaced: Tensor | nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> nn.Module:
    """The layer that a CERSA layer replaced, bit for bit: a quantised one itself, any other one as a new layer.

    Args:
        layer: the CERSA layer.
        replaced: its attribute `replaced`.
        device: where the layer belongs.
        dtype: of a layer that is not quantised; default: its own.
    """
    if isinstance(replaced, Tensor):
        return as_dense(layer, replaced.to(device, dtype))
    return replaced if form_of(replaced).device == device else replaced.to(device)
