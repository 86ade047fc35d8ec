"""SDXL: a UNet with the hidden states of two text encoders, the pooled output of the second, and the sizes of the picture."""

from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from cersa_diffusion.families.stable_diffusion import StableDiffusion, token_ids


class StableDiffusionXL(StableDiffusion):
    """SDXL (Podell et al., arXiv 2307.01952): the penultimate hidden states of both text encoders are concatenated."""

    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    script = "train_dreambooth_cersa_sdxl.py"
    loading: ClassVar = {"add_watermarker": False}

    def encode(self, pipeline, prompts, models):
        states = []
        for name, tokenizer in zip(self.text_encoders, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
            text_encoder = getattr(pipeline, name)
            ids = token_ids(tokenizer, prompts, text_encoder.device)
            output = models.get(name, text_encoder)(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        # `output` is now that of the second encoder, which has a projection and so a pooled output.
        rows = zip(torch.cat(states, dim=-1).unbind(), output.text_embeds.unbind(), strict=True)
        return [{"states": row, "pooled": pooled} for row, pooled in rows]

    def normalise(self, vae, latents):
        mean, std = _latent_statistics(vae, latents)
        return super().normalise(vae, (latents - mean) / std)

    def decode(self, vae, latents):
        mean, std = _latent_statistics(vae, latents)
        return super().decode(vae, latents * std + mean * vae.config.scaling_factor)

    def predict(self, denoiser, noisy, timesteps, conditions, sizes):
        states = conditions["states"]
        added = {"text_embeds": conditions["pooled"], "time_ids": sizes.to(states)}
        return denoiser(noisy, timesteps, return_dict=False, encoder_hidden_states=states, added_cond_kwargs=added)[0]


def _latent_statistics(vae: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, which the VAEs of some derivatives of SDXL name; 0 and 1 for the others."""
    named = [getattr(vae.config, name, None) for name in ("latents_mean", "latents_std")]
    if None in named:
        named = [[0.0] * latents.shape[1], [1.0] * latents.shape[1]]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in named)
    return mean, std


STABLE_DIFFUSION_XL = StableDiffusionXL()
