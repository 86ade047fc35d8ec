"""What the methods do differently: prepare the models for training, save the result, open it again. All else is shared."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from cersa_diffusion.adapter import save_adapter
from cersa_diffusion.adapter_file import DEFAULT_FILE_NAME
from cersa_diffusion.inject import inject_cersa, match_targets
from cersa_diffusion.pipelines import load_cersa_weights
from cersa_diffusion.training.base import TARGET_MODULES, load_base
from cersa_diffusion.training.config import DreamBoothConfig

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"


class Method(ABC):
    """One way to fine-tune the target layers of the components."""

    # Whether the frozen weights may be kept in 16 bit under mixed precision.
    frozen_in_compute_dtype = True

    def __init__(self, config: DreamBoothConfig):
        self.config = config

    @abstractmethod
    def prepare(self, component: str, model: nn.Module) -> str:
        """Changes a model so that just this method's parameters are trained; returns a line that says what was done."""

    @abstractmethod
    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        """Writes the result; returns the file or folder that `load_result` opens.

        Args:
            components: the trained models by name.
            output_dir: an existing folder.
            facts: of the training run, for the file's header.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights to the compute dtype, the trained ones stay float32."""
        if self.frozen_in_compute_dtype:
            model.to(dtype=dtype)
            cast_training_params(model, dtype=torch.float32)


class CersaMethod(Method):
    """Cores in the principal subspace of every target layer."""

    def prepare(self, component: str, model: nn.Module) -> str:
        return str(inject_cersa(model, self.config.cersa_config(TARGET_MODULES[component])))

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        path = output_dir / DEFAULT_FILE_NAME
        save_adapter(
            components,
            path,
            config={name: self.config.cersa_config(TARGET_MODULES[name]).to_dict() for name in components},
            base_model={"name_or_path": self.config.pretrained_model_name_or_path, "revision": self.config.revision},
            training=facts,
        )
        return path


class LoraMethod(Method):
    """LoRA by the peft library, saved so that the stock loader of diffusers drops nothing."""

    def prepare(self, component: str, model: nn.Module) -> str:
        targets = TARGET_MODULES[component]
        layers = match_targets(model, targets)
        # The text encoder by name endings: they hold in every transformers version, whole names do not.
        names = list(layers) if targets == "all-linear" else targets
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=self.config.rank, lora_alpha=self.config.rank, target_modules=names))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with LoRA of rank {self.config.rank}: {trained / 1e6:.2f} M trained"

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        # Keys in PEFT's own format and with its metadata: in diffusers' key format the loader silently drops every
        # attention layer once LoRA also sits on other linear layers, and a lora_alpha other than the rank is lost.
        layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in components.items()}
        StableDiffusionPipeline.save_lora_weights(
            output_dir, weight_name=LORA_FILE_NAME, **layers, **_collate_lora_metadata(components)
        )
        return output_dir / LORA_FILE_NAME


class FullMethod(Method):
    """The same layers dense; saved as a whole pipeline, as diffusers' train_dreambooth.py does."""

    frozen_in_compute_dtype = False

    def prepare(self, component: str, model: nn.Module) -> str:
        layers = match_targets(model, TARGET_MODULES[component])
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        trained = sum(layer.weight.numel() for layer in layers.values())
        return f"{len(layers)} layers, dense weights: {trained / 1e6:.2f} M trained"

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        config = self.config
        pipeline = load_base(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        pipeline.register_modules(**components)
        folder = output_dir / "pipeline"
        pipeline.save_pretrained(folder)
        return folder


METHODS: dict[str, type[Method]] = {"cersa": CersaMethod, "lora": LoraMethod, "full": FullMethod}


def load_result(
    method: str, weights_path: Path, base: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> DiffusionPipeline:
    """Opens the result of a run in a fresh pipeline, through the loader its users have.

    Args:
        method: "cersa", "lora" or "full".
        weights_path: what `TrainResult.weights_path` says.
        base: the base the run started from.
        dtype: dtype of the pipeline.
        revision: revision of the base.
    """
    if method == "full":
        return load_base(str(weights_path), dtype=dtype)
    pipeline = load_base(base, dtype=dtype, revision=revision)
    if method == "lora":
        pipeline.load_lora_weights(weights_path.parent, weight_name=weights_path.name)
    else:
        load_cersa_weights(pipeline, weights_path)
    return pipeline
