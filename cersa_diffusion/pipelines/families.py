"""The families of pipelines that are trained, Stable Diffusion 1.x and 2.x, and SDXL: they differ in how prompts are encoded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn


class Family(ABC):
    """One family of pipelines.

    Attributes:
        pipeline_class: its class in diffusers.
        text_encoders: names of its text encoders.
        script: what trains it.
    """

    pipeline_class: type[DiffusionPipeline]
    text_encoders: tuple[str, ...]
    script: str
    # What `from_pretrained` is given beside the path.
    loading: ClassVar[Mapping[str, object]]

    @abstractmethod
    def encode(self, pipeline: DiffusionPipeline, prompts: Sequence[str], models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Embeddings of prompts, each tensor with a row per prompt.

        Args:
            pipeline: its tokenizers are used, and those of its text encoders that are not in `models`.
            prompts: the prompts.
            models: the models that are trained, by name, as accelerate prepared them.
        """

    @abstractmethod
    def unet_arguments(self, embeddings: Mapping[str, Tensor], sizes: Tensor) -> dict:
        """What the UNet takes beside latents and timesteps.

        Args:
            embeddings: of `encode`, a row per picture.
            sizes: (b, 6) original height and width, top and left of the crop, target height and width, in pixels.
        """


def _token_ids(tokenizer, prompts: Sequence[str], device: torch.device) -> Tensor:
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids.to(device)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: the last hidden states of one text encoder."""

    pipeline_class = StableDiffusionPipeline
    text_encoders = ("text_encoder",)
    script = "train_dreambooth_cersa.py"
    loading: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def encode(self, pipeline, prompts, models):
        ids = _token_ids(pipeline.tokenizer, prompts, pipeline.text_encoder.device)
        return {"states": models.get("text_encoder", pipeline.text_encoder)(ids, return_dict=False)[0]}

    def unet_arguments(self, embeddings, sizes):
        return {"encoder_hidden_states": embeddings["states"]}


class StableDiffusionXL(Family):
    """SDXL (Podell et al., arXiv 2307.01952): the last but one hidden states of two text encoders, the pooled output of the
    second, and the sizes of the picture."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    script = "train_dreambooth_cersa_sdxl.py"
    loading: ClassVar = {"add_watermarker": False}

    def encode(self, pipeline, prompts, models):
        states = []
        for name, tokenizer in zip(self.text_encoders, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
            text_encoder = getattr(pipeline, name)
            ids = _token_ids(tokenizer, prompts, text_encoder.device)
            output = models.get(name, text_encoder)(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        # The pooled output is that of the second encoder, the one with a projection.
        return {"states": torch.cat(states, dim=-1), "pooled": output.text_embeds}

    def unet_arguments(self, embeddings, sizes):
        states = embeddings["states"]
        conditions = {"text_embeds": embeddings["pooled"], "time_ids": sizes.to(states)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": conditions}


STABLE_DIFFUSION, STABLE_DIFFUSION_XL = StableDiffusion(), StableDiffusionXL()


def family_of(class_name: str) -> Family | None:
    """The family that a pipeline class, as `model_index.json` names it, belongs to."""
    return {each.pipeline_class.__name__: each for each in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)}.get(class_name)
