"""What replaces a CERSA layer for inference and keeps it for `cersa_diffusion.unfuse`: a dense weight, or two linear maps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cersa_diffusion.functional import float64
from cersa_diffusion.layers.factored import FactoredLinear, frozen_linear
from cersa_diffusion.layers.linear import CersaLinear


class Fused:
    """A layer that computes with the active cores of a CERSA layer at fixed strengths, and keeps that layer.

    Attributes:
        changed_weight: the weight that holds the change.
    """

    changed_weight: Tensor

    def _keep(self, factored: CersaLinear) -> None:
        # A tuple keeps the layer out of the module: its tensors are neither saved nor listed as parameters.
        self._factored = (factored,)

    @property
    def factored(self) -> CersaLinear:
        """The CERSA layer, on the device and in the dtype that it had when it was fused."""
        return self._factored[0]

    def effective_weight(self) -> Tensor:
        """The dense (m, n) matrix that this layer multiplies by, in dtype and on the device of its weights."""
        raise TypeError(f"{type(self).__name__} is abstract")


class FusedLinear(Fused, nn.Linear):
    """One dense weight. Other libraries treat it as a plain `nn.Linear`: they can save or quantise it, or add a LoRA to it.

    Args:
        factored: the replaced layer; its bias is shared.
        strengths: core name -> strength, for the cores in the weight.
    """

    def __init__(self, factored: CersaLinear, strengths: Mapping[str, float]):
        super().__init__(factored.in_features, factored.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(factored.effective_weight(strengths), requires_grad=False)
        self.bias = factored.bias
        self._keep(factored)

    @property
    def changed_weight(self) -> Tensor:
        return self.weight

    def effective_weight(self) -> Tensor:
        return self.weight


class FusedFactors(Fused, FactoredLinear):
    """Two linear maps, the smaller of which holds ``diag(s) + D``: ``up = U (diag(s) + D)`` or ``down = (diag(s) + D) Vh``.

    The other map shares the memory of the CERSA layer.

    Args:
        factored: the replaced layer; its bias is shared.
        strengths: core name -> strength, for the cores in the weight.
    """

    def __init__(self, factored: CersaLinear, strengths: Mapping[str, float]):
        core, offset = factored.active_core(strengths)
        middle = torch.diag(float64(factored.s))
        if core is not None:
            region = slice(offset, offset + core.shape[0])
            middle[region, region] += float64(torch.diag(core) if core.ndim == 1 else core)
        U, Vh = factored.U, factored.Vh
        changed_name = "up" if factored.out_features <= factored.in_features else "down"
        if changed_name == "up":
            up, down = frozen_linear((float64(U) @ middle).to(U), factored.up.bias), _sharing(factored.down)
        else:
            up, down = _sharing(factored.up), frozen_linear((middle @ float64(Vh)).to(Vh))
        super().__init__(up, down, None if factored.residual is None else _sharing(factored.residual))
        self.changed_name = changed_name
        self._keep(factored)

    @property
    def changed_weight(self) -> Tensor:
        return getattr(self, self.changed_name).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.down(x), x)

    def effective_weight(self) -> Tensor:
        U = self.U
        weight = float64(U) @ float64(self.Vh)
        return (weight if self.residual is None else weight + float64(self.R)).to(U)


def _sharing(linear: nn.Linear) -> nn.Linear:
    """A linear map with the memory of another one; changes of device and dtype do not reach the other one.

    A class of a quantiser stays the same module: its weight is not moved without it.
    """
    return frozen_linear(linear.weight, linear.bias) if type(linear) is nn.Linear else linear
