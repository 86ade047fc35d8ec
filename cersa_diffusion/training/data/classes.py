"""The class pictures for prior preservation, which the base draws."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from cersa_diffusion.config import PRECISIONS
from cersa_diffusion.errors import NonFiniteError
from cersa_diffusion.pictures import picture_paths
from cersa_diffusion.pipelines.draw import drawing_dtypes
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.processes import own_share, value_of_first, wait_for_all
from cersa_diffusion.training.settings.config import DreamBoothConfig


def sample_class_pictures(config: DreamBoothConfig, device: torch.device) -> None:
    """Adds lossless pictures by the base to the class folder, up to `num_class_images`; each has its own seed.

    All processes that train together call this, and return when the folder is complete. They draw the batches that one process
    would draw, in turn, so that their number does not change the pictures.

    Args:
        config: the settings; `prior_generation_precision` is the precision of a pipeline that only draws and is then freed.
        device: where this process draws.

    Raises:
        ConfigError: the folder holds files, but no usable picture; or the base cannot be loaded.
        NonFiniteError: a picture holds NaN or infinity.
    """
    # Every process looks, so that all of them fail if the folder cannot be used; the first one decides.
    missing = value_of_first(_missing_numbers(config))
    batches = [missing[start : start + config.sample_batch_size] for start in range(0, len(missing), config.sample_batch_size)]
    own_batches = own_share(batches)
    if own_batches:
        precision = config.prior_generation_precision
        dtypes = drawing_dtypes(None if precision is None else PRECISIONS[precision], device)
        base, origin = config.pretrained_model_name_or_path, {"revision": config.revision, "variant": config.variant}
        _draw(load_base(base, family=config.family, dtype=dtypes, **origin).to(device), config, own_batches)
    wait_for_all()


def _missing_numbers(config: DreamBoothConfig) -> range:
    folder = Path(config.class_data_dir)
    present = len(picture_paths(folder, "class_data_dir")) if folder.is_dir() and any(folder.iterdir()) else 0
    # New numbers start after the last one: a reused number would have the same seed and restore a picture that the user deleted.
    numbered = [int(path.stem[6:]) for path in folder.glob("class-*.png") if path.stem[6:].isdigit()]
    first = max(present, *(number + 1 for number in numbered), 0)
    return range(first, first + config.num_class_images - present)


def _draw(pipeline: DiffusionPipeline, config: DreamBoothConfig, batches: Sequence[range]) -> None:
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=sum(map(len, batches)), desc="class pictures", unit="picture") as bar:
        for numbers in batches:
            latents = pipeline(
                [config.class_prompt] * len(numbers),
                generator=[torch.Generator().manual_seed(config.seed * 100_003 + number) for number in numbers],
                height=config.resolution,
                width=config.resolution,
                output_type="latent",
            ).images
            decoded = config.family.decode(pipeline.vae, latents)
            if not torch.isfinite(decoded).all():
                raise NonFiniteError(
                    f"class pictures {numbers[0]} to {numbers[-1]} hold NaN or infinity in {latents.dtype}: choose another "
                    "prior_generation_precision"
                )
            for number, picture in zip(numbers, pipeline.image_processor.postprocess(decoded), strict=True):
                temporary = folder / f".class-{number:05d}.tmp"
                picture.save(temporary, format="PNG")
                temporary.rename(folder / f"class-{number:05d}.png")
            bar.update(len(numbers))
