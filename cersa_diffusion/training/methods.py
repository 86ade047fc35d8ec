"""What the methods do differently: prepare the models for training, save the result, open it again. All else is shared."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME
from cersa_diffusion.adapters.save import save_adapter
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.inject import InjectionReport
from cersa_diffusion.memory.plan import choose_ranks
from cersa_diffusion.methods.adaptations import LORA_FAMILY, Adaptation, CersaAdaptation, FullAdaptation, LoraAdaptation
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, load_lora, save_lora
from cersa_diffusion.pipelines.methods import load_cersa_weights
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training.run.optimizers import optimizer_name
from cersa_diffusion.training.settings.config import DreamBoothConfig

BASE_LINE = 'pipe = {pipeline}.from_pretrained("{base}"{options})'


class Method(ABC):
    """One way to fine-tune the target layers of the components."""

    # The lines of Python that open the result, with {pipeline}, {base}, {options} of loading the base, and {path}.
    opening: str

    def __init__(self, config: DreamBoothConfig):
        self.config = config
        self.adaptations: dict[str, Adaptation] = {}

    def targets(self, component: str) -> str | list[str]:
        """Which layers of a component are trained, as `match_targets` takes it."""
        return self.config.target_modules(component) or self.config.family.trained[component]

    # Most methods take every model on its own.
    def plan(self, components: dict[str, nn.Module], dtype: torch.dtype) -> None:  # noqa: B027
        """Looks at all models together before the first one is changed.

        Args:
            components: the models to train by name.
            dtype: compute dtype of the training.
        """

    @abstractmethod
    def adaptation(self, component: str) -> Adaptation:
        """What this method does to a component."""

    def prepare(self, component: str, model: nn.Module) -> str:
        """Changes a model so that just this method's parameters are trained; returns a line that says what was done."""
        self.adaptations[component] = self.adaptation(component)
        return self.adaptations[component].prepare(model)

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
        """Opens a result in a fresh pipeline, to what `opening` makes of it.

        Args:
            weights_path: what `save` returned.
            base: the base the run started from.
            options: of `load_base`.
        """

    def cast_frozen(self, component: str, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights of a prepared component to the compute dtype, the trained ones stay float32."""
        self.adaptations[component].cast_frozen(model, dtype)


class CersaMethod(Method):
    """Cores in the basis of every target layer's weight: CERSA, and SVFit and SVFT as settings of it."""

    opening = BASE_LINE + '\npipe.load_cersa_weights("{path}")'

    def __init__(self, config: DreamBoothConfig):
        super().__init__(config)
        self.ranks: dict[str, dict[str, LayerRanks | None]] = {}

    @property
    def reports(self) -> dict[str, InjectionReport]:
        """What the injection did, by component."""
        return {name: adaptation.report for name, adaptation in self.adaptations.items()}

    def _cersa_config(self, component: str) -> CersaConfig:
        return self.config.cersa_config(self.targets(component))

    def plan(self, components: dict[str, nn.Module], dtype: torch.dtype) -> None:
        if self.config.memory_budget is not None:
            configs = {name: self._cersa_config(name) for name in components}
            self.ranks = choose_ranks(components, configs, weight_dtype=dtype, optimizer=optimizer_name(self.config))

    def adaptation(self, component: str) -> CersaAdaptation:
        return CersaAdaptation(self._cersa_config(component), self.ranks.get(component))

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

    opening = BASE_LINE + '\npipe.load_lora_weights("{path}")'

    def adaptation(self, component: str) -> LoraAdaptation:
        return LORA_FAMILY[self.config.method](self.targets(component), self.config.rank)

    def save(self, components: dict[str, nn.Module], output_dir: Path, facts: dict) -> Path:
        path = output_dir / LORA_FILE_NAME
        weights = {name: self._weights(name, model) for name, model in components.items()}
        settings = {
            name: model.peft_config["default"].to_dict() | self.adaptations[name].saved_settings()
            for name, model in components.items()
        }
        save_lora(path, weights, settings)
        return path

    def _weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        return self.adaptations[component].weights(model)

    @classmethod
    def open(cls, weights_path: Path, base: str, **options) -> DiffusionPipeline:
        pipeline = load_base(base, **options)
        load_lora(pipeline, weights_path)
        return pipeline


class DoraMethod(LoraMethod):
    """DoRA: its magnitudes need other names in pipelines."""

    def _weights(self, component: str, model: nn.Module) -> dict[str, Tensor]:
        # PEFT leaves ".weight" off these names; transformers' loader of adapters, which text encoders go through, then finds no
        # place for them and goes on with magnitudes of the base. With it both loaders put them in their place.
        ending = "lora_magnitude_vector"
        weights = super()._weights(component, model)
        return {f"{name}.weight" if name.endswith(ending) else name: tensor for name, tensor in weights.items()}


class FullMethod(Method):
    """The same layers dense; saved as a whole pipeline, as diffusers' train_dreambooth.py does."""

    opening = 'pipe = {pipeline}.from_pretrained("{path}")'

    def adaptation(self, component: str) -> FullAdaptation:
        return FullAdaptation(self.targets(component))

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
    "pissa": LoraMethod,
    "dora": DoraMethod,
    "full": FullMethod,
}


def load_result(
    method: str,
    weights_path: Path,
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Opens the result of a run in a fresh pipeline, to what the lines printed at the end of the run make of it.

    Args:
        method: a key of `METHODS`.
        weights_path: what `TrainResult.weights_path` says.
        base: the base the run started from.
        dtype: dtype of the pipeline.
        revision: revision of the base.
        variant: of the base's weight files.
    """
    return METHODS[method].open(weights_path, base, dtype=dtype, revision=revision, variant=variant)
