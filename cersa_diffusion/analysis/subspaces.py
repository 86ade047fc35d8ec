"""The mathematics of the analyses: similarity of subspaces, intruder dimensions, forgetting.

A basis is a matrix with orthonormal columns in the order of their singular values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.functional import decompose, float64


class Bases(NamedTuple):
    """(m, r) and (n, r) leading singular vectors of a weight, and all its singular values."""

    U: Tensor
    V: Tensor
    s: Tensor


def subspace_similarity(A: Tensor, B: Tensor) -> float:
    """Grassmann similarity ``psi = |A^T B|_F^2 / min(i, j)`` (CERSA, Eq. 3).

    Args:
        A: (m, i) orthonormal columns.
        B: (m, j) orthonormal columns.

    Returns:
        A share in [0, 1]: 1 if one subspace contains the other, 0 if they are orthogonal.

    Raises:
        ConfigError: a basis has no columns, or the numbers of rows differ.
        NonFiniteError: a basis holds NaN or infinity.
    """
    overlap = _overlap(A, B)
    return min(1.0, float(overlap.square().sum()) / min(overlap.shape))


def similarity_grid(A: Tensor, B: Tensor) -> Tensor:
    """psi of the leading i columns of one basis and the leading j columns of another, for all i and j at once.

    Args:
        A: (m, p) orthonormal columns.
        B: (m, q) orthonormal columns.

    Returns:
        (p, q) float64; entry [i - 1, j - 1] is ``subspace_similarity(A[:, :i], B[:, :j])``.

    Raises:
        ConfigError, NonFiniteError: as `subspace_similarity`.
    """
    overlap = _overlap(A, B)
    sums = overlap.square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=sums.device) for size in sums.shape)
    return (sums / torch.minimum(i[:, None], j[None, :])).clamp_max(1.0)


def best_cosines(pretrained: Tensor, tuned: Tensor) -> Tensor:
    """For each singular vector of a tuned weight, its cosine with the most similar singular vector of the pre-trained weight.

    Args:
        pretrained: (m, p) singular vectors.
        tuned: (m, k) singular vectors.

    Returns:
        (k,) float64 in [0, 1]: the largest absolute cosine, because the sign of a singular vector is arbitrary.

    Raises:
        ConfigError, NonFiniteError: as `subspace_similarity`.
    """
    return _overlap(pretrained, tuned).abs().amax(0).clamp_max(1.0)


def intruder_dimensions(pretrained: Tensor, tuned: Tensor, threshold: float) -> int:
    """Number of intruders: singular vectors of a tuned weight that resemble no pre-trained one (Shuttleworth, arXiv 2410.21228).

    Args:
        pretrained: (m, p) all singular vectors of the weight.
        tuned: (m, k) the leading singular vectors to look at.
        threshold: epsilon; a vector whose best cosine is smaller is an intruder.

    Raises:
        ConfigError, NonFiniteError: as `subspace_similarity`.
    """
    return int((best_cosines(pretrained, tuned) < threshold).sum())


def resolved_rank(singular_values: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Number of singular values above the rounding errors of the stored numbers; the vectors of the others are arbitrary.

    The rounding errors of a matrix behave like independent numbers of relative size eps, so their largest singular value is
    about ``eps |W|_F (1 / sqrt(m) + 1 / sqrt(n))``.

    Args:
        singular_values: (p,) descending.
        shape: (m, n).
        dtype: dtype of the stored weight.

    Returns:
        A number in 1..p.
    """
    values = float64(singular_values)
    noise = torch.finfo(dtype).eps * float(values.norm()) * sum(size**-0.5 for size in shape)
    return max(1, int((values > noise).sum()))


def resolved_bases(weight: Tensor) -> Bases:
    """Decomposes a weight and keeps the singular vectors of the singular values that `resolved_rank` counts."""
    factors = decompose(weight)
    rank = resolved_rank(factors.s, tuple(weight.shape), weight.dtype)
    return Bases(factors.U[:, :rank], factors.Vh[:rank].T, factors.s)


def forgetting_rate(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean loss of accuracy on other data sets, as a share of the mean accuracy before (CERSA, appendix E).

    Args:
        before: accuracy of the pre-trained model on each of the other data sets.
        after: accuracy of the fine-tuned model on the same data sets.

    Returns:
        0.1 if a tenth is lost; negative if the accuracy rose.

    Raises:
        ConfigError: there are no data sets, the numbers of data sets differ, or the mean accuracy before is 0.
        NonFiniteError: an accuracy is NaN or infinite.
    """
    if not before or len(before) != len(after):
        raise ConfigError(f"accuracy on {len(before)} data sets before and {len(after)} after: expected the same, at least one")
    accuracy = torch.tensor([list(before), list(after)], dtype=torch.float64)
    if not torch.isfinite(accuracy).all():
        raise NonFiniteError(f"an accuracy is NaN or infinite: before {list(before)}, after {list(after)}")
    mean_before, mean_after = accuracy.mean(1)
    if mean_before <= 0:
        raise ConfigError(f"the mean accuracy before is {float(mean_before)}, expected more than 0: nothing can be forgotten")
    return float((mean_before - mean_after) / mean_before)


def _overlap(A: Tensor, B: Tensor) -> Tensor:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[0] or not A.shape[1] or not B.shape[1]:
        raise ConfigError(
            f"bases of shapes {tuple(A.shape)} and {tuple(B.shape)}: expected matrices with the same number of rows and at least "
            "one column each"
        )
    overlap = float64(A).T @ float64(B).to(float64(A).device)
    if not torch.isfinite(overlap).all():
        raise NonFiniteError("a basis holds NaN or infinity")
    return overlap
