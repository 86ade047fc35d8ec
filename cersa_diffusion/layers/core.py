"""The trainable part of a CERSA layer: a change of the singular-value matrix, dense, diagonal or sparse."""

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError


class KeepsFloat32(nn.Module):
    """A module some of whose tensors only change device when the module changes dtype.

    `.half()` and `.to(bfloat16)` of a whole model must not round singular values and trained cores.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        kept = [getattr(self, name) for name in self.float32_names]
        identities = {id(tensor) for tensor in kept} | {id(tensor.grad) for tensor in kept if tensor.grad is not None}

        def keep_precision(tensor):
            moved = fn(tensor)
            if id(tensor) in identities and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)


class Core(KeepsFloat32):
    """A change on `rank` of the kept components, from `offset` on.

    Args:
        rank: r, the number of components it changes.
        offset: the first of them; 0 for the leading ones.
    """

    kind: str

    def __init__(self, rank: int, offset: int = 0):
        super().__init__()
        self.rank, self.offset = rank, offset
        # Of a core that was loaded: what the file's header says about settings, base and training, to be saved again.
        self.facts: dict[str, dict] = {}
        # Of a core that was loaded: how many components its layer kept in training, to be saved again; None: as many as now.
        self.trained_kept_rank: int | None = None

    def compact(self) -> Tensor:
        """The change as the forward pass wants it: (r, r) or, where it is diagonal, (r,)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def forward(self) -> Tensor:
        """`compact`, as a call of the module: that is where offloading hooks bring its parameters to the device."""
        values = self.compact()
        # A hook that puts the parameter away again, before it is used, leaves a view of it where it was.
        return values.view_as(values)

    def dense(self) -> Tensor:
        """The change as an (r, r) matrix, float32."""
        core = self()
        return torch.diag(core) if core.ndim == 1 else core

    def extra_repr(self) -> str:
        return f"rank={self.rank}, offset={self.offset}"


class MatrixCore(Core):
    """A dense matrix: CERSA.

    Args:
        rank: r.
        offset: the first component.
        values: (r, r) change to start from; zeros when left out.
    """

    kind, float32_names = "matrix", ("D",)

    def __init__(self, rank: int, offset: int = 0, values: Tensor | None = None):
        super().__init__(rank, offset)
        self.D = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32))
        if values is not None:
            with torch.no_grad():
                self.D.copy_(values)

    def compact(self) -> Tensor:
        return self.D


class DiagonalCore(Core):
    """A diagonal: CERSA with an array (Table 6) and SVFit (2409.05926)."""

    kind, float32_names = "diagonal", ("d",)

    def __init__(self, rank: int, offset: int = 0):
        super().__init__(rank, offset)
        self.d = nn.Parameter(torch.zeros(rank, dtype=torch.float32))

    def compact(self) -> Tensor:
        return self.d


class SparseCore(Core):
    """``sigmoid(gate) * M`` with M non-zero at fixed places: SVFT (2405.19597, section 3, and its published code).

    As there, M starts from a Kaiming normal distribution over its e entries (deviation sqrt(2 / e)) and the gate from zero, so
    that an untrained layer is only nearly the pre-trained one.

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
        matrix = self.values.new_zeros(self.rank, self.rank)
        return matrix.index_put((self.places[0], self.places[1]), torch.sigmoid(self.gate) * self.values)


def banded_places(rank: int, off_diagonals: int) -> Tensor:
    """Places of SVFT's banded pattern: the diagonal and `off_diagonals` on either side; 0 is SVFT-plain.

    Args:
        rank: size of the matrix.
        off_diagonals: d, at most rank - 1.

    Returns:
        (2, e) indices with e = rank (2 d + 1) - d (d + 1).

    Raises:
        ConfigError: more off-diagonals than the matrix has.
    """
    if not 0 <= off_diagonals < rank:
        raise ConfigError(f"off_diagonals is {off_diagonals}, expected 0 to {rank - 1} for a layer of rank {rank}")
    rows, columns = torch.meshgrid(torch.arange(rank), torch.arange(rank), indexing="ij")
    return ((rows - columns).abs() <= off_diagonals).nonzero().T.contiguous()


def random_places(rank: int, count: int) -> Tensor:
    """`count` different random places of a matrix (SVFT-random), from torch's global random numbers: (2, count) indices."""
    flat = torch.randperm(rank * rank)[:count]
    return torch.stack([flat // rank, flat % rank])


def top_places(U: Tensor, Vh: Tensor, count: int) -> Tensor:
    """The `count` places (i, j) where left vector i and right vector j align most (SVFT-top-k): (2, count) indices.

    As in SVFT's published code, the alignment is ``U V^T`` for a square layer, and the square one of the two bases otherwise.

    Args:
        U: (m, p); Vh: (p, n), p = min(m, n).
        count: how many.
    """
    if U.shape[0] == Vh.shape[1]:
        alignment = U @ Vh
    else:
        alignment = U if U.shape[0] == U.shape[1] else Vh
    flat = alignment.flatten().topk(count).indices
    return torch.stack([flat // alignment.shape[1], flat % alignment.shape[1]])
