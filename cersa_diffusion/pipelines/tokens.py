"""The inputs of the layers of a pipeline in one training step."""

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.memory.cost import LayerInput
from cersa_diffusion.memory.tokens import count_tokens
from cersa_diffusion.private_names import FAKE_TENSOR_MODE


def pipeline_tokens(pipeline, batch: int, resolution: int | None = None) -> dict[str, LayerInput]:
    """The inputs of the linear layers of denoiser and text encoders in one training step, from a forward pass without data.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        batch: pictures per step, including the class pictures of prior preservation.
        resolution: width and height of the pictures in pixels; None: the native resolution of the denoiser.

    Raises:
        ConfigError: `batch` is below 1, or the VAE cannot encode pictures of this resolution.
    """
    # Imported here: diffusers is slow to import.
    from cersa_diffusion.families.table import family_of

    family = family_of(type(pipeline).__name__)
    if family is None:
        raise ConfigError(f"{type(pipeline).__name__} belongs to no family of pipelines whose tokens can be counted")
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
            # As in the trainer, the prompt is encoded once for all pictures.
            conditions = family.collate(family.encode(pipeline, [""], {}) * batch)
            latents = torch.zeros(batch, *family.latent_shape(pipeline, resolution), dtype=denoiser.dtype, device=device)
            timesteps, sizes = torch.zeros(batch, dtype=torch.long, device=device), torch.zeros(batch, 6, device=device)
            family.predict(denoiser, latents, timesteps, conditions, sizes)

    return count_tokens(components, forward)
