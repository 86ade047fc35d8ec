"""Writes the diffusers pipeline, and draws sheets of samples with it."""

import json
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextModel

from .captions import look
from .settings import PICTURE_SIZE, STYLES, Folders
from .tokenizer import load_tokenizer

SAMPLE_STEPS = 25
SAMPLE_GUIDANCE = 4.0
SAMPLE_NAMES = (
    "a smiling face with sunglasses",
    "a loudly crying face",
    "a partying face",
    "a clown face",
    "a broken heart",
    "a fox",
    "a panda",
    "a penguin",
    "an elephant",
    "a giraffe",
    "a shark",
    "an octopus",
    "a crab",
    "a red apple",
    "a strawberry",
    "a croissant",
    "a hot dog",
    "a broccoli",
    "a hamburger",
    "a rocket",
    "a bicycle",
    "a guitar",
    "an umbrella",
    "a christmas tree",
)
COLOURED_PROMPTS = (
    "a 3d emoji of a koala on a yellow background",
    "a flat emoji of a tomato on a blue background",
    "a noto emoji of a dolphin on a pink background",
    "a twemoji of a trophy on a green background",
    "a 3d emoji of a bell on a purple background",
    "a flat emoji of a butterfly on a grey background",
    "a noto emoji of a cactus on an orange background",
    "a twemoji of a pizza on a black background",
    "a 3d emoji of an alien on a red background",
    "a flat emoji of a crown on a black background",
    "a noto emoji of a thinking face on a blue background",
    "a twemoji of a cow face on a yellow background",
)


def sampling_scheduler() -> DDIMScheduler:
    """The scheduler the pipeline is shipped with: the same noise as in training."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write_pipeline(
    folders: Folders, target: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, autoencoder: AutoencoderKL
) -> None:
    """Write a pipeline in half precision.

    Args:
        folders: Where the build works.
        target: Folder of the pipeline.
        unet: The denoiser.
        text_encoder: The text encoder.
        autoencoder: The autoencoder.
    """
    for part in (unet, autoencoder):
        # Or the written configuration names the work folder of this machine.
        part.register_to_config(_name_or_path="")
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=text_encoder.half(),
        tokenizer=load_tokenizer(folders),
        unet=unet.half(),
        scheduler=sampling_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(target)
    # transformers loads the dtype that the configuration names, diffusers float32: without this they would not fit together
    # for whoever loads the pipeline without naming a dtype.
    config = target / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)


def load_pipeline(path: Path) -> StableDiffusionPipeline:
    """The written pipeline in full precision.

    Args:
        path: Its folder.
    """
    with warnings.catch_warnings(action="error"):
        pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_samples(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    """One picture for each prompt.

    Args:
        pipeline: The pipeline.
        prompts: What to draw.
        seed: The first noise's seed; it rises by one from prompt to prompt.
    """
    result = []
    for start in range(0, len(prompts), 24):
        chunk = prompts[start : start + 24]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        result += pipeline(
            chunk,
            height=PICTURE_SIZE,
            width=PICTURE_SIZE,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=SAMPLE_GUIDANCE,
            generator=generators,
        ).images
    return result


def sheet(pictures: list[Image.Image], columns: int, labels: list[str]) -> Image.Image:
    """Pictures side by side, each row with a label above it.

    Args:
        pictures: The pictures, row by row.
        columns: Pictures a row.
        labels: One text a row.
    """
    gap, head = 4, 14
    step = PICTURE_SIZE + gap
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (gap + columns * step, rows * (step + head)), "white")
    writer = ImageDraw.Draw(canvas)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        canvas.paste(picture, (gap + column * step, row * (step + head) + head))
    for row, label in enumerate(labels):
        writer.text((gap, row * (step + head) + 1), label, fill="black")
    return canvas


def write_sample_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Draw the sample sheet: 24 names in four styles without a background, and twelve prompts that name one.

    Args:
        pipeline: The pipeline.
        path: Where the picture goes.
    """
    half = len(SAMPLE_NAMES) // 2
    prompts, labels = [], []
    for names in (SAMPLE_NAMES[:half], SAMPLE_NAMES[half:]):
        words = ", ".join(name.split(" ", 1)[1] for name in names)
        for style in STYLES:
            prompts += [f"a {look(style)} of {name}" for name in names]
            labels.append(f"{style}: {words}" if style == STYLES[0] else style)
    sheet(draw_samples(pipeline, [*prompts, *COLOURED_PROMPTS]), half, [*labels, "backgrounds"]).save(path, optimize=True)
