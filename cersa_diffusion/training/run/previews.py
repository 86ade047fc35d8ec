"""Pictures of the validation prompt, always from the same seeds: by the models during training and by the final result."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from cersa_diffusion.training.settings.config import DreamBoothConfig

FOLDER = "previews"


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, config: DreamBoothConfig) -> list[Image.Image]:
    """Draws pictures of the validation prompt; picture i uses the seed of the run plus i.

    Args:
        pipeline: the pipeline; its models may differ in dtype, as they do in training.
        config: prompt, number, size, seed and steps.
    """
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for number in range(config.num_validation_images):
        latents = pipeline(
            config.validation_prompt,
            num_inference_steps=config.validation_inference_steps,
            generator=torch.Generator().manual_seed(config.seed + number),
            height=config.resolution,
            width=config.resolution,
            output_type="latent",
        ).images
        pictures += pipeline.image_processor.postprocess(config.family.decode(pipeline.vae, latents))
    return pictures


def save(pictures: Sequence[Image.Image], folder: Path) -> None:
    """Writes pictures as 00.png, 01.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")


def preview(
    pipeline: DiffusionPipeline,
    config: DreamBoothConfig,
    accelerator: Accelerator,
    trained: Sequence[nn.Parameter],
    average: EMAModel | None,
) -> list[Image.Image]:
    """Draws with the models in training; afterwards their state and the random numbers are the same as before.

    Args:
        pipeline: the pipeline of the models.
        config: the settings.
        accelerator: device and precision.
        trained: the trained parameters.
        average: their moving average, which is used for drawing if there is one.
    """
    with _evaluation_mode(pipeline, accelerator, trained, average), accelerator.autocast():
        return draw(pipeline, config)


@contextlib.contextmanager
def _evaluation_mode(
    pipeline: DiffusionPipeline, accelerator: Accelerator, trained: Sequence[nn.Parameter], average: EMAModel | None
) -> Iterator[None]:
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    modes, devices = [model.training for model in models], [next(model.parameters()).device for model in models]
    if average is not None:
        average.store(trained)
        average.copy_to(trained)
    try:
        with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
            for model in models:
                # Models that are idle because of caches lie on the CPU.
                model.eval().to(accelerator.device)
            yield
    finally:
        if average is not None:
            average.restore(trained)
        for model, training, device in zip(models, modes, devices, strict=True):
            model.train(training).to(device)


def log_previews(accelerator: Accelerator, pictures: Sequence[Image.Image], step: int, prompt: str) -> None:
    """Logs pictures to the trackers that accept pictures.

    Args:
        accelerator: its trackers must be started.
        pictures: the pictures of one preview.
        step: optimizer steps done.
        prompt: the prompt of the pictures.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            from torchvision.transforms.v2.functional import pil_to_tensor

            tracker.writer.add_images("preview", torch.stack([pil_to_tensor(picture) for picture in pictures]), step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"preview": [wandb.Image(picture, caption=prompt) for picture in pictures]}, step=step)
