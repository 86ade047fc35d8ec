"""The CERSA layer: a linear layer truncated to its principal subspace, with small trainable cores in it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, Pivots, changed_components, choose_pivots, float64
from cersa_diffusion.layers.core import Core, KeepsFloat32
from cersa_diffusion.layers.factored import FactoredLinear, frozen_linear
from cersa_diffusion.layers.quantised import dequantise
from cersa_diffusion.weights.stored import StoredWeight


class CersaLinear(FactoredLinear, KeepsFloat32):
    """``y = U (s * h + pad(D h[o:o+r])) + R x + b``, ``h = Vh x``; ``U``, ``s``, ``Vh``, ``R`` frozen, the cores ``D`` trainable.

    An untrained layer computes the truncated weight ``U diag(s) Vh``, or the whole one if the residual R is kept. Several named
    cores add up: ``D = sum strength_i D_i``. U, Vh and R are the weights of frozen linear maps in the compute dtype. Singular
    values and cores stay float32 when the layer changes its dtype.

    Args:
        decomposition: leading factors of the weight, at least `kept_rank` of them, values descending.
        kept_rank: k, the number of singular triplets to keep.
        bias: the bias of the replaced layer, or None; shared, not copied.
        dtype: compute dtype of the bases.
        device: device of the layer; default: that of the decomposition.
        dense_weight: for an exact restoration, the replaced weight, kept in CPU memory or as a reference to its file, or the
            replaced layer itself if it is quantised; or None.
        residual: (m, n) part of the weight outside the kept components, or None if it is dropped.
        pivots: the pivots of the decomposition, if they are known; default: computed when they are first needed.
    """

    float32_names = ("s",)

    def __init__(
        self,
        decomposition: Decomposition,
        kept_rank: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
        dense_weight: Tensor | StoredWeight | nn.Module | None = None,
        residual: Tensor | None = None,
        pivots: Pivots | None = None,
    ):
        U, s, Vh = decomposition.U, decomposition.s, decomposition.Vh
        placed = {"device": device or U.device, "copy": True, "memory_format": torch.contiguous_format}
        maps = {
            "up": frozen_linear(U[:, :kept_rank].to(dtype=dtype, **placed), bias if residual is None else None),
            "down": frozen_linear(Vh[:kept_rank].to(dtype=dtype, **placed)),
            "residual": None if residual is None else frozen_linear(residual.to(dtype=dtype, **placed), bias),
        }
        super().__init__(**maps)
        self.kept_rank = kept_rank
        # A buffer, as it is small and of another dtype than the weights.
        self.register_buffer("s", s[:kept_rank].to(dtype=torch.float32, **placed))
        self.cores = nn.ModuleDict()
        self.strengths: dict[str, float] = {}
        self.enabled = True
        # The fingerprint of the replaced weight for adapter files (`fingerprint.base_entries`); empty if it is unknown.
        self.base_entries: tuple[float, ...] = ()
        # True for a layer of a compressed checkpoint: it replaced no dense weight that could be restored.
        self.is_base = False
        if isinstance(dense_weight, Tensor):
            dense_weight = dense_weight.detach().cpu().requires_grad_(dense_weight.requires_grad)
        # First component -> pivots of the components from it on. The bases are frozen, so they are chosen only once.
        # Copied, because those of the cache would keep its whole file mapped into memory.
        self._pivots = {} if pivots is None else {0: Pivots(*(indices[:kept_rank].clone() for indices in pivots))}
        # A tuple keeps the weight out of the module: out of its state dict, and where it is.
        self._dense = (dense_weight,)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of everything that no training changes: the factors, and the places of sparse cores."""
        maps = {"U": self.up, "Vh": self.down, "residual": self.residual}
        return {name: linear.weight for name, linear in maps.items() if linear is not None} | dict(self.named_buffers())

    @property
    def base_kept(self) -> bool:
        """Whether the replaced weight was kept, in memory or as a reference to its file."""
        return self._dense[0] is not None

    @property
    def replaced(self) -> Tensor | nn.Module | None:
        """The replaced (m, n) weight on the CPU, or the quantised layer; None if it was not kept or its file has changed."""
        kept = self._dense[0]
        return kept.read() if isinstance(kept, StoredWeight) else kept

    @property
    def dense_weight(self) -> Tensor | None:
        """The replaced (m, n) weight, dequantised if it was quantised; None as in `replaced`."""
        replaced = self.replaced
        return dequantise(replaced) if isinstance(replaced, nn.Module) else replaced

    def forget_base(self) -> None:
        """Gives up the replaced weight: `restore_base` can then no longer put it back."""
        self._dense = (None,)

    def add_core(self, adapter_name: str, core: Core, strength: float = 1.0) -> None:
        """Adds a core and moves it to the device of the layer.

        Args:
            adapter_name: a name that no core of this layer has.
            core: a change of some of the kept components.
            strength: factor of this core in the sum of cores.

        Raises:
            ConfigError: the name is taken or not allowed, or the core changes components that are not kept.
        """
        if adapter_name in self.cores:
            raise ConfigError(f"adapter {adapter_name!r} is already on this layer: choose another name or delete it")
        if not adapter_name or "." in adapter_name or hasattr(self.cores, adapter_name):
            raise ConfigError(
                f"adapter_name {adapter_name!r}: torch takes no empty name, no dot and no name of its own attributes: rename it"
            )
        if core.rank < 1 or core.offset < 0 or core.region.stop > self.kept_rank:
            last = core.region.stop - 1
            raise ConfigError(f"a core on components {core.offset} to {last} does not fit: this layer keeps {self.kept_rank}")
        self.cores[adapter_name] = core.to(self.s.device)
        self.strengths[adapter_name] = strength

    def delete_core(self, adapter_name: str) -> None:
        """Removes a core; raises ConfigError if there is no core of this name."""
        if adapter_name not in self.cores:
            raise ConfigError(f"no adapter {adapter_name!r} on this layer, it has {sorted(self.cores)}")
        del self.cores[adapter_name], self.strengths[adapter_name]

    def active_core(self, strengths: Mapping[str, float] | None = None) -> tuple[Tensor | None, int]:
        """The weighted sum of the cores whose strength is not zero, and its first component.

        Args:
            strengths: core name -> strength; default: those of the layer, or none while it is disabled.

        Returns:
            The (r, r) or diagonal (r,) float32 tensor, or None if no core is active; and the offset.
        """
        if strengths is None:
            strengths = self.strengths if self.enabled else {}
        active = [(self.cores[name], strength) for name, strength in strengths.items() if strength != 0]
        if not active:
            return None, 0
        if len(active) == 1:
            core, strength = active[0]
            return (core() if strength == 1 else core() * strength), core.offset
        start = min(core.offset for core, _ in active)
        stop = max(core.offset + core.rank for core, _ in active)
        total = self.s.new_zeros(stop - start, stop - start)
        for core, strength in active:
            before, after = core.offset - start, stop - core.offset - core.rank
            total = total + strength * nn.functional.pad(core.dense(), (before, after, before, after))
        return total, start

    def pivots(self, rank: int, offset: int = 0) -> Pivots:
        """The rows and columns at which a change of `rank` components from `offset` on is stored."""
        if offset not in self._pivots:
            self._pivots[offset] = choose_pivots(self.U[:, offset:], self.Vh[offset:])
        return Pivots(*(indices[:rank] for indices in self._pivots[offset]))

    def _load_from_state_dict(self, *args) -> None:
        self._pivots = {}  # the state dict may hold other bases
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        core, offset = self.active_core()
        return self.combine(changed_components(self.down(x), self.s, core, offset), x)

    def weight_change(self, strengths: Mapping[str, float] | None = None) -> Tensor:
        """``dW = U D Vh`` of the active cores as (m, n) in float64; `strengths` as in `active_core`."""
        core, offset = self.active_core(strengths)
        if core is None:
            return torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=float64(self.s).device)
        region = slice(offset, offset + core.shape[0])
        core = torch.diag(core) if core.ndim == 1 else core
        return float64(self.U[:, region]) @ float64(core) @ float64(self.Vh[region])

    def effective_weight(self, strengths: Mapping[str, float] | None = None) -> Tensor:
        """The dense (m, n) matrix this layer multiplies by, computed in float64, in dtype and on the device of the bases."""
        U = self.U
        weight = (float64(U) * float64(self.s)) @ float64(self.Vh) + self.weight_change(strengths)
        if self.residual is not None:
            weight = weight + float64(self.R)
        return weight.to(U)

    def extra_repr(self) -> str:
        residual = "dropped" if self.residual is None else "kept"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept_rank={self.kept_rank}, residual={residual}"
        )
