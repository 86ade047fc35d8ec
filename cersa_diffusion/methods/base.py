"""What every way to fine-tune does: prepare models for training, save the result, open it again. All else is shared."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cersa_diffusion.methods.settings import MethodSettings

Targets = str | list[str] | None
# A line of Python that opens the base of a result.
BASE_LINE = 'pipe = {pipeline}.from_pretrained("{base}"{options})'


@dataclass(frozen=True)
class Origin:
    """What was loaded before the training: a local folder or an id on the hub, its revision, and the variant of its files."""

    name_or_path: str
    revision: str | None = None
    variant: str | None = None

    def to_dict(self) -> dict:
        """As the headers of results name it."""
        return {"name_or_path": self.name_or_path, "revision": self.revision}


class Method(ABC):
    """One way to fine-tune given layers of the components of a pipeline, or of a model on its own.

    Args:
        settings: of the method.
        targets: component -> the layers that are trained, as `match_targets` takes them; None, for full fine-tuning only: every
            parameter. A model on its own is the component `LONE_COMPONENT`.

    Attributes:
        frozen_in_compute_dtype: whether the frozen weights may be kept in 16 bit under mixed precision.
        needs_base: whether a result is opened on the base; without it the result is a model of its own.
        opening: the lines of Python that open a pipeline's result, with {pipeline}, {base}, {options} and {path}.
    """

    frozen_in_compute_dtype = True
    needs_base = True
    opening: str

    def __init__(self, settings: MethodSettings, targets: Mapping[str, Targets]):
        self.settings, self.targets = settings, dict(targets)

    # Most methods take every model on its own.
    def plan(  # noqa: B027
        self,
        components: Mapping[str, nn.Module],
        dtype: torch.dtype,
        *,
        optimizer: str = "adamw",
        also_trained: Collection[str] = (),
    ) -> None:
        """Looks at all models together before the first one is changed.

        Args:
            components: the models to train by name.
            dtype: compute dtype of the training.
            optimizer: whose state counts, a key of `OPTIMIZERS`.
            also_trained: "component.tensor name" of what is trained beside the target layers.
        """

    @abstractmethod
    def prepare(self, component: str, model: nn.Module) -> str:
        """Changes a model so that just this method's parameters are trained; returns a line that says what was done.

        Args:
            component: its name in `targets`.
            model: changed in place; all or nothing.

        Raises:
            ConfigError: the method cannot be applied to the layers that were asked for.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights of a prepared model to the compute dtype, the trained ones stay float32."""
        if self.frozen_in_compute_dtype:
            # Set aside: rounded and turned back they would not be what the method began with.
            trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
            model.to(dtype=dtype)
            for parameter, data in trained.items():
                parameter.data = data.float()

    @abstractmethod
    def save(self, components: Mapping[str, nn.Module], folder: Path, origin: Origin, training: dict) -> Path:
        """Writes the result for a pipeline; returns the file or folder that `open` takes.

        Args:
            components: the trained models by name.
            folder: an existing one.
            origin: of the pipeline.
            training: what the file's header says of the run.
        """

    @classmethod
    @abstractmethod
    def open(cls, path: Path, base: str, **options) -> DiffusionPipeline:
        """Opens the result of a pipeline in a fresh one, to what `opening` makes of it.

        Args:
            path: what `save` returned.
            base: the base the run started from.
            options: of `load_base`.
        """

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path, head: Sequence[str], origin: Origin, training: dict) -> Path:
        """Writes the result for a model of transformers with a trained head; returns the file with the trained weights.

        Args:
            model: the trained model.
            folder: an existing one.
            head: names of the modules that every method trains.
            origin: of the model.
            training: what the file's header says of the run.
        """

    @classmethod
    @abstractmethod
    def open_model(cls, model: nn.Module, folder: Path) -> nn.Module:
        """Opens what `save_model` wrote.

        Args:
            model: the base, or without `needs_base` the model that the folder holds; changed in place.
            folder: the folder.

        Returns:
            The model as it was trained.
        """


def head_state(model: nn.Module, head: Sequence[str]) -> dict[str, Tensor]:
    """The weights of some modules by their names in the model, in CPU memory.

    Args:
        model: that has them.
        head: names of the modules.
    """
    state = {f"{module}.{name}": t for module in head for name, t in model.get_submodule(module).state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
