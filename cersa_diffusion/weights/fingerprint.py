"""Is this the base that an adapter was trained on? A few singular values and a few entries of every weight tell.

Singular values hardly move when a model is fine-tuned a little, single entries do: 16 of them, at fixed places, estimate by how
much a weight differs as a whole. What rounding to the dtype of either base explains is no difference.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SINGULAR_VALUES = 8
ENTRIES = 16
# How far entries may be off (root mean square, relative) by the precision of the base: rounded twice at worst, and for float32
# what no adapter would notice.
_ENTRY_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# How far singular values may be off, relative to the largest. Measured: .0002 on the embedded base in bfloat16, .0022 on MiniLM.
_VALUE_TOLERANCE = {torch.float32: 0.002, torch.float16: 0.002, torch.bfloat16: 0.01}


def base_entries(weight: Tensor) -> tuple[float, ...]:
    """16 entries of a weight (m, n), spread evenly: number i is at ``floor(frac((i + 1) * 0.6180339887498949) * m * n)``."""
    m, n = weight.shape
    places = [int((i + 1) * 0.6180339887498949 % 1.0 * (m * n)) for i in range(ENTRIES)]
    rows, columns = torch.tensor([divmod(place, n) for place in places], device=weight.device).T
    return tuple(weight.detach()[rows, columns].double().tolist())


def base_difference(
    singular_values: Tensor,
    entries: Sequence[float],
    expected_values: Sequence[float],
    expected_entries: Sequence[float],
) -> tuple[float, float]:
    """How far a weight is from the one a fingerprint was taken of.

    Args:
        singular_values: (p,) of the weight, at least as many as are expected, descending.
        entries: `base_entries` of the weight; empty when it is not at hand.
        expected_values: leading singular values in the fingerprint.
        expected_entries: entries in the fingerprint; empty when it has none.

    Returns:
        The larger relative difference (of entries or of singular values), and how many times what rounding explains it is: above
        1 it is another weight.
    """
    dtype = torch.float32
    entry_difference = value_difference = 0.0
    if entries and expected_entries:
        dtype = max(_precision(entries), _precision(expected_entries), key=_ENTRY_TOLERANCE.get)
        change = math.dist(entries, expected_entries)
        entry_difference = _ratio(change, math.hypot(*expected_entries))
    if len(expected_values) > len(singular_values):
        return math.inf, math.inf
    found = singular_values[: len(expected_values)].double().tolist()
    value_difference = _ratio(max(abs(a - b) for a, b in zip(found, expected_values, strict=True)), max(expected_values))
    excess = max(entry_difference / _ENTRY_TOLERANCE[dtype], value_difference / _VALUE_TOLERANCE[dtype])
    return max(entry_difference, value_difference), excess


def _precision(values: Sequence[float]) -> torch.dtype:
    """The narrowest dtype that holds these values exactly: a base that was rounded once stays so, whatever holds it now."""
    exact = torch.tensor(values, dtype=torch.float64)
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(exact.to(dtype).double(), exact))
    return next(narrow, torch.float32)


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (math.inf if difference else 0.0)
