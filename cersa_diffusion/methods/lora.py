"""LoRA, DoRA and PiSSA by the peft library, saved so that the stock loaders of diffusers and peft drop nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.files import safetensors_bytes
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.base import BASE_LINE, Method, head_state
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, add_lora, load_lora, save_lora
from cersa_diffusion.pipelines.open import load_base

# The file in peft's own folders.
PEFT_FILE_NAME = "adapter_model.safetensors"


class LoraMethod(Method):
    """LoRA (Hu et al., arXiv 2106.09685); lora_alpha is the rank, so that the scale is 1."""

    label: ClassVar[str] = "LoRA"
    # What `LoraConfig` is given beside the rank.
    lora_settings: ClassVar[dict] = {}
    opening = BASE_LINE + '\npipe.load_lora_weights("{path}")'

    def prepare(self, component, model):
        layers = match_targets(model, self.targets[component])
        self._check_layers(layers)
        # Whole names, so that these very layers are trained and no convolution of the same ending; without the prefix of the
        # text encoder's names, which not all transformers versions have (peft takes them as endings).
        names = [name.removeprefix("text_model.") for name in layers]
        model.requires_grad_(False)
        rank = self.settings.rank
        add_lora(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **self.lora_settings))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with {self.label} of rank {rank}: {trained / 1e6:.2f} M trained"

    # Only PiSSA takes its rank from the weight.
    def _check_layers(self, layers: Mapping[str, nn.Module]) -> None:
        """Refuses layers that the method cannot be applied to."""

    def weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        """The trained change as a LoRA of the model the user has, in peft's names without its prefix."""
        return get_peft_model_state_dict(model)

    def _saved_settings(self) -> dict:
        """What differs between the settings of training and those that `weights` are loaded with."""
        return {}

    def _in_pipeline(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` by the names that the loaders of pipelines find."""
        return weights

    def save(self, components, folder, origin, training):
        path = folder / LORA_FILE_NAME
        weights = {name: self._in_pipeline(self.weights(name, model)) for name, model in components.items()}
        settings = {name: model.peft_config["default"].to_dict() | self._saved_settings() for name, model in components.items()}
        save_lora(path, weights, settings)
        return path

    @classmethod
    def open(cls, path, base, **options):
        pipeline = load_base(base, **options)
        load_lora(pipeline, path)
        return pipeline

    def save_model(self, model, folder, head, origin, training):
        """As peft's own save_pretrained does for a PeftModel; the base's own change by PiSSA is folded into the adapter."""
        (component,) = self.targets
        settings = self._saved_settings() | {"modules_to_save": list(head), "inference_mode": True}
        config = replace(model.peft_config["default"], **settings)
        config.base_model_name_or_path, config.revision = origin.name_or_path, origin.revision
        config.save_pretrained(folder)
        weights = self.weights(component, model) | head_state(model, head)
        state = {f"base_model.model.{name}": tensor.detach() for name, tensor in weights.items()}
        (folder / PEFT_FILE_NAME).write_bytes(safetensors_bytes(state, {"format": "pt"}))
        return folder / PEFT_FILE_NAME

    @classmethod
    def open_model(cls, model, folder):
        path = folder / PEFT_FILE_NAME
        try:
            stored = load_file(path)
            adapted = PeftModel.from_pretrained(model, folder)
        except (OSError, SafetensorError) as error:
            raise AdapterFormatError(f"{path}: not a readable LoRA ({error}): train it again") from error
        except (RuntimeError, KeyError) as error:
            raise BaseMismatchError(
                f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:500]}"
            ) from error
        # peft only warns of layers that the file says nothing about, and passes over those that the model does not have. Without
        # the option it would look for the base's configuration, on the hub if need be.
        different = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() ^ stored.keys())
        if different:
            raise BaseMismatchError(f"{path}: {different[0]} is in the file or in {type(model).__name__}, expected in both")
        return adapted


class DoraMethod(LoraMethod):
    """DoRA (Liu et al., arXiv 2402.09353): LoRA on the direction of the weight, its magnitude trained beside it."""

    label, lora_settings = "DoRA", {"use_dora": True}

    def _in_pipeline(self, weights):
        # PEFT leaves ".weight" off these names; transformers' loader of adapters, which text encoders go through, then finds no
        # place for them and goes on with magnitudes of the base. With it both loaders put them in their place.
        ending = "lora_magnitude_vector"
        return {f"{name}.weight" if name.endswith(ending) else name: tensor for name, tensor in weights.items()}


class PissaMethod(LoraMethod):
    """PiSSA (Meng et al., arXiv 2404.02948): A and B start as the leading components, the base keeps the rest.

    The base that is trained on is not the one others have, so what is saved is the change, as a LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``.
    """

    label, lora_settings = "PiSSA", {"init_lora_weights": "pissa"}

    def __init__(self, settings, targets):
        super().__init__(settings, targets)
        self._initial: dict[str, dict[str, Tensor]] = {}

    def _check_layers(self, layers):
        name, smallest = min(((name, min(layer.weight.shape)) for name, layer in layers.items()), key=lambda item: item[1])
        if smallest < self.settings.rank:
            raise ConfigError(
                f"rank is {self.settings.rank}, but layer {name} has only {smallest} components for PiSSA to start from: "
                f"lower it to {smallest} or leave this layer out of the target modules"
            )

    def prepare(self, component, model):
        description = super().prepare(component, model)
        initial = get_peft_model_state_dict(model)
        self._initial[component] = {name: tensor.detach().cpu().clone() for name, tensor in initial.items()}
        return description

    def weights(self, component, model):
        weights = {}
        for name, trained in get_peft_model_state_dict(model).items():
            initial = self._initial[component][name].to(trained)
            weights[name] = torch.cat([trained, initial]) if "lora_A" in name else torch.cat([trained, -initial], dim=1)
        return weights

    def _saved_settings(self):
        rank = 2 * self.settings.rank
        return {"r": rank, "lora_alpha": rank, "init_lora_weights": True}
