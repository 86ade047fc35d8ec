"""Draws pictures of the same prompts and seeds with every model, and puts them into one sheet."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from cersa_diffusion.families.table import family_of

CELL, MARGIN, LABEL_WIDTH, TITLE_HEIGHT = 128, 6, 150, 60
# What --dtype offers for drawing; None: what suits the device.
DRAWING_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_HELP = "dtype of pipelines that draw, without their autoencoder; auto: 16 bits on a GPU, float32 on a CPU"


def drawing_dtypes(dtype: torch.dtype | None, device: torch.device) -> dict[str, torch.dtype]:
    """The dtypes of a pipeline that only draws, as `load_base` takes them.

    The autoencoder always has float32, in which no autoencoder overflows; `generate` decodes with it.

    Args:
        dtype: of all other models; None: float32, but on a GPU 16 bits, bfloat16 where the GPU computes in it, else float16.
        device: where the pipeline draws.

    Returns:
        Component -> dtype, and "default" for all other components.
    """
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"default": dtype or torch.float32, "vae": torch.float32}


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    batch_size: int = 16,
    negative_prompt: str = "",
    show_progress: bool = False,
) -> list[list[Image.Image]]:
    """Draws pictures of every prompt with every seed: ``result[prompt][seed]``.

    The noise of every picture is drawn on the CPU from its seed, so that all models start from the same noise.

    Args:
        pipeline: a pipeline of one of the families; its autoencoder may have another dtype than its other models.
        prompts, seeds: what to draw.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        batch_size: pictures per call of the pipeline.
        negative_prompt: prompt for the unconditional prediction of guidance.
        show_progress: show a bar over the batches.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    family, pictures = family_of(type(pipeline).__name__), []
    for start in tqdm(range(0, len(jobs), batch_size), desc="drawing", unit="batch", disable=not show_progress):
        batch = jobs[start : start + batch_size]
        latents = pipeline(
            [prompt for prompt, _ in batch],
            # None and not a list of empty texts: without a negative prompt some pipelines use a special vector.
            negative_prompt=[negative_prompt] * len(batch) if negative_prompt else None,
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        pictures += pipeline.image_processor.postprocess(family.decode(pipeline.vae, latents))
    return [pictures[i : i + len(seeds)] for i in range(0, len(pictures), len(seeds))]


def picture_grid(rows: dict[str, list[Image.Image]], titles: list[str]) -> Image.Image:
    """A sheet with labelled rows of pictures under column titles.

    Args:
        rows: label, which may have several lines -> one picture for each title.
        titles: column titles; they are wrapped to the width of a picture.
    """
    pitch = CELL + MARGIN
    sheet = Image.new("RGB", (LABEL_WIDTH + len(titles) * pitch, TITLE_HEIGHT + len(rows) * pitch), "white")
    draw, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(11), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        x = LABEL_WIDTH + column * pitch + CELL // 2
        draw.multiline_text((x, TITLE_HEIGHT - 6), _wrapped(title, small, CELL), "black", small, anchor="md", align="center")
    for number, (label, pictures) in enumerate(rows.items()):
        y = TITLE_HEIGHT + number * pitch
        draw.multiline_text((10, y + CELL // 2), label, "black", large, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (LABEL_WIDTH + column * pitch, y))
    return sheet


def _wrapped(text: str, font: ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
