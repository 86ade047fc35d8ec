"""The interface of a family of pipelines, for training, memory planning and loading."""

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
        denoiser: name of the component that removes the noise.
        text_encoders: names of its text encoders.
        objective: training objective of the denoiser, a key of `cersa_diffusion.training.run.objectives.OBJECTIVES`.
        script: name of the training script.
        loading: additional arguments of `from_pretrained`.
    """

    pipeline_class: "type[DiffusionPipeline]"
    denoiser: str
    text_encoders: tuple[str, ...]
    objective: str
    script: str
    loading: ClassVar[Mapping[str, object]]

    @property
    def trained(self) -> dict[str, str | list[str]]:
        """Component -> the layers that are trained by default, in the form of `match_targets`."""
        return {name: default_targets(name) for name in (self.denoiser, *self.text_encoders)}

    def components(self, pipeline: "DiffusionPipeline", *, text_encoders: bool = True) -> dict[str, nn.Module]:
        """Name -> model, for the denoiser and (with `text_encoders`) the text encoders of a pipeline."""
        names = (self.denoiser, *(self.text_encoders if text_encoders else ()))
        return {name: getattr(pipeline, name) for name in names}

    @abstractmethod
    def check(self, pipeline: "DiffusionPipeline") -> str | None:
        """The reason why a loaded pipeline of this class cannot be trained, or None."""

    @abstractmethod
    def encode(self, pipeline: "DiffusionPipeline", prompts: Sequence[str], models: Mapping[str, nn.Module]) -> list[Conditions]:
        """Encodes prompts with the text encoders; the tensors of each prompt have no batch dimension.

        Args:
            pipeline: gives the tokenizers, and the text encoders that are not in `models`.
            prompts: the prompts.
            models: name -> trained model, as accelerate prepared it.
        """

    def collate(self, captions: Sequence[Conditions]) -> Conditions:
        """Joins the results of `encode` for the pictures of a batch."""
        return {name: torch.stack([caption[name] for caption in captions]) for name in captions[0]}

    @abstractmethod
    def pixels_per_latent(self, pipeline: "DiffusionPipeline") -> int:
        """The number of pixels on each side of a latent."""

    @abstractmethod
    def native_resolution(self, pipeline: "DiffusionPipeline") -> int:
        """The width and height in pixels of the pictures that the denoiser was trained on."""

    @abstractmethod
    def latent_shape(self, pipeline: "DiffusionPipeline", resolution: int) -> tuple[int, ...]:
        """The shape of the latents of one square picture, `resolution` pixels wide and high."""

    @abstractmethod
    def posterior(self, vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures, from the encoder of the VAE.

        Args:
            vae: the VAE.
            pixels: (b, 3, h, w) from -1 to 1, with the device and dtype of the VAE.
        """

    @abstractmethod
    def normalise(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Scales latents that were drawn from `posterior` to the range of the denoiser; float32."""

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Decodes latents in the range of the denoiser to pictures, (b, 3, h, w) float32 from -1 to 1.

        The VAE computes in its own dtype, whatever the dtypes of autocast and denoiser are: the VAE of SDXL overflows in float16.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The prediction of the denoiser, with the shape of `noisy`.

        Args:
            denoiser: the model; if it is trained, as accelerate prepared it.
            noisy: (b, ...) noisy latents in the dtype of the denoiser.
            timesteps: (b,) integers.
            conditions: the result of `collate`.
            sizes: (b, 6) original height and width, top and left of the crop, target height and width, in pixels.
        """
