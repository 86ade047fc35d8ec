"""The CERSA layer: a linear layer truncated to its principal subspace, with small trainable cores in it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, Pivots, cersa_linear, choose_pivots, float64
from cersa_diffusion.layers.core import Core, KeepsFloat32
from cersa_diffusion.layers.quantised import dequantise
from cersa_diffusion.weights.stored import StoredWeight


class CersaLinear(KeepsFloat32):
    """``y = U (s * h + pad(D h[o:o+r])) + R x + b``, ``h = Vh x``; ``U``, ``s``, ``Vh``, ``R`` frozen, the cores ``D`` trainable.

    An untrained layer computes the truncated weight ``U diag(s) Vh``, or the whole one if the residual R is kept. Several named
    cores add up: ``D = sum strength_i D_i``. Bases are parameters without gradient, in the compute dtype, so that offloading,
    FSDP and the first broadcast of DDP treat them as weights. Singular values and cores stay float32 when the layer changes its
    dtype.

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
        super().__init__()
        U, s, Vh = decomposition.U, decomposition.s, decomposition.Vh
        self.out_features, self.in_features = U.shape[0], Vh.shape[1]
        self.kept_rank = kept_rank
        placed = {"device": device or U.device, "copy": True, "memory_format": torch.contiguous_format}
        # U first: diffusers and transformers read the dtype of a model from its first parameter.
        self.U = _frozen(U[:, :kept_rank].to(dtype=dtype, **placed))
        # A buffer, as it is small and of another dtype than the weights.
        self.register_buffer("s", s[:kept_rank].to(dtype=torch.float32, **placed))
        self.Vh = _frozen(Vh[:kept_rank].to(dtype=dtype, **placed))
        self.register_parameter("residual", None if residual is None else _frozen(residual.to(dtype=dtype, **placed)))
        self.bias = bias
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
        self._pivots = {} if pivots is None else {0: Pivots(*(indices[:kept_rank] for indices in pivots))}
        # A tuple keeps the weight out of the module: out of its state dict, and where it is.
        self._dense = (dense_weight,)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of everything that no training changes: the factors, and the places of sparse cores."""
        factors = {name: getattr(self, name) for name in ("U", "Vh", "residual")}
        return {name: tensor for name, tensor in factors.items() if tensor is not None} | dict(self.named_buffers())

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

    @property
    def weight(self) -> Tensor:
        """A weight on the meta device, with shape and dtype but no numbers: some models (T5) read the dtype of a layer."""
        return torch.empty(self.out_features, self.in_features, dtype=self.U.dtype, device="meta")

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
        self.cores[adapter_name] = core.to(self.U.device)
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
        return cersa_linear(x, self.U, self.s, self.Vh, core, self.bias, offset, self.residual)

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
        weight = (float64(self.U) * float64(self.s)) @ float64(self.Vh) + self.weight_change(strengths)
        if self.residual is not None:
            weight = weight + float64(self.residual)
        return weight.to(self.U)

    def extra_repr(self) -> str:
        residual = "dropped" if self.residual is None else "kept"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept_rank={self.kept_rank}, residual={residual}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class FusedLinear(nn.Linear):
    """A dense layer that replaces a CERSA layer and keeps it for `cersa_diffusion.unfuse`.

    Other libraries treat it as a plain `nn.Linear`: they can save or quantise it, or add a LoRA to it.

    Args:
        factored: the replaced layer; its bias is shared.
        weight: (m, n) dense weight.
    """

    def __init__(self, factored: CersaLinear, weight: Tensor):
        super().__init__(factored.in_features, factored.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = factored.bias
        # A tuple keeps the layer out of the module: its tensors are neither saved nor listed as parameters.
        self._factored = (factored,)

    @property
    def factored(self) -> CersaLinear:
        """The CERSA layer, on the device and in the dtype that it had when it was fused."""
        return self._factored[0]
