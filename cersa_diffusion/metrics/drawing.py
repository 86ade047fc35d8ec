"""Pictures to score: a pipeline with adapters draws each prompt with each seed."""

from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, load_lora
from cersa_diffusion.metrics.embedding import scoring_device
from cersa_diffusion.metrics.evaluation import Sample
from cersa_diffusion.pipelines.draw import drawing_dtypes, generate
from cersa_diffusion.pipelines.open import load_base


def open_pipeline(
    name_or_path: str,
    adapters: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """A pipeline with adapters, all of them active, on the device that draws.

    Args:
        name_or_path: a folder or hub id, as for `load_base`.
        adapters: CERSA adapters (a file, a folder or a hub id) or LoRA files (or folders with pytorch_lora_weights.safetensors).
        device: by default the GPU if there is one.
        dtype: see `drawing_dtypes`.

    Raises:
        CersaError: the pipeline or an adapter cannot be loaded.
    """
    device = scoring_device(device)
    pipeline, loras = load_base(name_or_path, dtype=drawing_dtypes(dtype, device)), []
    for number, adapter in enumerate(adapters):
        lora = _lora_file(Path(adapter))
        if lora is None:
            pipeline.load_cersa_weights(adapter)
            continue
        loras.append(f"lora_{number}")
        load_lora(pipeline, lora, loras[-1])
    if loras:
        # Loading another LoRA deactivates the LoRAs that were active.
        pipeline.set_adapters(loras)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _lora_file(path: Path) -> Path | None:
    """The LoRA file at this path or in this folder; None for anything else, which the loader of CERSA adapters handles."""
    if path.is_dir():
        path = path / LORA_FILE_NAME
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return path if any("lora" in name for name in file.keys()) else None
    except (OSError, SafetensorError):
        return None


def draw(pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], **settings) -> list[Sample]:
    """Draws every prompt with every seed.

    Args:
        pipeline: as `open_pipeline` returns it.
        settings: steps, guidance, batch_size, as for `generate`.

    Returns:
        Samples in the order of the prompts, then of the seeds; their names contain the number of the prompt and the seed.
    """
    pictures = generate(pipeline, prompts, seeds, show_progress=True, **settings)
    return [
        Sample(f"{number:03d}-seed{seed}.png", prompt, picture, seed)
        for number, (prompt, pictures_of_prompt) in enumerate(zip(prompts, pictures, strict=True))
        for seed, picture in zip(seeds, pictures_of_prompt, strict=True)
    ]
