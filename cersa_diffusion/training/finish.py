"""After the last step: the result first, then what can be made up for (pictures, model card, upload), one by one."""

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
MAKE_UP = "--resume_from_checkpoint latest makes up for it"


def save_result(run: DreamBoothRun, output_dir: Path) -> TrainResult:
    """Writes the trained weights and, when they are on the disk, the result file that says that the run is finished.

    Args:
        run: that has done all its steps.
        output_dir: its folder.

    Raises:
        NonFiniteError: a trained weight holds NaN or infinity.
        CersaError: there is no room; nothing is left half-written.
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
    """What a finished run was asked for and does not have: its pictures, its card, its upload.

    Args:
        config: the settings.
        output_dir: folder of the run.
    """
    pictures = list((output_dir / PICTURES_FOLDER).glob("*.png"))
    missing = ["pictures"] if config.validation_prompt and len(pictures) < config.num_validation_images else []
    if not (output_dir / CARD_FILE).is_file():
        missing.append("card")
    # Whether an upload came through, only the hub knows; what it has already is not sent again.
    return [*missing, "upload"] if config.push_to_hub else missing


def add_extras(
    config: DreamBoothConfig,
    result: TrainResult,
    accelerator: Accelerator,
    publication: Publication | None,
    callbacks: Sequence[TrainingCallback],
) -> None:
    """Draws with the result, writes its card and uploads it; what fails costs a warning, the rest is still done.

    Args:
        config: the settings.
        result: that is written.
        accelerator: device and trackers.
        publication: where to upload to, or None.
        callbacks: are told of the pictures and of the end.

    Raises:
        KeyboardInterrupt: Ctrl-C; says what is missing.
    """
    pictures: list[Image.Image] = []

    def draw() -> None:
        pictures.extend(_draw(config, result, accelerator))

    def write_card() -> None:
        write_model_card(config, result, pictures)

    steps: dict[str, Callable[[], None]] = {"the pictures": draw} if config.validation_prompt else {}
    steps["the model card"] = write_card
    if publication is not None:
        steps["the upload"] = lambda: publication.upload(result)
    for name, step in steps.items():
        try:
            step()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"all steps are done, the result is {result.weights_path}; {name} is missing") from None
        # Whatever goes wrong here, the result is there and the next of these may succeed.
        except Exception as error:
            reason = one_line(error)
            warnings.warn(
                f"{name} failed ({type(error).__name__}: {reason}); the result is {result.weights_path}: {MAKE_UP}", stacklevel=2
            )
    for callback in callbacks:
        if pictures:
            callback.on_preview(result.steps, pictures)
        callback.on_end(result)


def _draw(config: DreamBoothConfig, result: TrainResult, accelerator: Accelerator) -> list[Image.Image]:
    """Pictures by the saved result in a fresh pipeline: what they show is what the file gives."""
    dtype = PRECISIONS[accelerator.mixed_precision]
    opened = load_result(
        result.method,
        Path(result.weights_path),
        config.pretrained_model_name_or_path,
        dtype=dtype,
        revision=config.revision,
        variant=config.variant,
    )
    opened.vae.to(torch.float32)
    pictures = previews.draw(opened.to(accelerator.device), config)
    previews.save(pictures, Path(result.output_dir) / PICTURES_FOLDER)
    previews.log_previews(accelerator, pictures, result.steps, config.validation_prompt)
    return pictures
