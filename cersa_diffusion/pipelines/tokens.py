"""What the layers of a pipeline are given in one training step."""

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.memory.cost import LayerInput
from cersa_diffusion.memory.tokens import count_tokens
from cersa_diffusion.private_names import FAKE_TENSOR_MODE


def pipeline_tokens(pipeline, batch: int, resolution: int | None = None) -> dict[str, LayerInput]:
    """What the linear layers of the denoiser and the text encoders are given in one step of training, by a pass without data.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        batch: pictures per step, the class pictures of prior preservation among them.
        resolution: width and height of the pictures in pixels; None: what the denoiser was made for.

    Raises:
        ConfigError: no pictures, or a resolution that the VAE cannot encode.
    """
    # Imported here: diffusers is slow to import.
    from cersa_diffusion.families.table import family_of

    family = family_of(type(pipeline).__name__)
    if family is None:
        raise ConfigError(f"a {type(pipeline).__name__} is of no family whose prompts can be encoded here")
    factor = family.pixels_per_latent(pipeline)
    resolution = family.native_resolution(pipeline) if resolution is None else resolution
    if batch < 1:
        raise ConfigError(f"batch is {batch}, expected at least 1")
    if resolution < factor or resolution % factor:
        raise ConfigError(f"resolution is {resolution}, expected a multiple of the VAE's {factor} pixels per latent")
    components, device = family.components(pipeline), pipeline.device

    def forward() -> None:
        with FAKE_TENSOR_MODE.get()(allow_non_fake_inputs=True), torch.no_grad():
            denoiser = components[family.denoiser]
            # As in the trainer: the prompt is encoded once and shared by all pictures.
            conditions = family.collate(family.encode(pipeline, [""], {}) * batch)
            latents = torch.zeros(batch, *family.latent_shape(pipeline, resolution), dtype=denoiser.dtype, device=device)
            timesteps, sizes = torch.zeros(batch, dtype=torch.long, device=device), torch.zeros(batch, 6, device=device)
            family.predict(denoiser, latents, timesteps, conditions, sizes)

    return count_tokens(components, forward)
