"""The trainable part of a CERSA layer: a change of the singular-value matrix, dense, diagonal or sparse."""

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError


class KeepsFloat32(nn.Module):
    """A module whose tensors in `float32_names` keep their dtype when the module changes device and dtype.

    `.half()` and `.to(bfloat16)` of a whole model must not round singular values and trained cores.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        protected = [getattr(self, name) for name in self.float32_names]
        protected += [tensor.grad for tensor in protected if tensor.grad is not None]
        identities = {id(tensor) for tensor in protected}

        def keep_precision(tensor):
            moved = fn(tensor)
            if id(tensor) in identities and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)


class Core(KeepsFloat32):
    """A trainable change of `rank` neighbouring kept components.

    Args:
        rank: r, the number of changed components.
        offset: the first of them; 0 for the leading ones.
    """

    kind: str

    def __init__(self, rank: int, offset: int = 0):
        super().__init__()
        self.rank, self.offset = rank, offset
        # For a loaded core, to save it again: settings, base and training from the header of its file.
        self.facts: dict[str, dict] = {}
        # For a loaded core, to save it again: the number of components that its layer kept in training; None: as many as now.
        self.trained_kept_rank: int | None = None

    @property
    def region(self) -> slice:
        """The changed components among the kept ones."""
        return slice(self.offset, self.offset + self.rank)

    def compact(self) -> Tensor:
        """The change in the form that the forward pass takes: (r, r), or (r,) for a diagonal."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def forward(self) -> Tensor:
        """`compact` as a call of the module, because offloading hooks move its parameters to the device at a call."""
        values = self.compact()
        # A hook may move the parameter away before it is used; a view of it stays on the device.
        return values.view_as(values)

    def dense(self) -> Tensor:
        """The change as an (r, r) matrix, float32."""
        core = self()
        return torch.diag(core) if core.ndim == 1 else core

    def extra_repr(self) -> str:
        return f"rank={self.rank}, offset={self.offset}"


class MatrixCore(Core):
    """A dense matrix: CERSA; `values` is the (r, r) change to start from, zeros by default."""

    kind, float32_names = "matrix", ("D",)

    def __init__(self, rank: int, offset: int = 0, values: Tensor | None = None):
        super().__init__(rank, offset)
        start = torch.zeros(rank, rank) if values is None else values.detach().clone()
        self.D = nn.Parameter(start.to(torch.float32))

    def compact(self) -> Tensor:
        return self.D


class DiagonalCore(Core):
    """A diagonal: CERSA with an array (Table 6) and SVFit (arXiv 2409.05926)."""

    kind, float32_names = "diagonal", ("d",)

    def __init__(self, rank: int, offset: int = 0):
        super().__init__(rank, offset)
        self.d = nn.Parameter(torch.zeros(rank, dtype=torch.float32))

    def compact(self) -> Tensor:
        return self.d


class SparseCore(Core):
    """``sigmoid(gate) * M`` with M non-zero at fixed places: SVFT (arXiv 2405.19597, section 3, and its published code).

    As in SVFT, the e entries of M start from a Kaiming normal distribution (deviation sqrt(2 / e)) and the gate from zero, so
    that an untrained layer is not exactly the pre-trained one.

    Args:
        rank: size of M.
        places: (2, e) row and column indices of the trained entries.
    """

    kind, float32_names = "sparse", ("values", "gate")

    def __init__(self, rank: int, places: Tensor):
        super().__init__(rank)
        self.register_buffer("places", places)
        self.values = nn.Parameter(torch.randn(places.shape[1]) * (2 / places.shape[1]) ** 0.5)
        self.gate = nn.Parameter(torch.zeros(()))

    def compact(self) -> Tensor:
        return sparse_matrix(self.rank, self.places, self.gate, self.values)


def sparse_matrix(rank: int, places: Tensor, gate: Tensor, values: Tensor) -> Tensor:
    """The (rank, rank) matrix with ``sigmoid(gate) * values`` at `places` and zeros elsewhere."""
    matrix = values.new_zeros(rank, rank)
    return matrix.index_put((places[0].to(values.device), places[1].to(values.device)), torch.sigmoid(gate) * values)


def banded_places(rank: int, off_diagonals: int) -> Tensor:
    """The places of SVFT's banded pattern: the diagonal and `off_diagonals` on each side; 0 is SVFT-plain.

    Args:
        rank: size of the matrix.
        off_diagonals: d, at most rank - 1; ConfigError if it is larger.

    Returns:
        (2, e) indices with e = rank (2 d + 1) - d (d + 1).
    """
    if not 0 <= off_diagonals < rank:
        raise ConfigError(f"off_diagonals is {off_diagonals}, expected 0 to {rank - 1} for a layer of rank {rank}")
    rows, columns = torch.meshgrid(torch.arange(rank), torch.arange(rank), indexing="ij")
    return ((rows - columns).abs() <= off_diagonals).nonzero().T.contiguous()


def random_places(rank: int, count: int) -> Tensor:
    """`count` different random places of a matrix (SVFT-random), from torch's global generator: (2, count) indices."""
    flat = torch.randperm(rank * rank)[:count]
    return torch.stack([flat // rank, flat % rank])


def top_places(U: Tensor, Vh: Tensor, count: int) -> Tensor:
    """The `count` places (i, j) where left vector i and right vector j align most (SVFT-top-k): (2, count) indices.

    As in SVFT's published code, the alignment is ``U V^T`` for a square layer, and otherwise the one basis that is square.

    Args:
        U: (m, p); Vh: (p, n), p = min(m, n).
        count: number of places.
    """
    if U.shape[0] == Vh.shape[1]:
        alignment = U @ Vh
    else:
        alignment = U if U.shape[0] == U.shape[1] else Vh
    flat = alignment.flatten().topk(count).indices
    return torch.stack([flat // alignment.shape[1], flat % alignment.shape[1]])
