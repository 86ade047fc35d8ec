"""What the methods do differently: prepare the models for training, save the result, open it again. All else is shared."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from cersa_diffusion.adapter import save_adapter
from cersa_diffusion.adapter_file import DEFAULT_FILE_NAME
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.inject import InjectionReport, inject_cersa, match_targets
from cersa_diffusion.pipelines import load_cersa_weights
from cersa_diffusion.planner import choose_ranks
from cersa_diffusion.training.base import TARGET_MODULES, load_base
from cersa_diffusion.training.config import DreamBoothConfig

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"


BASE_LINE = 'pipe = StableDiffusionPipeline.from_pretrained("{base}")'


class Method(ABC):
    """One way to fine-tune the target layers of the components."""

    # The lines of Python that open the result, with {base} and {path}.
    opening: str

    # Whether the frozen weights may be kept in 16 bit under mixed precision.
    frozen_in_compute_dtype = True

    def __init__(self, config: DreamBoothConfig):
        self.config = config

    def targets(self, component: str) -> str | list[str]:
        """Which layers of a component are trained, as `match_targets` takes it."""
        return self.config.target_modules(component) or TARGET_MODULES[component]

    # Most methods take every model on its own.
    def plan(self, components: dict[str, nn.Module], dtype: torch.dtype) -> None:  # noqa: B027
        """Looks at all models together before the first one is changed.

        Args:
            components: the models to train by name.
            dtype: compute dtype of the training.
        """

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

    @classmethod
    @abstractmethod
    def open(cls, weights_path: Path, base: str, **options) -> DiffusionPipeline:
        """Opens a result in a fresh pipeline, through the loader its users have.

        Args:
            weights_path: what `save` returned.
            base: the base the run started from.
            options: of `load_base`.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights to the compute dtype, the trained ones stay float32."""
        if self.frozen_in_compute_dtype:
            model.to(dtype=dtype)
            cast_training_params(model, dtype=torch.float32)


class CersaMethod(Method):
    """Cores in the basis of every target layer's weight: CERSA, and SVFit and SVFT as settings of it."""

    opening = BASE_LINE + '\npipe.load_cersa_weights("{path}")'

    def __init__(self, config: DreamBoothConfig):
        super().__init__(config)
        self.ranks: dict[str, dict[str, LayerRanks | None]] = {}
        self.reports: dict[str, InjectionReport] = {}

    def _cersa_config(self, component: str) -> CersaConfig:
        return self.config.cersa_config(self.targets(component))

    def plan(self, components: dict[str, nn.Module], dtype: torch.dtype) -> None:
        if self.config.memory_budget is not None:
            configs = {name: self._cersa_config(name) for name in components}
            self.ranks = choose_ranks(components, configs, weight_dtype=dtype)

    def prepare(self, component: str, model: nn.Module) -> str:
        report = inject_cersa(model, self._cersa_config(component), ranks=self.ranks.get(component))
        self.reports[component] = report
        return str(report)

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        path = output_dir / DEFAULT_FILE_NAME
        save_adapter(
            components,
            path,
            config={name: self._cersa_config(name).to_dict() for name in components},
            base_model={"name_or_path": self.config.pretrained_model_name_or_path, "revision": self.config.revision},
            training=facts,
        )
        return path

    @classmethod
    def open(cls, weights_path: Path, base: str, **options) -> DiffusionPipeline:
        pipeline = load_base(base, **options)
        load_cersa_weights(pipeline, weights_path)
        return pipeline


class LoraMethod(Method):
    """LoRA by the peft library, saved so that the stock loader of diffusers drops nothing."""

    label, settings = "LoRA", {}
    opening = BASE_LINE + '\npipe.load_lora_weights("{path}")'

    def prepare(self, component: str, model: nn.Module) -> str:
        rank, layers = self.config.rank, match_targets(model, self.targets(component))
        self._check_layers(layers)
        # Whole names, so that these very layers are trained and no convolution of the same ending; without the prefix of the
        # text encoder's names, which not all transformers versions have (peft takes them as endings).
        names = [name.removeprefix("text_model.") for name in layers]
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **self.settings))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with {self.label} of rank {rank}: {trained / 1e6:.2f} M trained"

    # Only PiSSA takes its rank from the weight.
    def _check_layers(self, layers: dict[str, nn.Linear]) -> None:
        """Refuses layers that the method cannot be applied to."""

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        # Keys in PEFT's own format and with its metadata: in diffusers' key format the loader silently drops every
        # attention layer once LoRA also sits on other linear layers, and a lora_alpha other than the rank is lost.
        layers = {f"{name}_lora_layers": self._weights(name, model) for name, model in components.items()}
        StableDiffusionPipeline.save_lora_weights(output_dir, weight_name=LORA_FILE_NAME, **layers, **self._metadata(components))
        return output_dir / LORA_FILE_NAME

    def _weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        return get_peft_model_state_dict(model)

    def _metadata(self, components: dict[str, nn.Module]) -> dict[str, dict]:
        return _collate_lora_metadata(components)

    @classmethod
    def open(cls, weights_path: Path, base: str, **options) -> DiffusionPipeline:
        pipeline = load_base(base, **options)
        pipeline.load_lora_weights(weights_path.parent, weight_name=weights_path.name)
        return pipeline


class DoraMethod(LoraMethod):
    """DoRA (Liu et al., arXiv 2402.09353): LoRA on the direction of the weight, its magnitude trained beside it."""

    label, settings = "DoRA", {"use_dora": True}

    def _weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        # PEFT leaves ".weight" off these names; transformers' loader of adapters, which text encoders go through, then finds no
        # place for them and goes on with magnitudes of the base. With it both loaders put them in their place.
        ending = "lora_magnitude_vector"
        weights = get_peft_model_state_dict(model)
        return {f"{name}.weight" if name.endswith(ending) else name: tensor for name, tensor in weights.items()}


class PissaMethod(LoraMethod):
    """PiSSA (Meng et al., arXiv 2404.02948): A and B start as the leading components, the base keeps the rest.

    The base that is trained on is not the one others have, so what is saved is the change, as a LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``.
    """

    label, settings = "PiSSA", {"init_lora_weights": "pissa"}

    def __init__(self, config: DreamBoothConfig):
        super().__init__(config)
        self.initial: dict[str, dict[str, Tensor]] = {}

    def _check_layers(self, layers: dict[str, nn.Linear]) -> None:
        name, smallest = min(((name, min(layer.weight.shape)) for name, layer in layers.items()), key=lambda item: item[1])
        if smallest < self.config.rank:
            raise ConfigError(
                f"rank is {self.config.rank}, but layer {name} has only {smallest} components for PiSSA to start from: "
                f"lower it to {smallest} or leave this layer out of the target modules"
            )

    def prepare(self, component: str, model: nn.Module) -> str:
        description = super().prepare(component, model)
        self.initial[component] = {
            name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()
        }
        return description

    def _weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        weights = {}
        for name, trained in get_peft_model_state_dict(model).items():
            initial = self.initial[component][name].to(trained)
            weights[name] = torch.cat([trained, initial]) if "lora_A" in name else torch.cat([trained, -initial], dim=1)
        return weights

    def _metadata(self, components: dict[str, nn.Module]) -> dict[str, dict]:
        plain = {"r": 2 * self.config.rank, "lora_alpha": 2 * self.config.rank, "init_lora_weights": True}
        return {name: settings | plain for name, settings in super()._metadata(components).items()}


class FullMethod(Method):
    """The same layers dense; saved as a whole pipeline, as diffusers' train_dreambooth.py does."""

    frozen_in_compute_dtype = False
    opening = 'pipe = StableDiffusionPipeline.from_pretrained("{path}")'

    def prepare(self, component: str, model: nn.Module) -> str:
        layers = match_targets(model, self.targets(component))
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

    @classmethod
    def open(cls, weights_path: Path, base: str, **options) -> DiffusionPipeline:
        # The result is a pipeline of its own: the base's revision says nothing about it.
        return load_base(str(weights_path), dtype=options.get("dtype", torch.float32))


METHODS: dict[str, type[Method]] = {
    "cersa": CersaMethod,
    "svfit": CersaMethod,
    "svft": CersaMethod,
    "lora": LoraMethod,
    "pissa": PissaMethod,
    "dora": DoraMethod,
    "full": FullMethod,
}


def load_result(
    method: str, weights_path: Path, base: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> DiffusionPipeline:
    """Opens the result of a run in a fresh pipeline, through the loader its users have.

    Args:
        method: a key of `METHODS`.
        weights_path: what `TrainResult.weights_path` says.
        base: the base the run started from.
        dtype: dtype of the pipeline.
        revision: revision of the base.
    """
    return METHODS[method].open(weights_path, base, dtype=dtype, revision=revision)
