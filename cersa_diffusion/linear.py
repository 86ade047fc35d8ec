"""The CERSA layer: a linear layer cut to its principal subspace, with small trainable cores inside it."""

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, cersa_linear, float64


class CersaLinear(nn.Module):
    """``y = U (s * h + pad(D h[:r])) + b``, ``h = Vh x``; ``U``, ``s``, ``Vh`` frozen, the cores ``D`` trainable.

    An untrained layer is the truncated layer ``U diag(s) Vh``. Several named cores add up: ``D = sum strength_i D_i``.
    Bases are buffers in the compute dtype; singular values and cores stay float32 through every dtype move.

    Args:
        decomposition: leading factors of the weight, at least `kept_rank` of them, values descending.
        kept_rank: k, the number of singular triplets to keep.
        bias: the bias of the replaced layer, or None; shared, not copied.
        dtype: compute dtype of the bases.
        device: where the layer lives; default: where the decomposition is.
        dense_weight: the replaced weight, kept in CPU memory so that it can come back bit for bit, or None.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        kept_rank: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
        dense_weight: Tensor | None = None,
    ):
        super().__init__()
        U, s, Vh = decomposition
        self.out_features, self.in_features = U.shape[0], Vh.shape[1]
        self.kept_rank = kept_rank
        placed = {"device": device or U.device, "copy": True, "memory_format": torch.contiguous_format}
        self.register_buffer("U", U[:, :kept_rank].to(dtype=dtype, **placed))
        self.register_buffer("s", s[:kept_rank].to(dtype=torch.float32, **placed))
        self.register_buffer("Vh", Vh[:kept_rank].to(dtype=dtype, **placed))
        self.bias = bias
        self.cores = nn.ParameterDict()
        self.strengths: dict[str, float] = {}
        # In a tuple, so that it is no part of the module: not in the state dict, not moved to the GPU.
        self._dense = (None if dense_weight is None else dense_weight.detach().cpu().requires_grad_(dense_weight.requires_grad),)

    @property
    def dense_weight(self) -> Tensor | None:
        """The (m, n) weight this layer replaced, on the CPU, or None when it was not kept."""
        return self._dense[0]

    def add_core(self, adapter_name: str, rank: int, values: Tensor | None = None, strength: float = 1.0) -> None:
        """Adds a core on the leading `rank` components.

        Args:
            adapter_name: a name that this layer does not have yet.
            rank: r, at most k.
            values: (r, r) change of the core; zeros when left out.
            strength: factor of this core in the sum of cores.

        Raises:
            ConfigError: the name is taken, or the rank does not fit.
        """
        if adapter_name in self.cores:
            raise ConfigError(f"adapter {adapter_name!r} is already on this layer: choose another name or delete it")
        if not 1 <= rank <= self.kept_rank:
            raise ConfigError(f"core rank {rank} is outside 1..{self.kept_rank}, the components that are kept")
        core = torch.zeros(rank, rank, dtype=torch.float32, device=self.U.device)
        if values is not None:
            core.copy_(values)
        self.cores[adapter_name] = nn.Parameter(core)
        self.strengths[adapter_name] = strength

    def core(self) -> Tensor | None:
        """The weighted sum of the active cores, float32, or None when none is active."""
        active = [(self.cores[name], strength) for name, strength in self.strengths.items() if strength != 0]
        if not active:
            return None
        rank = max(core.shape[0] for core, _ in active)
        total = None
        for core, strength in active:
            core = core if strength == 1 else core * strength
            missing = rank - core.shape[0]
            core = nn.functional.pad(core, (0, missing, 0, missing)) if missing else core
            total = core if total is None else total + core
        return total

    def forward(self, x: Tensor) -> Tensor:
        return cersa_linear(x, self.U, self.s, self.Vh, self.core(), self.bias)

    def weight_change(self) -> Tensor:
        """``dW = U[:, :r] D Vh[:r]`` of the active cores: (m, n), float64."""
        core = self.core()
        if core is None:
            return torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=float64(self.s).device)
        rank = core.shape[0]
        return float64(self.U[:, :rank]) @ float64(core) @ float64(self.Vh[:rank])

    def effective_weight(self) -> Tensor:
        """The dense (m, n) matrix this layer multiplies by, computed in float64, in dtype and place of the bases."""
        truncated = (float64(self.U) * float64(self.s)) @ float64(self.Vh)
        return (truncated + self.weight_change()).to(self.U)

    def extra_repr(self) -> str:
        ranks = {name: core.shape[0] for name, core in self.cores.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, kept_rank={self.kept_rank}, cores={ranks}"

    def _apply(self, fn, recurse=True):
        # `.half()` and `.to(bfloat16)` must not round the singular values and the trained cores: they only change device.
        full_precision = {id(self.s)}
        for core in self.cores.values():
            full_precision |= {id(core), id(core.grad)}

        def keep_precision(tensor):
            moved = fn(tensor)
            if id(tensor) in full_precision and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
