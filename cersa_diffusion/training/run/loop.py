"""The models of a run, prepared for its method, and the loop over the training steps, which all methods share."""

import math
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cersa_diffusion.errors import CersaError, NonFiniteError
from cersa_diffusion.files import staged_folder
from cersa_diffusion.layers.model import trainable_parameters
from cersa_diffusion.methods.table import make_method
from cersa_diffusion.processes import any_process, several
from cersa_diffusion.text import duration
from cersa_diffusion.training.callbacks import RunStart, StepProgress, TrainingCallback, TrainingStopped
from cersa_diffusion.training.checkpoints.folder import TrainingState, load_checkpoint, skip_model_weights
from cersa_diffusion.training.checkpoints.keeper import CheckpointKeeper
from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.data.dataset import DreamBoothDataset, collate
from cersa_diffusion.training.run import previews
from cersa_diffusion.training.run.interrupt import StopRequest
from cersa_diffusion.training.run.memory import tensor_bytes
from cersa_diffusion.training.run.optimizers import make_average, make_optimizer
from cersa_diffusion.training.run.peaks import DRAWING, PREPARING, TRAINING, PeakMemory
from cersa_diffusion.training.run.preparation import Preparation
from cersa_diffusion.training.run.rates import keep_rates
from cersa_diffusion.training.run.result import TrainResult, beside_plan, size_on_disk
from cersa_diffusion.training.settings.config import DreamBoothConfig

# Settings that the header of the result records.
SHOWN_SETTINGS = ("method", "learning_rate", "text_encoder_lr", "optimizer", "train_batch_size", "gradient_accumulation_steps",
                  "resolution", "seed", "instance_prompt", "class_prompt", "use_ema")  # fmt: skip


class DreamBoothRun:
    """The models of a run, prepared for its method, and the training steps.

    Args:
        config: the settings.
        base: the base pipeline in CPU memory; its models are changed in place.
        accelerator: device, precision and processes.
        instance: the pictures of the subject.
        classes: the class pictures; empty without prior preservation.
        peaks: has measured since before the base was loaded; default: measures from now on.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        base: DiffusionPipeline,
        accelerator: Accelerator,
        instance: list[Example],
        classes: Sequence[Example] = (),
        peaks: PeakMemory | None = None,
    ):
        self.peaks = peaks or PeakMemory(accelerator.device)
        self.config, self.base, self.accelerator = config, base, accelerator
        self.instance, self.classes = instance, list(classes)
        self.total_steps = config.total_steps(len(instance), accelerator.num_processes)
        self.samples_per_step = config.samples_per_step(accelerator.num_processes)
        # A sample is a picture of the subject and, with prior preservation, a class picture.
        self.pictures_per_sample = 2 if config.with_prior_preservation else 1
        self.method = make_method(config, config.targets)
        self.components = config.family.components(base, text_encoders=config.train_text_encoder)
        for model in (base.vae, *config.family.components(base).values()):
            model.requires_grad_(False)
        self.preparation = Preparation(config, base, accelerator, self.method, self.components, instance, self.classes)
        self.loss, self.description = self.preparation.loss, self.preparation.description
        groups = [
            {"params": trainable_parameters(model), "lr": config.rate(name, accelerator.num_processes)}
            for name, model in self.components.items()
        ]
        # Listed once: the steps need it several times, and the models have thousands of modules.
        self._trained: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = make_optimizer(config, groups)
        self.average = make_average(config, self._trained) if config.use_ema else None
        self.seconds, self.losses, self.pictures_per_second = 0.0, [], 0.0

    def trained(self) -> list[nn.Parameter]:
        """All parameters that are trained."""
        return self._trained

    def fit(
        self,
        output_dir: Path,
        checkpoint: Path | None = None,
        callbacks: Sequence[TrainingCallback] = (),
        stop: StopRequest | None = None,
    ) -> None:
        """Trains up to the last step, from a checkpoint if one is given, and writes a checkpoint of the last step.

        Args:
            output_dir: folder of the run.
            checkpoint: the checkpoint to resume from.
            callbacks: receive the events of the run, on the main process.
            stop: the request to end the run, checked after every step; None: there is none. Several processes exchange requests
                together with the loss: one that comes later in a step counts for the next.

        Raises:
            NonFiniteError: loss, gradient or weights became NaN or infinite; a checkpoint holds the last state before that.
            CersaError: the last checkpoint of a stopped run cannot be written anywhere.
            KeyboardInterrupt: Ctrl-C or SIGTERM ended the run; its checkpoint is written.
            TrainingStopped: a callback ended the run; its checkpoint is written.
        """
        self.callbacks = list(callbacks) if self.accelerator.is_main_process else []
        self.stop = stop
        self._prepare_for_accelerate()
        state = TrainingState(self.accelerator, self.components, self.optimizer, self.average)
        self.keeper = CheckpointKeeper(self.config, state, output_dir, self.callbacks)
        step = first = self._resume(state, checkpoint) if checkpoint else 0
        if self.average is not None:
            # accelerate loads registered objects onto the CPU.
            self.average.to(self.accelerator.device)
        self.peaks.enter(TRAINING)
        self._report_start(step)
        if step == 0:
            self._preview(output_dir, step)
        start = time.perf_counter()
        try:
            for loss in self._steps(step):
                step += 1
                self.losses.append(loss)
                self.seconds += time.perf_counter() - start
                self._report_step(step, (step - first) / self.seconds)
                self._after_step(output_dir, step)
                # The time of previews and checkpoints does not count as time of the steps.
                start = time.perf_counter()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}{self.keeper.keep_good(step, step > first)}") from error

    def _resume(self, state: TrainingState, checkpoint: Path) -> int:
        """Restores the state of a checkpoint, except for the learning rates; returns the number of steps it has done."""
        rates = self.scheduler.scheduler.base_lrs
        step = load_checkpoint(state, checkpoint)
        keep_rates(self.scheduler.scheduler, rates, step)
        return step

    def _callback_stops(self) -> bool:
        return any(callback.should_stop() for callback in self.callbacks)

    def _stop_requested(self) -> bool:
        return self._callback_stops() or (self.stop is not None and self.stop.requested)

    def _after_step(self, output_dir: Path, step: int) -> None:
        """Ends the run if that was requested, otherwise writes the checkpoint and the preview that are due."""
        last = step == self.total_steps
        # All processes must stop at the same step, otherwise the remaining ones wait for ever.
        if not last and (self.all_stop if several() else self._stop_requested()):
            ending = TrainingStopped if any_process(self._callback_stops(), self.accelerator.device) else KeyboardInterrupt
            folder = self.keeper.keep_last(step)
            raise ending(f"stopped after step {step}; {folder.name} is in {folder.parent}")
        if last:
            try:
                self.keeper.keep_last(step)
            except NonFiniteError:
                raise
            except CersaError as error:
                # The result is smaller than the checkpoint: there may be room for it.
                warnings.warn(f"{error}; the result is written nevertheless", stacklevel=2)
        elif step % self.config.checkpointing_steps == 0:
            self.keeper.keep(step)
        if not last and step % self.config.validation_steps == 0:
            self._preview(output_dir, step)

    def put_away(self) -> None:
        """Frees the memory of the device after saving: moves the models to the CPU, drops the optimizer and the average."""
        for model in (*self.components.values(), *self.base.components.values()):
            if isinstance(model, nn.Module):
                model.to("cpu")
        self.optimizer = self.scheduler = self.average = None
        self.prepared = {}
        self.accelerator.free_memory()

    def _prepare_for_accelerate(self) -> None:
        config, accelerator = self.config, self.accelerator
        # accelerate steps the scheduler once for every process.
        scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=self.total_steps * accelerator.num_processes,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        skip_model_weights(accelerator)
        if self.average is not None:
            self.average.to(accelerator.device)
            accelerator.register_for_checkpointing(self.average)
        *models, self.optimizer, self.scheduler = accelerator.prepare(*self.components.values(), self.optimizer, scheduler)
        self.prepared = dict(zip(self.components, models, strict=True))
        for model in models:
            model.train()

    def _steps(self, step: int) -> Iterator[float]:
        """Trains from this step on; yields the loss of each step, the mean over its batches and the processes."""
        accelerator, models, losses = self.accelerator, list(self.prepared.values()), []
        for batch in accelerator.prepare(self._batches(step, self.total_steps)):
            with accelerator.accumulate(*models):
                loss = self.loss(batch, self.prepared)
                losses.append(loss.detach())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained(), self.config.max_grad_norm)
                    step += 1
                    value = self._finite_loss(torch.stack(losses).mean(), norm, step)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                if self.average is not None:
                    self.average.step(self.trained())
                yield value
                losses = []

    def _batches(self, first_step: int, last_step: int) -> DataLoader:
        config, size = self.config, self.samples_per_step
        first, last = first_step * size, last_step * size
        dataset = DreamBoothDataset(
            self.instance, self.classes, config, first=first, last=last, samples_per_step=size, latents=self.preparation.latents
        )
        device = self.accelerator.device
        options = {"num_workers": config.loader_workers(device), "pin_memory": device.type == "cuda"}
        return DataLoader(dataset, batch_size=config.train_batch_size, collate_fn=collate, **options)

    def _report_start(self, step: int) -> None:
        seconds = self._seconds_per_batch() * self.config.gradient_accumulation_steps * (self.total_steps - step)
        if self.accelerator.is_main_process:
            planned = self.peaks.at_start + self.preparation.planned_preparing
            self.description.append(f"peak memory of preparing: {beside_plan(self.peaks.of(PREPARING), planned)}")
        pictures = self.samples_per_step * self.pictures_per_sample
        epochs = self.total_steps * self.samples_per_step / len(self.instance) / self.config.repeats
        resumed = f", resumed after step {step}" if step else ""
        self.description.append(
            f"{self.total_steps} steps of {pictures} pictures ({epochs:.0f} epochs){resumed}: about {duration(seconds)}"
        )
        for callback in self.callbacks:
            callback.on_start(RunStart(tuple(self.description), self.preparation.planned, step, self.total_steps, seconds))

    def _seconds_per_batch(self) -> float:
        """Times one batch forward and backward; changes no state."""
        batch = collate([self._batches(0, 1).dataset[number] for number in range(self.config.train_batch_size)])
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # The first batch on a GPU loads libraries and chooses kernels.
            for _ in range(2 if cuda else 1):
                start = time.perf_counter()
                self.loss(batch, self.prepared).backward()
                if cuda:
                    torch.cuda.synchronize(cuda[0])
        seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return seconds

    def _report_step(self, step: int, steps_per_second: float) -> None:
        self.pictures_per_second = steps_per_second * (self.samples_per_step * self.pictures_per_sample)
        loss, rates = self.losses[-1], self.scheduler.get_last_lr()
        logged = {"loss": loss} | {f"lr/{name}": rate for name, rate in zip(self.components, rates, strict=True)}
        self.accelerator.log(logged, step=step)
        peak = self.peaks.of(TRAINING)
        progress = StepProgress(step, self.total_steps, loss, rates[0], self.pictures_per_second, peak)
        for callback in self.callbacks:
            callback.on_step(progress)

    def _preview(self, output_dir: Path, step: int) -> None:
        if self.config.validation_prompt and self.accelerator.is_main_process:
            with self.peaks.during(DRAWING):
                pictures = previews.preview(self.base, self.config, self.accelerator, self.trained(), self.average)
            try:
                previews.save(pictures, output_dir / previews.FOLDER / f"step-{step:06d}")
            except OSError as error:
                warnings.warn(f"the previews of step {step} cannot be written ({error}); the run continues", stacklevel=2)
            previews.log_previews(self.accelerator, pictures, step, self.config.validation_prompt)
            for callback in self.callbacks:
                callback.on_preview(step, pictures)
        self.accelerator.wait_for_everyone()

    def _finite_loss(self, loss: Tensor, norm: Tensor | None, step: int) -> float:
        """The loss of a step as a number; refuses NaN and infinity before the optimizer uses the gradient.

        This is the only place of a step at which the host waits for the device and the processes for each other: here they also
        exchange whether one of them is to stop.
        """
        wants_stop = torch.full_like(loss, several() and self._stop_requested())
        loss, stops = self.accelerator.reduce(torch.stack([loss, wants_stop]), "mean")
        # Under a loss scaler infinite gradients are normal: the scaler itself skips such steps.
        checked_norm = norm if norm is not None and self.accelerator.scaler is None else loss
        value, gradient, stops = torch.stack([loss, checked_norm.detach().to(loss), stops]).tolist()
        self.all_stop = stops > 0
        for name, number in (("loss", value), ("gradient", gradient)):
            if not math.isfinite(number):
                raise NonFiniteError(
                    f"the {name} became {number} at step {step}: lower learning_rate ({self.config.learning_rate})"
                )
        return value

    def save(self, output_dir: Path) -> TrainResult:
        """Writes the result of the method, with the moving average if there is one, and returns the figures of the run.

        Args:
            output_dir: folder of the run.

        Raises:
            NonFiniteError: a trained weight holds NaN or infinity; nothing is written.
            OSError: the disk is full; no incomplete files remain.
        """
        config = self.config
        if self.average is not None:
            self.average.copy_to(self.trained())
        for model in self.components.values():
            model.eval()
        header = {name: getattr(config, name) for name in SHOWN_SETTINGS} | {
            "cache_latents": config.caches_latents,
            "pre_compute_text_embeddings": config.caches_text_embeddings,
            "steps": self.total_steps,
            "processes": self.accelerator.num_processes,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "python": platform.python_version(),
        }
        with staged_folder(output_dir) as staging:
            saved = self.method.save(self.components, staging, config.origin, header)
            weights_path = output_dir / saved.relative_to(staging)
        trained = self.trained()
        weights = {id(tensor): tensor for model in self.components.values() for tensor in (*model.parameters(), *model.buffers())}
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        last_losses = self.losses[-max(1, len(self.losses) // 10) :]
        return TrainResult(
            method=config.method,
            output_dir=str(output_dir),
            weights_path=str(weights_path),
            steps=self.total_steps,
            seconds=self.seconds,
            decompose_seconds=self.preparation.seconds,
            loss=sum(last_losses) / len(last_losses) if last_losses else None,
            trainable_parameters=sum(parameter.numel() for parameter in trained),
            weight_bytes=tensor_bytes(weights.values()),
            gradient_bytes=tensor_bytes(trained),
            optimizer_bytes=tensor_bytes(moments),
            peak_memory_bytes=self.peaks.of(TRAINING),
            preparing_peak_bytes=self.peaks.of(PREPARING),
            drawing_peak_bytes=self.peaks.of(DRAWING),
            pictures_per_second=self.pictures_per_second,
            file_bytes=size_on_disk(weights_path, list(self.components)),
            truncation=self.preparation.truncation,
            planned_peak_bytes=self.peaks.at_start + self.preparation.planned_training,
            planned_preparing_bytes=self.peaks.at_start + self.preparation.planned_preparing,
        )
