"""What training, planning and opening need to know of a family of pipelines."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from cersa_diffusion.families.names import default_targets

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Conditions = dict[str, Tensor]


class Family(ABC):
    """One family of pipelines.

    Attributes:
        pipeline_class: its class in diffusers.
        denoiser: name of the component that takes the noise away.
        text_encoders: names of its text encoders.
        objective: what the denoiser learns, a key of `cersa_diffusion.training.run.objectives.OBJECTIVES`.
        script: what trains it.
        loading: what `from_pretrained` is given beside the path.
    """

    pipeline_class: "type[DiffusionPipeline]"
    denoiser: str
    text_encoders: tuple[str, ...]
    objective: str
    script: str
    loading: ClassVar[Mapping[str, object]]

    @property
    def trained(self) -> dict[str, str | list[str]]:
        """Component -> the layers that are trained by default, as `match_targets` takes them."""
        return {name: default_targets(name) for name in (self.denoiser, *self.text_encoders)}

    def components(self, pipeline: "DiffusionPipeline", *, text_encoders: bool = True) -> dict[str, nn.Module]:
        """The denoiser and the text encoders of a pipeline by name.

        Args:
            pipeline: of this family.
            text_encoders: whether they are wanted.
        """
        names = (self.denoiser, *(self.text_encoders if text_encoders else ()))
        return {name: getattr(pipeline, name) for name in names}

    @abstractmethod
    def check(self, pipeline: "DiffusionPipeline") -> str | None:
        """What keeps a pipeline of this class from being trained, or None.

        Args:
            pipeline: as `from_pretrained` returned it.
        """

    @abstractmethod
    def encode(self, pipeline: "DiffusionPipeline", prompts: Sequence[str], models: Mapping[str, nn.Module]) -> list[Conditions]:
        """What the text encoders give for prompts: for each prompt tensors without a batch dimension.

        Args:
            pipeline: its tokenizers are used, and those of its text encoders that are not in `models`.
            prompts: the prompts.
            models: the models that are trained, by name, as accelerate prepared them.
        """

    def collate(self, captions: Sequence[Conditions]) -> Conditions:
        """The conditions of a batch.

        Args:
            captions: of `encode`, one for each picture.
        """
        return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}

    @abstractmethod
    def pixels_per_latent(self, pipeline: "DiffusionPipeline") -> int:
        """How many pixels a latent has on each side."""

    @abstractmethod
    def native_resolution(self, pipeline: "DiffusionPipeline") -> int:
        """Width and height in pixels of the pictures that the denoiser was made for."""

    @abstractmethod
    def latent_shape(self, pipeline: "DiffusionPipeline", resolution: int) -> tuple[int, ...]:
        """Shape of the latents of one square picture.

        Args:
            pipeline: of this family.
            resolution: width and height in pixels.
        """

    @abstractmethod
    def posterior(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures, as the autoencoder gives them.

        Args:
            vae: the autoencoder.
            pixels: (b, 3, h, w) from -1 to 1, on its device and in its dtype.
        """

    @abstractmethod
    def normalise(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them, float32.

        Args:
            vae: the autoencoder they come from.
            latents: drawn from `posterior`.
        """

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pictures of latents, (b, 3, h, w) float32 from -1 to 1.

        In the autoencoder's own dtype, whatever autocast or the denoiser's dtype say: SDXL's overflows in float16.

        Args:
            vae: the autoencoder.
            latents: as the denoiser has them.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """What the denoiser says of noisy latents.

        Args:
            denoiser: the model, as accelerate prepared it where it is trained.
            noisy: (b, ...) latents in the denoiser's dtype.
            timesteps: (b,) integers.
            conditions: of `collate`.
            sizes: (b, 6) original height and width, top and left of the crop, target height and width, in pixels.

        Returns:
            As `noisy`.
        """
