"""The fingerprint of a base model: a few singular values and entries of every weight, stored in every adapter file.

A little fine-tuning hardly changes singular values, but it changes single entries: 16 of them, at fixed positions, estimate the
difference of the whole weight. A difference that rounding to the dtype of either base can explain is ignored.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SINGULAR_VALUES = 8
ENTRIES = 16
# Largest relative difference of the entries (root mean square) for each precision of the base: two roundings at worst; for
# float32 a difference that does not affect an adapter.
_ENTRY_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Largest difference of the singular values, relative to the largest of them. Measured: 0.0002 on the embedded base in bfloat16,
# 0.0022 on MiniLM.
_VALUE_TOLERANCE = {torch.float32: 0.002, torch.float16: 0.002, torch.bfloat16: 0.01}


def base_entries(weight: Tensor) -> tuple[float, ...]:
    """16 evenly spread entries of a weight (m, n): entry i is at ``floor(frac((i + 1) * 0.6180339887498949) * m * n)``."""
    m, n = weight.shape
    positions = [int((i + 1) * 0.6180339887498949 % 1.0 * (m * n)) for i in range(ENTRIES)]
    rows, columns = torch.tensor([divmod(position, n) for position in positions], device=weight.device).T
    return tuple(weight.detach()[rows, columns].double().tolist())


def base_difference(
    singular_values: Tensor, entries: Sequence[float], expected_values: Sequence[float], expected_entries: Sequence[float]
) -> tuple[float, float]:
    """The difference between a weight and a fingerprint.

    Args:
        singular_values: (p,) of the weight, descending.
        entries: `base_entries` of the weight; empty if they are unknown.
        expected_values: leading singular values in the fingerprint; if they are more than p, the difference is infinite.
        expected_entries: entries in the fingerprint; empty if it has none.

    Returns:
        The larger relative difference (of entries or of singular values), and the larger ratio of a difference to its
        tolerance: above 1 the weight is another one.
    """
    if len(expected_values) > len(singular_values):
        return math.inf, math.inf
    dtype, entry_difference = torch.float32, 0.0
    if entries and expected_entries:
        dtype = max(_precision(entries), _precision(expected_entries), key=_ENTRY_TOLERANCE.get)
        entry_difference = relative(math.dist(entries, expected_entries), math.hypot(*expected_entries))
    values = singular_values[: len(expected_values)].double().tolist()
    value_difference = relative(max(abs(a - b) for a, b in zip(values, expected_values, strict=True)), max(expected_values))
    excess = max(entry_difference / _ENTRY_TOLERANCE[dtype], value_difference / _VALUE_TOLERANCE[dtype])
    return max(entry_difference, value_difference), excess


def _precision(values: Sequence[float]) -> torch.dtype:
    """The narrowest dtype that holds these values exactly: it shows whether the base was rounded before, in whatever dtype."""
    exact = torch.tensor(values, dtype=torch.float64)
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(exact.to(dtype).double(), exact))
    return next(narrow, torch.float32)


def relative(difference: float, size: float) -> float:
    """A difference divided by a size; infinity for a difference from size 0."""
    return difference / size if size else (math.inf if difference else 0.0)
