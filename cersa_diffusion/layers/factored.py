"""A weight in factored form: two plain linear maps, and the residual beside them."""

import torch
from torch import Tensor, nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.private_names import DEQUANTISE


class FactoredLinear(nn.Module):
    """Two frozen linear maps in the place of a weight: `down` (n -> k), `up` (k -> m), and `residual` (n -> m) or None.

    They are exact `nn.Linear` modules and compute by being called, so that offloading, FSDP and quantisers (torchao,
    bitsandbytes) treat their weights as any other. The last map holds the bias, because a separate addition would be one more
    kernel and would raise the dtype under autocast. For everything that selects layers of a model, the three maps are inside of
    one layer (`cersa_diffusion.layers.model.named_layers`).

    Args:
        up, down, residual: the maps.
    """

    def __init__(self, up: nn.Linear, down: nn.Linear, residual: nn.Linear | None):
        super().__init__()
        self.out_features, self.in_features = up.out_features, down.in_features
        # `up` first: diffusers and transformers read the dtype of a model from its first parameter.
        self.up, self.down, self.residual = up, down, residual

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("up", "down", "residual") and hasattr(value, "base_layer"):
            raise ConfigError(
                f"{name!r} is a part of a {type(self).__name__} and takes no {type(value).__name__}: let the other adapter "
                "exclude these parts (peft: exclude_modules=['up', 'down', 'residual']), or fuse the CERSA layers first"
            )
        super().__setattr__(name, value)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, a parameter of the last map."""
        return (self.up if self.residual is None else self.residual).bias

    @property
    def U(self) -> Tensor:
        """The (m, k) weight of `up`; a quantised one is dequantised."""
        return plain_weight(self.up)

    @property
    def Vh(self) -> Tensor:
        """The (k, n) weight of `down`; a quantised one is dequantised."""
        return plain_weight(self.down)

    @property
    def R(self) -> Tensor | None:
        """The (m, n) weight of `residual` or None; a quantised one is dequantised."""
        return None if self.residual is None else plain_weight(self.residual)

    @property
    def weight(self) -> Tensor:
        """A weight on the meta device, with shape and dtype but no numbers: some models (T5) read the dtype of a layer."""
        return torch.empty(self.out_features, self.in_features, dtype=self.up.weight.dtype, device="meta")

    def combine(self, components: Tensor, x: Tensor) -> Tensor:
        """The output for (..., k) components and the (..., n) input of the layer."""
        output = self.up(components)
        return output if self.residual is None else output + self.residual(x)


def frozen_linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear map with this weight, not copied and without gradient, and with this bias, shared."""
    # Without the initialisation of nn.Linear, which even on the meta device takes longer than all the rest of a CERSA layer.
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def plain_weight(linear: nn.Linear) -> Tensor:
    """The weight of a linear map as a plain tensor: itself, or dequantised in its compute dtype.

    Raises:
        ConfigError: the weight is sharded over processes, or is quantised in a form that cannot be dequantised here.
    """
    weight = linear.weight
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return weight
    # Imported here: most models are never sharded.
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        raise ConfigError(
            f"a factor is a {type(weight).__name__} of shape {tuple(weight.shape)}, sharded over processes, expected a plain "
            "tensor: gather the weights (torch.distributed.checkpoint.state_dict) into a model that is not sharded"
        )
    plain = DEQUANTISE.get()(linear)
    if not plain.is_floating_point():
        raise ConfigError(
            f"a factor is a {type(weight).__name__} of {weight.dtype}, which cannot be dequantised: expected a floating-point "
            "weight, or one that torchao or bitsandbytes has quantised"
        )
    return plain.detach()
