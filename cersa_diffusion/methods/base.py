"""The interface of a fine-tuning method: it prepares models for training, saves the result and opens it again."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cersa_diffusion.methods.settings import MethodSettings

Targets = str | list[str] | None
# The line of Python that loads the base of a result.
BASE_LINE = 'pipe = {pipeline}.from_pretrained("{base}"{options})'


@dataclass(frozen=True)
class Origin:
    """The source of the model before training: a local folder or an id on the hub, its revision, and the variant of its files."""

    name_or_path: str
    revision: str | None = None
    variant: str | None = None

    def to_dict(self) -> dict:
        """The entry for the header of a result."""
        return {"name_or_path": self.name_or_path, "revision": self.revision}


class Method(ABC):
    """One method to fine-tune layers of the components of a pipeline, or of a single model.

    Args:
        settings: settings of the method.
        targets: component -> the layers to train, in the form of `match_targets`; None: all parameters (full fine-tuning only).
            A single model is the component `LONE_COMPONENT`.

    Attributes:
        frozen_in_compute_dtype: whether frozen weights may have 16 bits in mixed precision.
        needs_base: whether the result is opened on the base; otherwise the result is a complete model.
        opening: lines of Python that open the result of a pipeline, with {pipeline}, {base}, {options} and {path}.
    """

    frozen_in_compute_dtype = True
    needs_base = True
    opening: str

    def __init__(self, settings: MethodSettings, targets: Mapping[str, Targets]):
        self.settings, self.targets = settings, dict(targets)

    # Most methods handle every model separately and need no plan.
    def plan(  # noqa: B027
        self, components: Mapping[str, nn.Module], dtype: torch.dtype, *, optimizer="adamw", also_trained: Collection[str] = ()
    ) -> None:
        """Makes decisions that depend on all models, before the first model is changed.

        Args:
            components: name -> model to train.
            dtype: compute dtype of the training.
            optimizer: a key of `OPTIMIZERS`; its state counts as memory.
            also_trained: "component.tensor name" of tensors that are trained in addition to the target layers.
        """

    @abstractmethod
    def prepare(
        self, component: str, model: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> str:
        """Changes a model so that only the parameters of this method are trained; returns a description in one line.

        Args:
            component: name of the component in `targets`.
            model: changed in place; if an error is raised, its layers are not changed.
            device, dtype: device and compute dtype of the training, to which the caller moves and casts (`cast_frozen`) the model
                afterwards: a method may bring large weights into this form at once. Default: those of the model.

        Raises:
            ConfigError: the method cannot be applied to the target layers.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Casts the frozen weights of a prepared model to the compute dtype; the trained weights stay float32."""
        if self.frozen_in_compute_dtype:
            # A cast to the compute dtype and back would round the initial values of the trained weights.
            trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
            model.to(dtype=dtype)
            for parameter, data in trained.items():
                parameter.data = data.float()

    @abstractmethod
    def save(self, components: Mapping[str, nn.Module], folder: Path, origin: Origin, training: dict) -> Path:
        """Writes the result for a pipeline into an existing folder; returns the file or folder that `open` reads.

        Args:
            components: name -> trained model.
            folder: the folder.
            origin: the source of the pipeline.
            training: description of the run, for the header of the file.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path, base: str, **options) -> DiffusionPipeline:
        """Opens the result at the path that `save` returned, as the code in `opening` does.

        Args:
            path: file or folder of the result.
            base: the base of the run.
            options: options of `load_base`.
        """

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path, head: Sequence[str], origin: Origin, training: dict) -> Path:
        """Writes the result for a model of transformers with a trained head; returns the file with the trained weights.

        Args:
            model, folder, origin, training: as in `save`, for a single model.
            head: names of the modules that every method trains.
        """

    @classmethod
    @abstractmethod
    def open_model(cls, model: nn.Module, folder: Path) -> nn.Module:
        """Opens what `save_model` wrote into a folder; returns the trained model.

        Args:
            model: the base, or without `needs_base` the model in the folder; changed in place.
            folder: the folder.
        """


def head_state(model: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
    """The weights of the modules `head`, by their names in the model, in CPU memory."""
    return {
        f"{module}.{name}": tensor.detach().cpu().contiguous()
        for module in head
        for name, tensor in model.get_submodule(module).state_dict().items()
    }
