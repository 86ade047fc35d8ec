"""What follows the last step: first the result, then the extras that can be added later (pictures, model card, upload)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError

from cersa_diffusion.config import PRECISIONS
from cersa_diffusion.errors import CersaError
from cersa_diffusion.methods.table import load_result
from cersa_diffusion.text import one_line
from cersa_diffusion.training.callbacks import TrainingCallback
from cersa_diffusion.training.publish.upload import CARD_FILE, Publication, write_model_card
from cersa_diffusion.training.run import previews
from cersa_diffusion.training.run.loop import DreamBoothRun
from cersa_diffusion.training.run.result import TrainResult
from cersa_diffusion.training.settings.config import DreamBoothConfig

PICTURES_FOLDER = "validation"


def save_result(run: DreamBoothRun, output_dir: Path) -> TrainResult:
    """Writes the trained weights and, once they are on the disk, the result file, which marks the run as finished.

    Args:
        run: the run, after its last step.
        output_dir: folder of the run.

    Raises:
        NonFiniteError: a trained weight holds NaN or infinity.
        CersaError: the disk has no room; no incomplete files remain.
    """
    try:
        result = run.save(output_dir)
        result.write()
    except (OSError, SafetensorError) as error:  # safetensors has no OSError for a full disk
        raise CersaError(
            f"{output_dir}: all steps are done, but the result cannot be written ({error}): make room, then "
            "--resume_from_checkpoint latest writes it"
        ) from error
    return result


def missing_extras(config: DreamBoothConfig, output_dir: Path) -> list[str]:
    """Names of the extras (pictures, card, upload) that the settings ask for and that a finished run lacks.

    Args:
        config: the settings.
        output_dir: folder of the run.
    """
    pictures = list((output_dir / PICTURES_FOLDER).glob("*.png"))
    missing = ["pictures"] if config.validation_prompt and len(pictures) < config.num_validation_images else []
    if not (output_dir / CARD_FILE).is_file():
        missing.append("card")
    # Only the hub knows whether an upload succeeded; files that it already has are not sent again.
    return [*missing, "upload"] if config.push_to_hub else missing


def add_extras(
    config: DreamBoothConfig,
    result: TrainResult,
    accelerator: Accelerator,
    publication: Publication | None,
    callbacks: Sequence[TrainingCallback],
) -> None:
    """Draws with the result, writes its card and uploads it; a step that fails gives a warning, the others are still done.

    Args:
        config: the settings.
        result: the result, already written.
        accelerator: device and trackers.
        publication: the upload, or None.
        callbacks: receive the pictures and the end of the run.

    Raises:
        KeyboardInterrupt: Ctrl-C; the message names what is missing.
    """
    pictures: list[Image.Image] = []
    steps: dict[str, Callable[[], object]] = {}
    if config.validation_prompt:
        steps["the pictures"] = lambda: pictures.extend(_draw(config, result, accelerator))
    steps["the model card"] = lambda: write_model_card(config, result, pictures)
    if publication is not None:
        steps["the upload"] = lambda: publication.upload(result)
    for name, step in steps.items():
        try:
            step()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"all steps are done, the result is {result.weights_path}; {name} is missing") from None
        # No error may lose the result, which is written, or keep the next step from its attempt.
        except Exception as error:
            warnings.warn(
                f"{name} failed ({type(error).__name__}: {one_line(error)}); the result is {result.weights_path}: to repeat what "
                "failed, add --resume_from_checkpoint latest",
                stacklevel=2,
            )
    for callback in callbacks:
        if pictures:
            callback.on_preview(result.steps, pictures)
        callback.on_end(result)


def _draw(config: DreamBoothConfig, result: TrainResult, accelerator: Accelerator) -> list[Image.Image]:
    """Draws with the saved result in a new pipeline, so that the pictures show what the file contains."""
    dtypes, weights_path = {"default": PRECISIONS[accelerator.mixed_precision], "vae": torch.float32}, Path(result.weights_path)
    base, revision, variant = config.pretrained_model_name_or_path, config.revision, config.variant
    pipeline = load_result(result.method, weights_path, base, dtype=dtypes, revision=revision, variant=variant)
    pictures = previews.draw(pipeline.to(accelerator.device), config)
    previews.save(pictures, Path(result.output_dir) / PICTURES_FOLDER)
    previews.log_previews(accelerator, pictures, result.steps, config.validation_prompt)
    return pictures
