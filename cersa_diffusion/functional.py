"""The mathematics of CERSA on tensors: spectrum, rank for an energy share, forward pass, basis-free storage of a core.

Notation: a frozen ``W`` (m x n) is truncated to its leading singular triplets ``U`` (m x k), ``s`` (k) and ``Vh`` (k x n). The
trainable core ``D`` (r x r) acts on r of the k components, usually the leading ones, and changes the weight by
``dW = U[:, o:o+r] D Vh[o:o+r]``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Decomposition(NamedTuple):
    """Singular value decomposition ``W = U diag(s) Vh``, values descending."""

    U: Tensor
    s: Tensor
    Vh: Tensor


class Pivots(NamedTuple):
    """The rows and columns of a weight change that determine its core: int64 indices on the CPU."""

    rows: Tensor
    columns: Tensor


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64 without gradient, on its device, or on the CPU if the device has no float64 (Apple's MPS)."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device).double()


# Below this ratio of smallest to largest singular value, squaring the matrix loses digits that float32 bases still hold.
GRAM_CONDITION = 6e-5


def decompose(weight: Tensor) -> Decomposition:
    """Thin singular value decomposition in float64.

    It uses the eigenvectors of the smaller Gram matrix, which takes about half the time of a full SVD and loses nothing that
    float32 can hold. A badly conditioned or rank-deficient matrix gets the full SVD.

    Args:
        weight: (m, n) matrix of any floating dtype; pass it as the checkpoint stores it, not cast to a compute dtype.

    Returns:
        float64 factors of shapes (m, p), (p,) and (p, n), with p = min(m, n), on the weight's device (see `float64`).
    """
    weight = float64(weight)
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.T if wide else weight
    eigenvalues, right = torch.linalg.eigh(tall.T @ tall)
    s, right = eigenvalues.clamp_min(0).sqrt().flip(0), right.flip(1)
    if not s[-1] > GRAM_CONDITION * s[0]:
        return Decomposition(*torch.linalg.svd(weight, full_matrices=False))
    left = (tall @ right) / s
    return Decomposition(right, s, left.T) if wide else Decomposition(left, s, right.T)


def energy_rank(singular_values: Tensor, share: float) -> int:
    """The smallest k whose leading values hold at least `share` of the squared-singular-value energy (CERSA, Eq. 2).

    Args:
        singular_values: (p,) non-negative, descending.
        share: alpha or beta, in (0, 1].

    Returns:
        k in 1..p; 1 for a matrix of zeros, which has no energy.
    """
    energy = float64(singular_values).square().cumsum(0)
    if energy[-1] == 0:
        return 1
    # Division instead of multiplication: a share that is reached exactly (0.9 of 9 + 1) then compares equal in floating point.
    return int((energy / energy[-1] < share).sum()) + 1


def kept_energy(singular_values: Tensor, rank: int) -> float:
    """The share of the squared-singular-value energy in the leading `rank` values: the alpha that gives this rank.

    Args:
        singular_values: (p,) non-negative, descending.
        rank: k in 1..p.

    Returns:
        A share in (0, 1]; 1 for a matrix of zeros, which loses nothing.
    """
    energy = float64(singular_values).square().cumsum(0)
    return float(energy[rank - 1] / energy[-1]) if energy[-1] > 0 else 1.0


def changed_components(h: Tensor, s: Tensor, core: Tensor | None, offset: int = 0) -> Tensor:
    """``s * h + pad(D h[o:o+r])``: the scaled and changed components of an input (CERSA, section 3.2).

    Autograd saves only the changed part of `h` (tokens x r) for the backward pass, because the singular values are frozen.

    Args:
        h: (..., k) components of the input, ``Vh x``.
        s: (k,) float32 singular values.
        core: change of the core in any floating dtype, (r, r) or its diagonal (r,); None for the truncated layer.
        offset: o, the first component that the core changes.

    Returns:
        (..., k) tensor in the dtype of `h`.
    """
    scaled = (h * s).to(h.dtype)
    if core is None:
        return scaled
    rank, kept = core.shape[0], h.shape[-1]
    if core.ndim == 2 and rank == kept:
        # One kernel for product and sum.
        return torch.addmm(scaled.reshape(-1, kept), h.reshape(-1, kept), core.to(h.dtype).T).view_as(h)
    # A copy if the core is smaller than h: a view would keep all of h for the backward pass.
    region = h[..., offset : offset + rank].contiguous()
    change = (region * core).to(h.dtype) if core.ndim == 1 else F.linear(region, core.to(h.dtype))
    return scaled + (change if rank == kept else F.pad(change, (offset, kept - offset - rank)))


def pivot_rows(basis: Tensor) -> Tensor:
    """The r rows that span the basis best: the pivots of an LU factorisation, which runs on the device of the basis.

    Elimination proceeds column by column, so the first q of them are the pivots of the first q columns.

    Args:
        basis: (m, r) with independent columns, r <= m.

    Returns:
        (r,) int64 row indices, in the order in which they are picked, on the CPU.
    """
    swapped_rows = torch.linalg.lu_factor_ex(float64(basis)).pivots.tolist()
    order = list(range(len(basis)))
    for step, row in enumerate(swapped_rows):
        order[step], order[row - 1] = order[row - 1], order[step]
    return torch.tensor(order[: basis.shape[1]])


def choose_pivots(U: Tensor, Vh: Tensor) -> Pivots:
    """Pivot rows of U (m, r) and pivot columns of Vh (r, n); the first q of each belong to the first q components."""
    return Pivots(pivot_rows(U), pivot_rows(Vh.T))


def core_to_block(core: Tensor, U: Tensor, Vh: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The block ``dW[rows, columns]`` of the weight change, which does not depend on the choice of singular vectors.

    Args:
        core: (r, r); U: (m, r); Vh: (r, n): the bases of the changed components; rows, columns: (r,) indices into m and n.

    Returns:
        (r, r) float64 block.
    """
    left, right = _pivot_factors(U, Vh, rows, columns)
    return left @ float64(core) @ right


def block_to_core(block: Tensor, U: Tensor, Vh: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The core whose weight change has the given block: ``D = U[rows]^-1 M Vh[:, columns]^-1``.

    Args:
        block: (r, r); U: (m, r); Vh: (r, n): the bases of the changed components; rows, columns: (r,) indices into m and n.

    Returns:
        (r, r) float64 core in the coordinates of the given bases.

    Raises:
        torch.linalg.LinAlgError: the chosen rows or columns of these bases are dependent.
    """
    left, right = _pivot_factors(U, Vh, rows, columns)
    halfway = torch.linalg.solve(left, float64(block).to(left.device))
    return torch.linalg.solve(right, halfway, left=False)


def low_rank_factors(core: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The leading part of a core as a product ``L R``, with the fewest columns that hold a share of its squared energy.

    Args:
        core: (r, r).
        share: in (0, 1].

    Returns:
        L (r, q) and R (q, r) in float64; each contains the square roots of the singular values.
    """
    U, s, Vh = torch.linalg.svd(float64(core))
    q = energy_rank(s, share)
    return U[:, :q] * s[:q].sqrt(), s[:q, None].sqrt() * Vh[:q]


def _pivot_factors(U: Tensor, Vh: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return float64(U[rows.to(U.device)]), float64(Vh[:, columns.to(Vh.device)])
