"""Bytes of one layer in training: under CERSA, under LoRA, and trained itself.

Counted is what lives through a training step: weights, gradients, optimizer state, and what the layer saves for the backward
pass. Trained tensors, their gradients and optimizer states are float32. Frozen tensors are in the compute dtype, except under
full fine-tuning, where they stay float32 as the trainer leaves them. Below float32 the step runs under autocast.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from cersa_diffusion.config import CersaConfig, LayerRanks

FLOAT32, INT64 = 4, 8


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one method: frozen and trained weights, gradients, optimizer state, and what is saved for the backward pass."""

    frozen: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of it together."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def to_dict(self) -> dict[str, int]:
        """Bytes by part, and their total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class DenseLayer:
    """What the arithmetic needs to know about a linear layer.

    Args:
        out_features: m.
        in_features: n.
        bias: whether it has one.
        dtype: compute dtype.
        rows: rows of input per step; 0 when they are not known or the layer does not run.
        input_kept: an earlier target layer keeps the same input tensor.
    """

    out_features: int
    in_features: int
    bias: bool
    dtype: torch.dtype
    rows: int = 0
    input_kept: bool = False

    @property
    def bias_size(self) -> int:
        """Numbers in the bias."""
        return self.out_features if self.bias else 0

    def dense_bytes(self) -> int:
        """Bytes of weight and bias in the compute dtype."""
        return (self.out_features * self.in_features + self.bias_size) * self.dtype.itemsize


def adamw_bytes(*shape: int) -> int:
    """State of `torch.optim.AdamW` for one tensor: two moments and the step counter."""
    return (2 * math.prod(shape) + 1) * FLOAT32


def adamw8bit_bytes(*shape: int) -> int:
    """State of `bitsandbytes.optim.AdamW8bit` for one tensor, by its source (0.50.2), not measured.

    Block-wise 8-bit moments: tensors under 4,096 numbers keep 32-bit moments; the others a byte per number and moment and a
    float32 maximum per block of 256 numbers. The two tables of 256 values that all tensors share are left out.
    """
    elements = math.prod(shape)
    moment = elements * FLOAT32 if elements < 4096 else elements + math.ceil(elements / 256) * FLOAT32
    return 2 * moment


def adafactor_bytes(*shape: int) -> int:
    """State of `torch.optim.Adafactor` for one tensor: a row and a column of variances (a vector: all), and the step counter."""
    return (sum(shape) + 1) * FLOAT32 if len(shape) > 1 else (math.prod(shape) + 1) * FLOAT32


def prodigy_bytes(*shape: int) -> int:
    """State of `prodigyopt.Prodigy` for one tensor: two moments, a sum of gradients, and the start, unless that was zero."""
    return 4 * math.prod(shape) * FLOAT32


def sgd_bytes(*shape: int) -> int:
    """State of `torch.optim.SGD` without momentum: none."""
    return 0


OPTIMIZERS: dict[str, Callable[..., int]] = {
    "adamw": adamw_bytes,
    "adamw8bit": adamw8bit_bytes,
    "adafactor": adafactor_bytes,
    "prodigy": prodigy_bytes,
    "sgd": sgd_bytes,
}


def core_shapes(rank: int, config: CersaConfig) -> list[tuple[int, ...]]:
    """Shapes of what a core trains: a matrix, its diagonal, or SVFT's entries and their gate.

    Args:
        rank: r, the components it changes.
        config: kind and pattern of the core.
    """
    if config.core == "matrix":
        return [(rank, rank)]
    if config.core == "diagonal":
        return [(rank,)]
    off = min(config.off_diagonals, rank - 1)
    return [(rank * (2 * off + 1) - off * (off + 1),), ()]


def cersa_memory(layer: DenseLayer, ranks: LayerRanks, config: CersaConfig, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a CERSA layer: U, Vh, s and a kept residual frozen, one core trained, its part of h (rows x r) saved.

    Args:
        layer: the layer that is replaced.
        ranks: k and r.
        config: kind of core, and whether the residual is kept.
        optimizer: a key of `OPTIMIZERS`.
    """
    m, n, (kept, rank), itemsize = layer.out_features, layer.in_features, ranks, layer.dtype.itemsize
    dense = m * n if config.residual == "keep" else 0
    frozen = ((m + n) * kept + dense + layer.bias_size) * itemsize + kept * FLOAT32
    shapes, saved = core_shapes(rank, config), _saved(layer, own_columns=rank)
    if config.core == "sparse":
        frozen += 2 * shapes[0][0] * INT64  # rows and columns of the entries
        if layer.rows:
            saved += rank * rank * itemsize + FLOAT32  # the matrix that the entries are put into, and the open gate
    return _memory(layer, frozen, shapes, saved, optimizer, casts=config.core == "matrix")


def lora_memory(layer: DenseLayer, rank: int, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a LoRA layer of peft without dropout: the dense weight frozen, A and B trained, x and A x saved.

    Args:
        layer: the layer that is wrapped.
        rank: rank of A and B.
        optimizer: a key of `OPTIMIZERS`.
    """
    shapes = [(rank, layer.in_features), (layer.out_features, rank)]
    return _memory(layer, layer.dense_bytes(), shapes, _saved(layer, own_columns=rank, keeps_input=True), optimizer)


def full_memory(layer: DenseLayer, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a layer whose float32 weight is trained itself, bias frozen, x saved.

    Args:
        layer: the layer.
        optimizer: a key of `OPTIMIZERS`.
    """
    shapes = [(layer.out_features, layer.in_features)]
    return _memory(layer, layer.bias_size * FLOAT32, shapes, _saved(layer, keeps_input=True), optimizer)


def is_profitable(out_features: int, in_features: int, ranks: LayerRanks, config: CersaConfig) -> bool:
    """Whether bases, core and kept residual hold fewer numbers than the dense weight: ``m k + n k + r^2 < m n`` for a matrix.

    Args:
        out_features: m.
        in_features: n.
        ranks: k and r.
        config: kind of core, and whether the residual is kept.
    """
    dense = out_features * in_features
    core = sum(math.prod(shape) for shape in core_shapes(ranks.core, config))
    residual = dense if config.residual == "keep" else 0
    return (out_features + in_features) * ranks.kept + core + residual < dense


def _saved(layer: DenseLayer, own_columns: int = 0, keeps_input: bool = False) -> int:
    # Below float32 every layer makes (peft always, autocast after a float32 operation) and keeps its own cast of the input.
    keeps_input = keeps_input and not (layer.input_kept and layer.dtype == torch.float32)
    return layer.rows * (own_columns + keeps_input * layer.in_features) * layer.dtype.itemsize


def _memory(
    layer: DenseLayer, frozen: int, trained: list[tuple[int, ...]], saved: int, optimizer: str, casts: bool = True
) -> MemoryUse:
    elements = sum(math.prod(shape) for shape in trained)
    if casts and layer.rows and layer.dtype != torch.float32:
        saved += elements * layer.dtype.itemsize  # autocast keeps its copy of the trained weights for the backward pass
    states = sum(OPTIMIZERS[optimizer](*shape) for shape in trained)
    return MemoryUse(frozen, elements * FLOAT32, elements * FLOAT32, states, saved)


@dataclass(frozen=True)
class LayerInput:
    """What a linear layer is given in one step.

    Args:
        rows: rows of input (batch times tokens).
        source: the same number for layers that are given the very same tensor, which autograd then keeps once; None: its own.
    """

    rows: int
    source: int | None = None
