"""The CERSA layer: a linear layer cut to its principal subspace, with small trainable cores inside it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, Pivots, cersa_linear, choose_pivots, float64
from cersa_diffusion.layers.core import Core, KeepsFloat32
from cersa_diffusion.weights.stored import StoredWeight


class CersaLinear(KeepsFloat32):
    """``y = U (s * h + pad(D h[o:o+r])) + R x + b``, ``h = Vh x``; ``U``, ``s``, ``Vh``, ``R`` frozen, the cores ``D`` trainable.

    An untrained layer is the truncated layer ``U diag(s) Vh``, or the whole one where the residual R is kept. Several named
    cores add up: ``D = sum strength_i D_i``. Bases are buffers in the compute dtype; singular values and cores stay float32
    through every dtype move.

    Args:
        decomposition: leading factors of the weight, at least `kept_rank` of them, values descending.
        kept_rank: k, the number of singular triplets to keep.
        bias: the bias of the replaced layer, or None; shared, not copied.
        dtype: compute dtype of the bases.
        device: where the layer lives; default: where the decomposition is.
        dense_weight: the replaced weight, kept in CPU memory so that it can come back bit for bit; or where it lies on disk;
            or None.
        residual: (m, n) part of the weight outside the kept components, or None where it is dropped.
        pivots: those of the decomposition, where they are known; default: chosen when they are asked for.
    """

    float32_names = ("s",)

    def __init__(
        self,
        decomposition: Decomposition,
        kept_rank: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
        dense_weight: Tensor | StoredWeight | None = None,
        residual: Tensor | None = None,
        pivots: Pivots | None = None,
    ):
        super().__init__()
        U, s, Vh = decomposition.U, decomposition.s, decomposition.Vh
        self.out_features, self.in_features = U.shape[0], Vh.shape[1]
        self.kept_rank = kept_rank
        placed = {"device": device or U.device, "copy": True, "memory_format": torch.contiguous_format}
        self.register_buffer("U", U[:, :kept_rank].to(dtype=dtype, **placed))
        self.register_buffer("s", s[:kept_rank].to(dtype=torch.float32, **placed))
        self.register_buffer("Vh", Vh[:kept_rank].to(dtype=dtype, **placed))
        self.register_buffer("residual", None if residual is None else residual.to(dtype=dtype, **placed))
        self.bias = bias
        self.cores = nn.ModuleDict()
        self.strengths: dict[str, float] = {}
        self.enabled = True
        # The fingerprint of the replaced weight that adapter files carry (`fingerprint.base_entries`); empty when not known.
        self.base_entries: tuple[float, ...] = ()
        # Whether this layer is no replacement: of a compressed checkpoint, whose base has no dense weight to go back to.
        self.is_base = False
        if isinstance(dense_weight, Tensor):
            dense_weight = dense_weight.detach().cpu().requires_grad_(dense_weight.requires_grad)
        # First component -> pivots of the components from there on. Nothing that trains: chosen once, and in no state dict.
        self._pivots = {} if pivots is None else {0: Pivots(*(indices[:kept_rank] for indices in pivots))}
        # In a tuple, so that it is no part of the module: not in the state dict, not moved to the GPU.
        self._dense = (dense_weight,)

    @property
    def base_kept(self) -> bool:
        """Whether the replaced weight was kept, in memory or where it lies on disk."""
        return self._dense[0] is not None

    @property
    def dense_weight(self) -> Tensor | None:
        """The (m, n) weight this layer replaced, on the CPU, or None when it was not kept (or its file has changed since)."""
        kept = self._dense[0]
        return kept.read() if isinstance(kept, StoredWeight) else kept

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight without its numbers, on the meta device: some models (T5) look at a layer's dtype."""
        return torch.empty(self.out_features, self.in_features, dtype=self.U.dtype, device="meta")

    def add_core(self, adapter_name: str, core: Core, strength: float = 1.0) -> None:
        """Adds a core.

        Args:
            adapter_name: a name that this layer does not have yet.
            core: a change of some of the kept components; moved to the layer's device.
            strength: factor of this core in the sum of cores.

        Raises:
            ConfigError: the name is taken, or the core reaches beyond the kept components.
        """
        if adapter_name in self.cores:
            raise ConfigError(f"adapter {adapter_name!r} is already on this layer: choose another name or delete it")
        if not adapter_name or "." in adapter_name or hasattr(self.cores, adapter_name):
            raise ConfigError(f"{adapter_name!r} cannot be the name of an adapter: torch has a use of its own for it")
        if core.rank < 1 or core.offset < 0 or core.offset + core.rank > self.kept_rank:
            last = core.offset + core.rank - 1
            raise ConfigError(f"a core on components {core.offset} to {last} does not fit the {self.kept_rank} that are kept")
        self.cores[adapter_name] = core.to(self.U.device)
        self.strengths[adapter_name] = strength

    def delete_core(self, adapter_name: str) -> None:
        """Removes a core.

        Raises:
            ConfigError: there is no such core.
        """
        if adapter_name not in self.cores:
            raise ConfigError(f"no adapter {adapter_name!r} on this layer, it has {sorted(self.cores)}")
        del self.cores[adapter_name], self.strengths[adapter_name]

    def active_core(self, strengths: Mapping[str, float] | None = None) -> tuple[Tensor | None, int]:
        """The weighted sum of the cores whose strength is not zero, and its first component.

        Args:
            strengths: core name -> strength; the layer's own when left out, none while it is disabled.

        Returns:
            (r, r) or diagonal (r,) float32 tensor, or None when no core is active; and the offset.
        """
        if strengths is None:
            strengths = self.strengths if self.enabled else {}
        active = [(self.cores[name], strength) for name, strength in strengths.items() if strength != 0]
        if not active:
            return None, 0
        if len(active) == 1:
            core, strength = active[0]
            return (core() if strength == 1 else core() * strength), core.offset
        first = min(core.offset for core, _ in active)
        last = max(core.offset + core.rank for core, _ in active)
        total = self.s.new_zeros(last - first, last - first)
        for core, strength in active:
            before, after = core.offset - first, last - core.offset - core.rank
            total = total + strength * nn.functional.pad(core.dense(), (before, after, before, after))
        return total, first

    def pivots(self, rank: int, offset: int = 0) -> Pivots:
        """The rows and columns at which a change of `rank` components from `offset` on is stored; chosen once."""
        if offset not in self._pivots:
            self._pivots[offset] = choose_pivots(self.U[:, offset:], self.Vh[offset:])
        return Pivots(*(indices[:rank] for indices in self._pivots[offset]))

    def _load_from_state_dict(self, *args) -> None:
        self._pivots = {}  # these may be other bases
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        core, offset = self.active_core()
        return cersa_linear(x, self.U, self.s, self.Vh, core, self.bias, offset, self.residual)

    def weight_change(self, strengths: Mapping[str, float] | None = None) -> Tensor:
        """``dW = U D Vh`` of the active cores: (m, n), float64; strengths as in `active_core`."""
        core, offset = self.active_core(strengths)
        if core is None:
            return torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=float64(self.s).device)
        region = slice(offset, offset + core.shape[0])
        core = torch.diag(core) if core.ndim == 1 else core
        return float64(self.U[:, region]) @ float64(core) @ float64(self.Vh[region])

    def effective_weight(self, strengths: Mapping[str, float] | None = None) -> Tensor:
        """The dense (m, n) matrix this layer multiplies by, computed in float64, in dtype and place of the bases.

        Args:
            strengths: as in `active_core`.
        """
        weight = (float64(self.U) * float64(self.s)) @ float64(self.Vh) + self.weight_change(strengths)
        if self.residual is not None:
            weight = weight + float64(self.residual)
        return weight.to(self.U)

    def extra_repr(self) -> str:
        residual = "dropped" if self.residual is None else "kept"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept_rank={self.kept_rank}, residual={residual}"
        )


class FusedLinear(nn.Linear):
    """A dense layer in the place of a CERSA layer, which it keeps for `cersa_diffusion.unfuse`.

    To other libraries it is a plain `nn.Linear`: it can be saved, quantised, or given a LoRA.

    Args:
        factored: the layer it stands for; its bias is shared.
        weight: (m, n) dense weight.
    """

    def __init__(self, factored: CersaLinear, weight: Tensor):
        super().__init__(factored.in_features, factored.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = factored.bias
        # In a tuple, so that it is no part of the module: its tensors are neither saved nor listed as parameters.
        self._factored = (factored,)

    @property
    def factored(self) -> CersaLinear:
        """The CERSA layer, on the device and in the dtype of the moment of fusing."""
        return self._factored[0]
