"""The class pictures for prior preservation, which the base draws."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from cersa_diffusion.config import PRECISIONS
from cersa_diffusion.errors import NonFiniteError
from cersa_diffusion.pictures import picture_paths
from cersa_diffusion.training.settings.config import DreamBoothConfig


def sample_class_pictures(pipeline: DiffusionPipeline, config: DreamBoothConfig) -> None:
    """Adds lossless pictures by the base pipeline to the class folder, up to `num_class_images`; each has its own seed."""
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = len(picture_paths(folder, "class_data_dir")) if any(folder.iterdir()) else 0
    # New numbers start after the last one: a reused number would have the same seed and restore a picture that the user deleted.
    numbered = [int(path.stem[6:]) for path in folder.glob("class-*.png") if path.stem[6:].isdigit()]
    first = max(present, *(number + 1 for number in numbered), 0)
    missing = range(first, first + config.num_class_images - present)
    pipeline.set_progress_bar_config(disable=True)
    dtype = PRECISIONS[config.prior_generation_precision]
    precision = torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32)
    with tqdm(total=len(missing), desc="class pictures", unit="picture", disable=not missing) as bar, precision:
        for start in range(0, len(missing), config.sample_batch_size):
            numbers = missing[start : start + config.sample_batch_size]
            generators = [torch.Generator().manual_seed(config.seed * 100_003 + number) for number in numbers]
            latents = pipeline(
                [config.class_prompt] * len(numbers),
                generator=generators,
                height=config.resolution,
                width=config.resolution,
                output_type="latent",
            ).images
            decoded = config.family.decode(pipeline.vae, latents)
            if not torch.isfinite(decoded).all():
                raise NonFiniteError(
                    f"class pictures {numbers[0]} to {numbers[-1]} hold NaN or infinity: choose another "
                    f"prior_generation_precision ({config.prior_generation_precision})"
                )
            for number, picture in zip(numbers, pipeline.image_processor.postprocess(decoded), strict=True):
                temporary = folder / f".class-{number:05d}.tmp"
                picture.save(temporary, format="PNG")
                temporary.rename(folder / f"class-{number:05d}.png")
            bar.update(len(numbers))
