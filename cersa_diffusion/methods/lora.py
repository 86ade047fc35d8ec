"""LoRA, DoRA and PiSSA with the peft library, saved in such a way that the loaders of diffusers and peft load all tensors."""

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
from cersa_diffusion.layers.kinds import form_of, is_quantised
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.methods.base import BASE_LINE, Method, head_state
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, add_lora, load_lora, save_lora
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.text import one_line

# Name of the weight file in peft's folders.
PEFT_FILE_NAME = "adapter_model.safetensors"


class LoraMethod(Method):
    """LoRA (Hu et al., arXiv 2106.09685); lora_alpha is the rank, so that the scale is 1."""

    label: ClassVar[str] = "LoRA"
    # Additional arguments of `LoraConfig`.
    lora_settings: ClassVar[dict] = {}
    opening = BASE_LINE + '\npipe.load_lora_weights("{path}")'

    def prepare(self, component, model, device=None, dtype=None):
        layers = match_targets(model, self.targets[component])
        self._check_layers(layers)
        # peft matches name endings: whole names exclude convolutions with the same ending. The prefix of the text encoder is
        # removed because only some versions of transformers have it.
        names = [name.removeprefix("text_model.") for name in layers]
        model.requires_grad_(False)
        rank = self.settings.rank
        add_lora(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **self.lora_settings))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with {self.label} of rank {rank}: {trained / 1e6:.2f} M trained"

    # Only PiSSA has a condition: its rank must not exceed that of the weight.
    def _check_layers(self, layers: Mapping[str, nn.Module]) -> None:
        """Raises ConfigError if the method cannot be applied to these layers."""

    def weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        """The trained change as a LoRA on the original base, with peft's names without its prefix."""
        return get_peft_model_state_dict(model)

    def _saved_settings(self) -> dict:
        """The settings with which `weights` are loaded, where they differ from the settings of training."""
        return {}

    def _with_pipeline_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with the names that the loaders of pipelines expect."""
        return weights

    def save(self, components, folder, origin, training):
        path = folder / LORA_FILE_NAME
        weights = {name: self._with_pipeline_names(self.weights(name, model)) for name, model in components.items()}
        settings = {name: model.peft_config["default"].to_dict() | self._saved_settings() for name, model in components.items()}
        save_lora(path, weights, settings)
        return path

    @classmethod
    def open(cls, path, base, **options):
        pipeline = load_base(base, **options)
        load_lora(pipeline, path)
        return pipeline

    def save_model(self, model, folder, head, origin, training):
        """Writes the files of peft's save_pretrained; the adapter includes the change that PiSSA makes to the base."""
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
            raise AdapterFormatError(f"{path} is not a readable LoRA ({error}): train it again") from error
        except (RuntimeError, KeyError) as error:
            raise BaseMismatchError(f"{path} does not fit {type(model).__name__}: {one_line(error, 500)}") from error
        # peft only warns about layers that are missing in the file, and ignores tensors for layers that the model lacks. Without
        # save_embedding_layers=False it would look for the configuration of the base, possibly on the hub.
        different = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() ^ stored.keys())
        if different:
            raise BaseMismatchError(f"{path}: {different[0]} is in the file or in {type(model).__name__}, but must be in both")
        return adapted


class DoraMethod(LoraMethod):
    """DoRA (Liu et al., arXiv 2402.09353): LoRA on the direction of the weight; the magnitude is trained separately."""

    label, lora_settings = "DoRA", {"use_dora": True}

    def _with_pipeline_names(self, weights):
        # peft omits ".weight" from these names. The adapter loader of transformers, which loads text encoders, then ignores the
        # magnitudes and uses those of the base. With ".weight" both loaders load them.
        ending = "lora_magnitude_vector"
        return {f"{name}.weight" if name.endswith(ending) else name: tensor for name, tensor in weights.items()}


class PissaMethod(LoraMethod):
    """PiSSA (Meng et al., arXiv 2404.02948): A and B start as the leading components, and the base keeps the rest.

    Training therefore changes the base. The saved file is the change of the original base, as a LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``.
    """

    label, lora_settings = "PiSSA", {"init_lora_weights": "pissa"}

    def __init__(self, settings, targets):
        super().__init__(settings, targets)
        self._initial: dict[str, dict[str, Tensor]] = {}

    def _check_layers(self, layers):
        quantised = next((name for name, layer in layers.items() if is_quantised(layer)), None)
        if quantised:
            raise ConfigError(
                f"layer {quantised} is quantised, and PiSSA would change its weight: load the base without quantisation, or "
                "train with method cersa or lora"
            )
        name, smallest = min(((name, min(form_of(layer).shape)) for name, layer in layers.items()), key=lambda item: item[1])
        if smallest < self.settings.rank:
            raise ConfigError(
                f"rank is {self.settings.rank}, but layer {name} has only {smallest} components for the start of PiSSA: "
                f"lower the rank to {smallest}, or remove this layer from the target modules"
            )

    def prepare(self, component, model, device=None, dtype=None):
        # peft decomposes the weights where they are.
        model.to(device)
        description = super().prepare(component, model, device, dtype)
        state = get_peft_model_state_dict(model)
        self._initial[component] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
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
