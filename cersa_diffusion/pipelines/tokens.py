"""What the layers of a pipeline are given in one training step."""

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.memory.cost import LayerInput
from cersa_diffusion.memory.tokens import count_tokens
from cersa_diffusion.private_names import FAKE_TENSOR_MODE


def pipeline_tokens(pipeline, batch: int, resolution: int | None = None) -> dict[str, LayerInput]:
    """What the linear layers of UNet and text encoder are given in one training step, by a forward pass without data.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        batch: pictures per step, the class pictures of prior preservation among them.
        resolution: width and height of the pictures in pixels; None: what the UNet was made for.

    Raises:
        ConfigError: no pictures, or a resolution that the VAE cannot encode.
    """
    # Imported here: the planner works without diffusers.
    from cersa_diffusion.pipelines.families import family_of

    unet, family = pipeline.unet, family_of(type(pipeline).__name__)
    if family is None:
        raise ConfigError(f"a {type(pipeline).__name__} is of no family whose prompts can be encoded here")
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    resolution = unet.config.sample_size * factor if resolution is None else resolution
    if batch < 1:
        raise ConfigError(f"batch is {batch}, expected at least 1")
    if resolution < factor or resolution % factor:
        raise ConfigError(f"resolution is {resolution}, expected a multiple of the VAE's {factor} pixels per latent")

    def forward() -> None:
        with FAKE_TENSOR_MODE.get()(allow_non_fake_inputs=True), torch.no_grad():
            side, device = resolution // factor, pipeline.device
            # As in the trainer: the prompt is encoded once and shared by all pictures.
            embeddings = family.encode(pipeline, [""], {})
            embeddings = {name: rows.expand(batch, *rows.shape[1:]).clone() for name, rows in embeddings.items()}
            conditions = family.unet_arguments(embeddings, torch.zeros(batch, 6, device=device))
            latents = torch.zeros(batch, unet.config.in_channels, side, side, dtype=unet.dtype, device=device)
            unet(latents, torch.zeros(batch, dtype=torch.long, device=device), **conditions)

    components = {name: getattr(pipeline, name) for name in ("unet", *family.text_encoders)}
    return count_tokens(components, forward)
