"""Stable Diffusion 1.x and 2.x: a UNet with the last hidden states of one text encoder."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from cersa_diffusion.families.base import Family

PREDICTION_TYPES = ("epsilon", "v_prediction")


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752)."""

    pipeline_class = StableDiffusionPipeline
    denoiser = "unet"
    text_encoders = ("text_encoder",)
    objective = "ddpm"
    script = "train_dreambooth_cersa.py"
    loading: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def check(self, pipeline):
        channels = pipeline.unet.config.in_channels
        if channels != pipeline.vae.config.latent_channels:
            return f"its UNet has {channels} input channels (inpainting?), expected {pipeline.vae.config.latent_channels}"
        prediction_type = pipeline.scheduler.config.prediction_type
        if prediction_type not in PREDICTION_TYPES:
            return f"its prediction_type is {prediction_type!r}, expected {' or '.join(PREDICTION_TYPES)}"
        return None

    def encode(self, pipeline, prompts, models):
        ids = token_ids(pipeline.tokenizer, prompts, pipeline.text_encoder.device)
        states = models.get("text_encoder", pipeline.text_encoder)(ids, return_dict=False)[0]
        return [{"states": row} for row in states.unbind()]

    def pixels_per_latent(self, pipeline):
        return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)

    def native_resolution(self, pipeline):
        return pipeline.unet.config.sample_size * self.pixels_per_latent(pipeline)

    def latent_shape(self, pipeline, resolution):
        side = resolution // self.pixels_per_latent(pipeline)
        return (pipeline.unet.config.in_channels, side, side)

    def posterior(self, vae, pixels):
        distribution = vae.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def normalise(self, vae, latents):
        return (latents * vae.config.scaling_factor).float()

    def decode(self, vae, latents):
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float()

    def predict(self, denoiser, noisy, timesteps, conditions, sizes):
        return denoiser(noisy, timesteps, return_dict=False, encoder_hidden_states=conditions["states"])[0]


def token_ids(tokenizer, prompts: Sequence[str], device: torch.device) -> Tensor:
    """(prompts, length) token ids, padded or truncated to the length of the text encoder."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids.to(device, non_blocking=True)


STABLE_DIFFUSION = StableDiffusion()
