"""A DreamBooth training, from a few pictures and a prompt to the saved adapter."""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from torch import nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.kinds import is_quantised
from cersa_diffusion.pictures import picture_paths
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training.callbacks import ProgressBar, TrainingCallback
from cersa_diffusion.training.checkpoints.folder import checkpoint_step, find_checkpoint, list_checkpoints, remove_leftovers
from cersa_diffusion.training.data.captions import Example, class_examples, read_examples
from cersa_diffusion.training.data.classes import sample_class_pictures
from cersa_diffusion.training.finish import add_extras, missing_extras, save_result
from cersa_diffusion.training.publish.upload import Publication
from cersa_diffusion.training.run.interrupt import StopRequest
from cersa_diffusion.training.run.lock import run_lock
from cersa_diffusion.training.run.loop import DreamBoothRun
from cersa_diffusion.training.run.memory import tensor_bytes
from cersa_diffusion.training.run.optimizers import check_optimizer
from cersa_diffusion.training.run.peaks import PeakMemory
from cersa_diffusion.training.run.result import RESULT_FILE, TrainResult
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.training.settings.file import SETTINGS_FILE, read_settings, write_settings
from cersa_diffusion.versions import check_versions


def train_dreambooth(config: DreamBoothConfig, callbacks: Sequence[TrainingCallback] | None = None) -> TrainResult | None:
    """Runs a training from the settings to the saved result.

    Args:
        config: the settings; all of them are checked before the first write.
        callbacks: receive the events of the run and may stop it; None: a progress bar.

    Returns:
        The result on the main process, None on the others.

    Raises:
        ConfigError: a path, a picture folder or a setting cannot be used.
        CersaError: a checkpoint cannot be resumed on this machine, or cannot be written.
        NonFiniteError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint is written or, if all steps were done, the result.
        TrainingStopped: a callback asked to stop; a checkpoint is written.
    """
    callbacks = [ProgressBar(config)] if callbacks is None else callbacks
    output_dir = Path(config.output_dir)
    check_versions()
    check_optimizer(config)
    _check_trackers(config)
    instance = read_examples(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=output_dir / config.logging_dir if config.report_to else None,
        # The next batch goes to a GPU while it still computes; the batches lie in pinned memory.
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # Unused parameters: nothing reads the last layer of SDXL's first text encoder; processes would wait for its gradients.
        # Buffers: none changes in training, and `share_bases` has sent those of the CERSA layers. Timeout: while one process
        # draws previews or the last class pictures, the others wait longer than usual.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=len(config.family.text_encoders) > 1),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )
    with run_lock(output_dir) if accelerator.is_main_process else nullcontext():
        return _train_and_finish(config, accelerator, instance, callbacks)


def _train_and_finish(
    config: DreamBoothConfig, accelerator: Accelerator, instance: list[Example], callbacks: Sequence[TrainingCallback]
) -> TrainResult | None:
    """Trains a run or only completes its extras; the caller holds the lock of its folder."""
    output_dir = Path(config.output_dir)
    total_steps = config.total_steps(len(instance), accelerator.num_processes)
    checkpoint = _check_output(config, output_dir, total_steps)
    publication = Publication.begin(config) if config.push_to_hub and accelerator.is_main_process else None
    result = _finished_result(config, output_dir, total_steps)
    if result is None:
        result = _train(config, accelerator, instance, checkpoint, callbacks)
    else:
        _start_trackers(config, accelerator)
    if accelerator.is_main_process:
        add_extras(config, result, accelerator, publication, callbacks)
    accelerator.end_training()
    return result if accelerator.is_main_process else None


def _refuse_quantised(base: DiffusionPipeline) -> None:
    """Raises ConfigError for a base with quantised layers: their libraries do not let a model be cast to the compute dtype."""
    for component, model in base.components.items():
        if isinstance(model, nn.Module) and any(map(is_quantised, model.modules())):
            raise ConfigError(
                f"the {component} of the base was saved quantised, and this trainer casts its models: train on the base before "
                "quantisation, or inject into the quantised model with inject_cersa in a program of your own"
            )


def _train(
    config: DreamBoothConfig,
    accelerator: Accelerator,
    instance: list[Example],
    checkpoint: Path | None,
    callbacks: Sequence[TrainingCallback],
) -> TrainResult | None:
    """Trains and writes the result, which the main process returns."""
    output_dir = Path(config.output_dir)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    # Drawn first, by pipelines of their own: drawing and training do not need memory at the same time.
    classes = _class_pictures(config, accelerator)
    # Loading is a part of preparing.
    peaks = PeakMemory(accelerator.device)
    base = load_base(config.pretrained_model_name_or_path, family=config.family, revision=config.revision, variant=config.variant)
    _refuse_quantised(base)
    run = DreamBoothRun(config, base, accelerator, instance, classes, peaks)
    if accelerator.is_main_process:
        check_disk_space(run, output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        write_settings(config, output_dir / SETTINGS_FILE)
        # The result of a shorter run that is resumed here: with it, the longer run would seem finished.
        (output_dir / RESULT_FILE).unlink(missing_ok=True)
    _start_trackers(config, accelerator)
    result = None
    # A request to stop that comes after the last step takes effect once the result is on the disk.
    with StopRequest() as stop:
        run.fit(output_dir, checkpoint, callbacks, stop)
        if accelerator.is_main_process:
            result = save_result(run, output_dir)
        accelerator.wait_for_everyone()
    run.put_away()
    if stop.requested:
        missing = ", ".join(missing_extras(config, output_dir)) or "nothing"
        raise KeyboardInterrupt(f"all steps are done, the result is in {output_dir}; missing: {missing}")
    return result


def _finished_result(config: DreamBoothConfig, output_dir: Path, total_steps: int) -> TrainResult | None:
    """The result of a finished run, which may lack its pictures, card or upload; None for every other run."""
    if config.resume_from_checkpoint is None or not (output_dir / RESULT_FILE).is_file():
        return None
    result = TrainResult.read(output_dir)
    return result if result.steps == total_steps else None


def _check_trackers(config: DreamBoothConfig) -> None:
    name, available = config.report_to, {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    if name not in (None, "all", *available):
        raise ConfigError(f"report_to {name} needs the package {name}: pip install {name}")


def _check_output(config: DreamBoothConfig, output_dir: Path, total_steps: int) -> Path | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file, expected a folder")
    if config.resume_from_checkpoint is None:
        if (output_dir / RESULT_FILE).exists() or list_checkpoints(output_dir):
            raise ConfigError(
                f"output_dir: {output_dir} already holds a run: add --resume_from_checkpoint latest to continue it, or choose "
                "another folder"
            )
        return None
    checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
    finished = _finished_result(config, output_dir, total_steps)
    done = finished is not None or (checkpoint is not None and checkpoint_step(checkpoint) == total_steps)
    settings = (checkpoint.parent if checkpoint else output_dir) / SETTINGS_FILE
    if settings.is_file():
        changed = config.same_run(read_settings(settings, type(config)))
        if not done:
            # The remaining steps use the new learning rate, so that a run that diverged can continue with a lower one.
            changed = [name for name in changed if name != "learning_rate"]
        if changed:
            names = ", ".join(changed)
            raise ConfigError(f"resume_from_checkpoint: {settings.parent} was started with different values of {names}")
    if finished is not None:
        if missing_extras(config, output_dir):
            return None
        raise ConfigError(
            f"resume_from_checkpoint: {output_dir} is finished after {finished.steps} steps: raise max_train_steps (or "
            "num_train_epochs) to train longer"
        )
    if checkpoint is None and (output_dir / RESULT_FILE).exists():
        raise ConfigError(f"resume_from_checkpoint: {output_dir} is finished and has no checkpoint to continue from")
    if checkpoint and checkpoint_step(checkpoint) > total_steps:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} has done {checkpoint_step(checkpoint)} steps of {total_steps}: raise "
            "max_train_steps (or num_train_epochs) to train longer"
        )
    return checkpoint


def _class_pictures(config: DreamBoothConfig, accelerator: Accelerator) -> list[Example]:
    if not config.with_prior_preservation:
        return []
    sample_class_pictures(config, accelerator.device)
    return class_examples(picture_paths(config.class_data_dir, "class_data_dir"), config)


def check_disk_space(run: DreamBoothRun, output_dir: Path) -> None:
    """Refuses a disk that has no room for the result and one checkpoint.

    Args:
        run: the run, prepared for training.
        output_dir: the folder of the run; it need not exist.

    Raises:
        ConfigError: the message names the needed and the free MiB.
    """
    numbers = sum(parameter.numel() for parameter in run.trained())
    models = [model for model in run.base.components.values() if isinstance(model, torch.nn.Module)]
    pipeline_bytes = tensor_bytes(parameter for model in models for parameter in model.parameters())
    # A checkpoint holds the weights and two moments of each, in float32; full fine-tuning saves the whole pipeline.
    needed = 12 * numbers + (pipeline_bytes if run.config.method == "full" else 4 * numbers)
    parent = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {output_dir} has {free / 2**20:.0f} MiB free, but a checkpoint and the result need "
            f"{needed / 2**20:.0f} MiB: make room or choose another disk"
        )
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir: {output_dir} cannot be written to: choose another folder")


def _start_trackers(config: DreamBoothConfig, accelerator: Accelerator) -> None:
    """Starts the trackers, if any, with the settings as plain values, which is all that they accept; the token is left out."""
    if config.report_to:
        settings = {name: value for name, value in vars(config).items() if name != "hub_token" and value is not None}
        plain = {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in settings.items()}
        accelerator.init_trackers("cersa-dreambooth", config=plain)
