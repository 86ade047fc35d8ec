"""What the fine-tuning methods do to one model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.inject import InjectionReport, inject_cersa
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.lora_files import add_lora


class Adaptation(ABC):
    """One way to fine-tune given linear layers of one model."""

    # Whether the frozen weights may be kept in 16 bit under mixed precision.
    frozen_in_compute_dtype = True

    @abstractmethod
    def prepare(self, model: nn.Module) -> str:
        """Changes a model so that just this method's parameters are trained; returns a line that says what was done.

        Args:
            model: changed in place; all or nothing.

        Raises:
            ConfigError: the method cannot be applied to the layers that were asked for.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights to the compute dtype, the trained ones stay float32."""
        if self.frozen_in_compute_dtype:
            # Set aside: rounded and turned back they would not be what the method began with.
            trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
            model.to(dtype=dtype)
            for parameter, data in trained.items():
                parameter.data = data.float()


class CersaAdaptation(Adaptation):
    """Cores in the basis of every target layer's weight: CERSA, and SVFit and SVFT as settings of it.

    Args:
        config: the settings, target layers included.
        ranks: what a memory budget that several models share came to (see `inject_cersa`).

    Attributes:
        report: what the injection did; None before `prepare`.
    """

    def __init__(self, config: CersaConfig, ranks: Mapping[str, LayerRanks | None] | None = None):
        self.config, self.ranks = config, ranks
        self.report: InjectionReport | None = None

    def prepare(self, model: nn.Module) -> str:
        self.report = inject_cersa(model, self.config, ranks=self.ranks)
        return str(self.report)


class LoraAdaptation(Adaptation):
    """LoRA by the peft library, under the adapter name "default".

    Args:
        target_modules: as `match_targets` takes them.
        rank: also lora_alpha, so that the scale is 1.
    """

    label, settings = "LoRA", {}

    def __init__(self, target_modules: str | list[str], rank: int):
        self.target_modules, self.rank = target_modules, rank

    def prepare(self, model: nn.Module) -> str:
        layers = match_targets(model, self.target_modules)
        self._check_layers(layers)
        # Whole names, so that these very layers are trained and no convolution of the same ending; without the prefix of the
        # text encoder's names, which not all transformers versions have (peft takes them as endings).
        names = [name.removeprefix("text_model.") for name in layers]
        model.requires_grad_(False)
        add_lora(model, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names, **self.settings))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with {self.label} of rank {self.rank}: {trained / 1e6:.2f} M trained"

    # Only PiSSA takes its rank from the weight.
    def _check_layers(self, layers: dict[str, nn.Module]) -> None:
        """Refuses layers that the method cannot be applied to."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained change as a LoRA of the model the user has, in peft's names without its prefix."""
        return get_peft_model_state_dict(model)

    def saved_settings(self) -> dict:
        """What differs between the settings of training and those that `weights` are loaded with."""
        return {}


class DoraAdaptation(LoraAdaptation):
    """DoRA (Liu et al., arXiv 2402.09353): LoRA on the direction of the weight, its magnitude trained beside it."""

    label, settings = "DoRA", {"use_dora": True}


class PissaAdaptation(LoraAdaptation):
    """PiSSA (Meng et al., arXiv 2404.02948): A and B start as the leading components, the base keeps the rest.

    The base that is trained on is not the one others have, so what is saved is the change, as a LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``.
    """

    label, settings = "PiSSA", {"init_lora_weights": "pissa"}

    def __init__(self, target_modules: str | list[str], rank: int):
        super().__init__(target_modules, rank)
        self._initial: dict[str, Tensor] = {}

    def _check_layers(self, layers: dict[str, nn.Module]) -> None:
        name, smallest = min(((name, min(layer.weight.shape)) for name, layer in layers.items()), key=lambda item: item[1])
        if smallest < self.rank:
            raise ConfigError(
                f"rank is {self.rank}, but layer {name} has only {smallest} components for PiSSA to start from: "
                f"lower it to {smallest} or leave this layer out of the target modules"
            )

    def prepare(self, model: nn.Module) -> str:
        description = super().prepare(model)
        self._initial = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}
        return description

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        weights = {}
        for name, trained in get_peft_model_state_dict(model).items():
            initial = self._initial[name].to(trained)
            weights[name] = torch.cat([trained, initial]) if "lora_A" in name else torch.cat([trained, -initial], dim=1)
        return weights

    def saved_settings(self) -> dict:
        return {"r": 2 * self.rank, "lora_alpha": 2 * self.rank, "init_lora_weights": True}


class FullAdaptation(Adaptation):
    """Dense weights.

    Args:
        target_modules: the layers whose weights are trained, as `match_targets` takes them; None: all parameters of the model.
    """

    frozen_in_compute_dtype = False

    def __init__(self, target_modules: str | list[str] | None):
        self.target_modules = target_modules

    def prepare(self, model: nn.Module) -> str:
        if self.target_modules is None:
            model.requires_grad_(True)
            return f"all parameters: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M trained"
        layers = match_targets(model, self.target_modules)
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        trained = sum(layer.weight.numel() for layer in layers.values())
        return f"{len(layers)} layers, dense weights: {trained / 1e6:.2f} M trained"


LORA_FAMILY: dict[str, type[LoraAdaptation]] = {"lora": LoraAdaptation, "pissa": PissaAdaptation, "dora": DoraAdaptation}
