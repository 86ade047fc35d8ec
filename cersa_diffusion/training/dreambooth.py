"""DreamBooth: a few pictures and a prompt in, an adapter out."""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import DiffusionPipeline

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training import previews
from cersa_diffusion.training.base import load_base, sample_class_pictures
from cersa_diffusion.training.callbacks import ProgressBar, TrainingCallback
from cersa_diffusion.training.captions import Example, class_examples, read_examples
from cersa_diffusion.training.checkpoints import checkpoint_step, find_checkpoint, list_checkpoints, remove_leftovers
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.methods import load_result
from cersa_diffusion.training.optimizers import check_optimizer
from cersa_diffusion.training.pictures import picture_paths
from cersa_diffusion.training.publish import Publication, write_model_card
from cersa_diffusion.training.result import RESULT_FILE, TrainResult
from cersa_diffusion.training.run import DreamBoothRun
from cersa_diffusion.training.run_lock import run_lock
from cersa_diffusion.training.settings_file import SETTINGS_FILE, read_settings, write_settings


def train_dreambooth(config: DreamBoothConfig, callbacks: Sequence[TrainingCallback] | None = None) -> TrainResult | None:
    """Runs a training from the settings to the saved result.

    Args:
        config: the settings; everything about them that can be wrong is found before the first write.
        callbacks: are told what happens, and may stop it; None: a progress bar.

    Returns:
        The result on the main process, None on the others.

    Raises:
        ConfigError: a path, a picture folder or a setting that cannot be used.
        CersaError: a checkpoint that cannot be resumed on this machine, or cannot be written.
        NonFiniteError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        TrainingStopped: a callback asked for it, after a checkpoint was written.
    """
    callbacks = [ProgressBar(config)] if callbacks is None else callbacks
    output_dir = Path(config.output_dir)
    check_optimizer(config)
    _check_trackers(config)
    instance = read_examples(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=output_dir / config.logging_dir if config.report_to else None,
        # The last layer of SDXL's first text encoder feeds nothing; without this, processes would wait for its gradients.
        # Buffers are frozen bases, the same everywhere. While one process draws class pictures the others wait longer than usual.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=len(config.family.text_encoders) > 1),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )
    with run_lock(output_dir) if accelerator.is_main_process else nullcontext():
        return _train(config, accelerator, instance, callbacks)


def _train(
    config: DreamBoothConfig, accelerator: Accelerator, instance: list[Example], callbacks: Sequence[TrainingCallback]
) -> TrainResult | None:
    """Trains while nobody else does in this folder."""
    output_dir = Path(config.output_dir)
    checkpoint = _check_output(config, output_dir, config.total_steps(len(instance), accelerator.num_processes))
    publication = Publication.begin(config) if config.push_to_hub and accelerator.is_main_process else None
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    base = load_base(config.pretrained_model_name_or_path, family=config.family, revision=config.revision, variant=config.variant)
    base.to(accelerator.device)
    classes = _class_pictures(config, base, accelerator)

    run = DreamBoothRun(config, base, accelerator, instance, classes)
    if accelerator.is_main_process:
        check_disk_space(run, output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        write_settings(config, output_dir / SETTINGS_FILE)
        # Of the shorter run that is continued: with it this one would seem finished.
        (output_dir / RESULT_FILE).unlink(missing_ok=True)
    if config.report_to:
        accelerator.init_trackers("cersa-dreambooth", config=_tracked(config))
    run.fit(output_dir, checkpoint, callbacks)
    accelerator.wait_for_everyone()
    result = _finish(run, output_dir, publication, callbacks) if accelerator.is_main_process else None
    accelerator.end_training()
    return result


def _finish(
    run: DreamBoothRun, output_dir: Path, publication: Publication | None, callbacks: Sequence[TrainingCallback]
) -> TrainResult:
    """Saves the result, draws with it, writes its card and uploads it."""
    config, accelerator = run.config, run.accelerator
    result = run.save(output_dir)
    pictures = []
    if config.validation_prompt:
        # By the saved result in a fresh pipeline: what the pictures show is what the file gives.
        run.put_away()
        opened = load_result(
            result.method,
            Path(result.weights_path),
            config.pretrained_model_name_or_path,
            dtype=run.compute_dtype,
            revision=config.revision,
            variant=config.variant,
        )
        opened.vae.to(torch.float32)
        pictures = previews.draw(opened.to(accelerator.device), config)
        previews.save(pictures, output_dir / "validation")
        previews.log_previews(accelerator, pictures, result.steps, config.validation_prompt)
    write_model_card(config, result, pictures)
    result.write()
    if publication is not None:
        publication.upload(result)
    for callback in callbacks:
        if pictures:
            callback.on_preview(result.steps, pictures)
        callback.on_end(result)
    return result


def _check_trackers(config: DreamBoothConfig) -> None:
    wanted = () if config.report_to in (None, "all") else (config.report_to,)
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in wanted:
        if name not in available:
            raise ConfigError(f"report_to {name} needs the package {name}: pip install {name}")


def _check_output(config: DreamBoothConfig, output_dir: Path, total_steps: int) -> Path | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file, expected a folder")
    if config.resume_from_checkpoint is None:
        if (output_dir / RESULT_FILE).exists() or list_checkpoints(output_dir):
            raise ConfigError(
                f"output_dir: {output_dir} holds a run already: add --resume_from_checkpoint latest to go on with it, "
                "or choose another folder"
            )
        return None
    checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
    if checkpoint is None and (output_dir / RESULT_FILE).exists():
        raise ConfigError(f"resume_from_checkpoint: {output_dir} is finished and has no checkpoint to go on from")
    # A run that was killed between its last checkpoint and its result only has the result to write.
    finished = (output_dir / RESULT_FILE).exists() or (checkpoint and checkpoint_step(checkpoint) > total_steps)
    if checkpoint and finished and checkpoint_step(checkpoint) >= total_steps:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} has done {checkpoint_step(checkpoint)} steps of {total_steps}: raise "
            "max_train_steps (or num_train_epochs) to train longer"
        )
    if checkpoint and (checkpoint.parent / SETTINGS_FILE).is_file():
        changed = config.same_run(read_settings(checkpoint.parent / SETTINGS_FILE, type(config)))
        if changed:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint.parent} was started with other settings of {', '.join(changed)}"
            )
    return checkpoint


def _class_pictures(config: DreamBoothConfig, base: DiffusionPipeline, accelerator: Accelerator) -> list[Example]:
    if not config.with_prior_preservation:
        return []
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            sample_class_pictures(base, config)
    return class_examples(picture_paths(config.class_data_dir, "class_data_dir"), config)


def check_disk_space(run: DreamBoothRun, output_dir: Path) -> None:
    """Refuses a disk on which not even one checkpoint beside the result has room.

    Args:
        run: prepared for training.
        output_dir: where it will write; it need not exist.

    Raises:
        ConfigError: naming what is needed and what is free.
    """
    numbers = sum(parameter.numel() for parameter in run.trained())
    # A checkpoint holds the weights and two moments of each, in float32; full fine-tuning saves the whole pipeline.
    needed = 12 * numbers + (sum(_sizes(run.base)) if run.config.method == "full" else 4 * numbers)
    parent = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {output_dir} has {free / 2**20:.0f} MiB free, a checkpoint and the result need {needed / 2**20:.0f}: "
            "make room or choose another disk"
        )
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir: {output_dir} cannot be written to: choose another folder")


def _sizes(base: DiffusionPipeline) -> list[int]:
    models = [model for model in base.components.values() if isinstance(model, torch.nn.Module)]
    return [tensor.numel() * tensor.element_size() for model in models for tensor in model.parameters()]


def _tracked(config: DreamBoothConfig) -> dict:
    """The settings as trackers take them: plain values."""
    hidden = ("hub_token",)
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in vars(config).items()
        if name not in hidden and value is not None
    }
