"""The memory in bytes that one layer needs in training: with CERSA, with LoRA, and with full fine-tuning.

The count includes what is in memory during the whole training step: weights, gradients, optimizer state, and the tensors that
the layer saves for the backward pass. Trained tensors, their gradients and their optimizer states are float32. Frozen tensors
have the compute dtype, except in full fine-tuning, where the trainer keeps them in float32. With a compute dtype below float32
the step runs under autocast.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from cersa_diffusion.config import CersaConfig, LayerRanks

FLOAT32, FLOAT64, INT64 = 4, 8, 8


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one method: frozen and trained weights, gradients, optimizer state, and tensors saved for the backward pass."""

    frozen: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts in bytes."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def to_dict(self) -> dict[str, int]:
        """Bytes of each part, and their total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class DenseLayer:
    """What the formulas need to know about a linear layer.

    Args:
        out_features, in_features: m and n.
        bias: whether the layer has a bias.
        dtype: compute dtype.
        rows: rows of input in one step; 0 if unknown or if the layer does not run.
        input_kept: an earlier target layer already keeps the same input tensor.
        quantised_bytes: bytes of the weight as it is stored if it is quantised; None: it is stored in the compute dtype.
    """

    out_features: int
    in_features: int
    bias: bool
    dtype: torch.dtype
    rows: int = 0
    input_kept: bool = False
    quantised_bytes: int | None = None

    @property
    def bias_size(self) -> int:
        """Numbers in the bias."""
        return self.out_features if self.bias else 0

    def dense_bytes(self) -> int:
        """Bytes of the frozen layer: of its weight as it is stored, and of its bias in the compute dtype."""
        weight = self.out_features * self.in_features * self.dtype.itemsize
        return (weight if self.quantised_bytes is None else self.quantised_bytes) + self.bias_size * self.dtype.itemsize


def adamw_bytes(*shape: int) -> int:
    """State of `torch.optim.AdamW` for one tensor: two moments and the step counter."""
    return (2 * math.prod(shape) + 1) * FLOAT32


def adamw8bit_bytes(*shape: int) -> int:
    """State of `bitsandbytes.optim.AdamW8bit` for one tensor, according to its source code (0.50.2); not measured.

    The moments are block-wise 8-bit: a tensor with fewer than 4,096 numbers keeps 32-bit moments, any other one byte per number
    and moment and a float32 maximum per block of 256 numbers. The two tables of 256 values for all tensors are not counted.
    """
    elements = math.prod(shape)
    moment = elements * FLOAT32 if elements < 4096 else elements + math.ceil(elements / 256) * FLOAT32
    return 2 * moment


def adafactor_bytes(*shape: int) -> int:
    """State of `torch.optim.Adafactor` for one tensor: variances of rows and columns (of a vector: all), and the step counter."""
    return ((sum(shape) if len(shape) > 1 else math.prod(shape)) + 1) * FLOAT32


def prodigy_bytes(*shape: int) -> int:
    """State of `prodigyopt.Prodigy` for one tensor: two moments, a sum of gradients, and the initial value if it is not zero."""
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
    """Shapes of the trained tensors of a core of rank r: a matrix, its diagonal, or SVFT's entries and their gate."""
    if config.core == "matrix":
        return [(rank, rank)]
    if config.core == "diagonal":
        return [(rank,)]
    off = min(config.off_diagonals, rank - 1)
    return [(rank * (2 * off + 1) - off * (off + 1),), ()]


def cersa_memory(layer: DenseLayer, ranks: LayerRanks, config: CersaConfig, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a CERSA layer: U, Vh, s and a kept residual are frozen, one core is trained, its part of h (rows x r) is saved.

    Args:
        layer: the dense layer that is replaced.
        ranks: k and r.
        config: kind of core, and whether the residual is kept.
        optimizer: a key of `OPTIMIZERS`.
    """
    m, n, (kept, rank), itemsize = layer.out_features, layer.in_features, ranks, layer.dtype.itemsize
    dense = m * n if config.residual == "keep" else 0
    frozen = ((m + n) * kept + dense + layer.bias_size) * itemsize + kept * FLOAT32
    shapes, saved = core_shapes(rank, config), _saved_bytes(layer, hidden_columns=rank)
    if config.core == "sparse":
        frozen += 2 * shapes[0][0] * INT64  # rows and columns of the entries
        if layer.rows:
            saved += rank * rank * itemsize + FLOAT32  # the matrix that the entries are written into, and the open gate
    return _memory(layer, frozen, shapes, saved, optimizer, casts=config.core == "matrix")


def lora_memory(layer: DenseLayer, rank: int, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a LoRA layer of peft without dropout: the dense weight is frozen, A and B are trained, x and A x are saved."""
    shapes = [(rank, layer.in_features), (layer.out_features, rank)]
    return _memory(layer, layer.dense_bytes(), shapes, _saved_bytes(layer, hidden_columns=rank, keeps_input=True), optimizer)


def full_memory(layer: DenseLayer, optimizer: str = "adamw") -> MemoryUse:
    """Bytes of a layer in full fine-tuning: the float32 weight is trained, the bias is frozen, x is saved."""
    shapes = [(layer.out_features, layer.in_features)]
    return _memory(layer, layer.bias_size * FLOAT32, shapes, _saved_bytes(layer, keeps_input=True), optimizer)


def is_profitable(out_features: int, in_features: int, ranks: LayerRanks, config: CersaConfig) -> bool:
    """Whether bases, core and kept residual hold fewer numbers than the dense weight: ``m k + n k + r^2 < m n`` for a matrix.

    Args:
        out_features, in_features: m and n.
        ranks: k and r.
        config: kind of core, and whether the residual is kept.
    """
    dense = out_features * in_features
    core = sum(math.prod(shape) for shape in core_shapes(ranks.core, config))
    residual = dense if config.residual == "keep" else 0
    return (out_features + in_features) * ranks.kept + core + residual < dense


def _saved_bytes(layer: DenseLayer, hidden_columns: int = 0, keeps_input: bool = False) -> int:
    # Below float32 every layer makes its own cast of the input (peft always, autocast after a float32 operation) and keeps it.
    keeps_input = keeps_input and not (layer.input_kept and layer.dtype == torch.float32)
    return layer.rows * (hidden_columns + keeps_input * layer.in_features) * layer.dtype.itemsize


def _memory(
    layer: DenseLayer, frozen: int, trained: list[tuple[int, ...]], saved: int, optimizer: str, casts: bool = True
) -> MemoryUse:
    elements = sum(math.prod(shape) for shape in trained)
    if casts and layer.rows and layer.dtype != torch.float32:
        saved += elements * layer.dtype.itemsize  # autocast keeps its cast of the trained weights for the backward pass
    states = sum(OPTIMIZERS[optimizer](*shape) for shape in trained)
    return MemoryUse(frozen, elements * FLOAT32, elements * FLOAT32, states, saved)


def solver_bytes(out_features: int, in_features: int) -> int:
    """Bytes that one decomposition takes while it runs (`functional.decompose`, by the Gram matrix), all in float64.

    The weight, a product with the eigenvectors, and that product scaled; the Gram matrix, its eigenvectors, and their copy in
    descending order.
    """
    return FLOAT64 * (3 * out_features * in_features + 3 * min(out_features, in_features) ** 2)


@dataclass(frozen=True)
class LayerInput:
    """The input of a linear layer in one step.

    Args:
        rows: rows of input (batch times tokens).
        source: equal for layers that receive the same tensor, which autograd then keeps only once; None: no shared tensor.
    """

    rows: int
    source: int | None = None
