"""The mathematics of the analyses on tensors: similarity of subspaces, intruder dimensions, forgetting.

Bases are given as matrices with orthonormal columns, in the order of the singular values they belong to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.functional import float64


def subspace_similarity(A: Tensor, B: Tensor) -> float:
    """Grassmann similarity ``psi = |A^T B|_F^2 / min(i, j)`` (CERSA, Eq. 3).

    Args:
        A: (m, i) orthonormal columns.
        B: (m, j) orthonormal columns.

    Returns:
        A share in [0, 1]: 1 where one subspace holds the other, 0 where they are orthogonal.

    Raises:
        ConfigError: no columns, or subspaces of different spaces.
        NonFiniteError: NaN or infinity.
    """
    overlap = _overlap(A, B)
    return min(1.0, float(overlap.square().sum()) / min(overlap.shape))


def similarity_grid(A: Tensor, B: Tensor) -> Tensor:
    """psi of the leading i columns of one basis and the leading j of another, for all i and j at once.

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
    """How near each singular vector of a tuned weight comes to any one of the pre-trained weight.

    Args:
        pretrained: (m, p) singular vectors.
        tuned: (m, k) singular vectors.

    Returns:
        (k,) float64 in [0, 1]: the largest cosine in size, for singular vectors have free signs.

    Raises:
        ConfigError, NonFiniteError: as `subspace_similarity`.
    """
    return _overlap(pretrained, tuned).abs().amax(0).clamp_max(1.0)


def intruder_dimensions(pretrained: Tensor, tuned: Tensor, threshold: float) -> int:
    """How many singular vectors of a tuned weight resemble none of the pre-trained one (Shuttleworth et al., arXiv 2410.21228).

    Args:
        pretrained: (m, p) singular vectors, all that the weight has.
        tuned: (m, k) the leading singular vectors that are looked at.
        threshold: epsilon, the cosine below which a vector is an intruder.

    Raises:
        ConfigError, NonFiniteError: as `subspace_similarity`.
    """
    return int((best_cosines(pretrained, tuned) < threshold).sum())


def resolved_rank(singular_values: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """How many singular values stand out of the rounding of the stored numbers; vectors beyond are arbitrary.

    The rounding errors of a matrix are like independent numbers of relative size eps, and so their largest singular value is
    about ``eps |W|_F (1 / sqrt(m) + 1 / sqrt(n))``.

    Args:
        singular_values: (p,) descending.
        shape: (m, n).
        dtype: of the stored weight.

    Returns:
        A number in 1..p.
    """
    values = float64(singular_values)
    noise = torch.finfo(dtype).eps * float(values.norm()) * sum(size**-0.5 for size in shape)
    return max(1, int((values > noise).sum()))


def forgetting_rate(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean drop of the accuracy on other data sets, as a share of their mean accuracy before (CERSA, appendix E).

    Args:
        before: accuracy of the pre-trained model on each of the other data sets.
        after: that of the fine-tuned model on the same ones.

    Returns:
        0.1 for a tenth forgotten; negative where the accuracy rose.

    Raises:
        ConfigError: no data sets, not as many before as after, or nothing that could be forgotten.
        NonFiniteError: NaN or infinity.
    """
    if not before or len(before) != len(after):
        raise ConfigError(f"accuracy on {len(before)} data sets before and {len(after)} after: expected the same, at least one")
    figures = torch.tensor([list(before), list(after)], dtype=torch.float64)
    if not torch.isfinite(figures).all():
        raise NonFiniteError(f"an accuracy is NaN or infinite: before {list(before)}, after {list(after)}")
    was, is_now = figures.mean(1)
    if was <= 0:
        raise ConfigError(f"the mean accuracy before is {float(was)}, expected more than 0: there is nothing to forget")
    return float((was - is_now) / was)


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
