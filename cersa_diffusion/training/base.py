"""Loading the base pipeline, and sampling class pictures from it."""

import contextlib
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.families import Family, family_of
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.pictures import picture_paths

# Which layers are trained: all linear layers of the UNet, the attention of the text encoders.
TARGET_MODULES = {"unet": "all-linear", "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def default_targets(component: str) -> str | list[str]:
    """Which layers of a component are trained, unless others are asked for.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
    """
    return TARGET_MODULES["unet" if component == "unet" else "text_encoder"]


def load_base(
    name_or_path: str,
    *,
    family: Family | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """A text-to-image pipeline of a family that can be trained, from a folder or the hub, without its safety checker.

    Args:
        name_or_path: a folder or a model id.
        family: the only one that is accepted; None: any.
        dtype: of all its models.
        revision: on the hub.
        variant: of the weight files.

    Raises:
        ConfigError: no such folder or model, or not a text-to-image pipeline of this family.
    """
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ConfigError(f"base {name_or_path}: no model_index.json in this folder, expected a diffusers pipeline")
    if not os.path.isdir(name_or_path) and (name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~"))):
        raise ConfigError(f"base {name_or_path}: no such folder, and not the form of a hub id (owner/name)")
    verbosity = diffusers_logging.get_verbosity()
    try:
        # Silences the reminder about the safety checker, and the loader's traceback where the error below says it in a line.
        diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
        found = _found_family(name_or_path, family, revision)
        pipeline = found.pipeline_class.from_pretrained(
            name_or_path, dtype=dtype, revision=revision, variant=variant, use_safetensors=True, **found.loading
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"base {name_or_path}: cannot be loaded as a text-to-image pipeline from safetensors ({reason}); pickles are not read"
        ) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ConfigError(f"base {name_or_path}: its UNet takes {pipeline.unet.config.in_channels} channels (inpainting?)")
    prediction_type = pipeline.scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"base {name_or_path}: prediction_type {prediction_type!r}, expected epsilon or v_prediction")
    return pipeline


def _found_family(name_or_path: str, wanted: Family | None, revision: str | None) -> Family:
    class_name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
    found = family_of(class_name)
    if found is None:
        raise ConfigError(f"base {name_or_path}: a {class_name}, expected Stable Diffusion 1.x or 2.x, or SDXL, text to image")
    if wanted not in (None, found):
        raise ConfigError(f"base {name_or_path}: a {class_name}, which scripts/{found.script} trains")
    return found


def decode(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures of latents, (count, 3, height, width) in float32 from -1 to 1.

    In the autoencoder's own dtype, whatever autocast or the UNet's dtype say: SDXL's overflows in float16.

    Args:
        pipeline: whose autoencoder decodes.
        latents: (count, channels, height / 8, width / 8), scaled as the UNet has them.
    """
    vae = pipeline.vae
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].float()


def sample_class_pictures(pipeline: DiffusionPipeline, config: DreamBoothConfig) -> None:
    """Fills the class folder up to `num_class_images` with lossless pictures by the base model; picture i has its own seed.

    Args:
        pipeline: the base.
        config: the settings.
    """
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = len(picture_paths(folder, "class_data_dir")) if any(folder.iterdir()) else 0
    # Beyond the last number: what was deleted for its looks would come back from the same seed.
    numbered = [int(path.stem[6:]) for path in folder.glob("class-*.png") if path.stem[6:].isdigit()]
    first = max(present, *(number + 1 for number in numbered), 0)
    missing = range(first, first + config.num_class_images - present)
    pipeline.set_progress_bar_config(disable=True)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.prior_generation_precision)
    precision = torch.autocast(pipeline.device.type, dtype) if dtype else contextlib.nullcontext()
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
            decoded = decode(pipeline, latents)
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
