"""Loading the base pipeline, and sampling class pictures from it."""

import os
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.data import picture_paths

# What the tensors of a run are called, and which layers are trained: all linear layers of the UNet, the text encoder's attention.
TARGET_MODULES = {"unet": "all-linear", "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def load_base(
    name_or_path: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None, variant: str | None = None
) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x or 2.x pipeline from a folder or the hub, without its safety checker.

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
        pipeline = StableDiffusionPipeline.from_pretrained(
            name_or_path,
            dtype=dtype,
            revision=revision,
            variant=variant,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"base {name_or_path}: cannot be loaded as a Stable Diffusion pipeline ({reason})") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ConfigError(f"base {name_or_path}: its UNet takes {pipeline.unet.config.in_channels} channels (inpainting?)")
    prediction_type = pipeline.scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(f"base {name_or_path}: prediction_type {prediction_type!r}, expected epsilon or v_prediction")
    return pipeline


def sample_class_pictures(pipeline: StableDiffusionPipeline, config: DreamBoothConfig) -> None:
    """Fills the class folder up to `num_class_images` with lossless pictures by the base model; picture i has its own seed."""
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = len(picture_paths(folder, "class_data_dir")) if any(folder.iterdir()) else 0
    missing = range(present, config.num_class_images)
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(missing), desc="class pictures", unit="picture", disable=not missing) as bar:
        for start in range(0, len(missing), config.sample_batch_size):
            numbers = missing[start : start + config.sample_batch_size]
            generators = [torch.Generator().manual_seed(config.seed * 100_003 + number) for number in numbers]
            pictures = pipeline(
                [config.class_prompt] * len(numbers),
                generator=generators,
                height=config.resolution,
                width=config.resolution,
            ).images
            for number, picture in zip(numbers, pictures, strict=True):
                temporary = folder / f".class-{number:05d}.tmp"
                picture.save(temporary, format="PNG")
                temporary.rename(folder / f"class-{number:05d}.png")
            bar.update(len(numbers))
