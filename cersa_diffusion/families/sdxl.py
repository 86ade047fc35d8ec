"""SDXL: a UNet with the hidden states of two text encoders, the pooled output of the second, and the sizes of the picture."""

from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline

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

    def predict(self, denoiser, noisy, timesteps, conditions, sizes):
        states = conditions["states"]
        added = {"text_embeds": conditions["pooled"], "time_ids": sizes.to(states)}
        return denoiser(noisy, timesteps, return_dict=False, encoder_hidden_states=states, added_cond_kwargs=added)[0]


STABLE_DIFFUSION_XL = StableDiffusionXL()
