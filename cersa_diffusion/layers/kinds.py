"""Building the CERSA layer of a linear layer, and the way back."""

import torch
from torch import nn

from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, Pivots, float64
from cersa_diffusion.layers.core import Core, DiagonalCore, MatrixCore, SparseCore, banded_places, random_places, top_places
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.weights.fingerprint import base_entries
from cersa_diffusion.weights.stored import StoredWeight, finest_weight


def replacement(
    linear: nn.Linear,
    factors: Decomposition,
    kept_rank: int,
    *,
    keep_residual: bool,
    keep_base: bool,
    stored: StoredWeight | None = None,
    pivots: Pivots | None = None,
) -> CersaLinear:
    """The CERSA layer for a linear layer, not yet in its place and without cores.

    Args:
        linear: the layer to replace.
        factors: its decomposition, at least the leading `kept_rank` triplets.
        kept_rank: k.
        keep_residual: keep the part of the weight outside these components, frozen and dense.
        keep_base: keep the weight for `restore_base`: in CPU memory, unless it can be read again from its checkpoint.
        stored: where the checkpoint has the weight, if it has.
        pivots: of the decomposition, where they are known.
    """
    weight, residual = linear.weight, None
    if keep_residual:
        # From the cache they come on the CPU.
        factors = Decomposition(*(factor.to(weight.device) for factor in (factors.U, factors.s, factors.Vh)))
        # What the bases do not hold after they were rounded to the compute dtype: together they are the weight again.
        U, Vh = (float64(basis.to(weight.dtype)) for basis in (factors.U[:, :kept_rank], factors.Vh[:kept_rank]))
        residual = float64(weight) - (U * factors.s[:kept_rank].float().double()) @ Vh
    dense_weight = (stored or weight) if keep_base else None
    layer = CersaLinear(factors, kept_rank, linear.bias, weight.dtype, weight.device, dense_weight, residual, pivots)
    layer.base_entries = base_entries(finest_weight(weight, stored))
    return layer


def new_core(name: str, config: CersaConfig, ranks: LayerRanks, factors: Decomposition) -> Core:
    """The untrained core of a layer.

    Args:
        name: of the layer, for the error.
        config: the settings.
        ranks: k and r.
        factors: the layer's decomposition, at least the leading k triplets.

    Raises:
        ConfigError: the pattern needs all components, and the layer keeps fewer (its weight has a lower rank).
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


def as_linear(layer: CersaLinear, weight: torch.Tensor) -> nn.Linear:
    """A plain layer with a dense (m, n) weight and the bias of a CERSA layer."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    linear.bias = layer.bias
    return linear
