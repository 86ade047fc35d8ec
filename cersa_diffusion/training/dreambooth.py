"""DreamBooth: a few pictures and a prompt in, an adapter out. One loop for all methods."""

import json
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.inject import trainable_parameters
from cersa_diffusion.training.base import load_base, sample_class_pictures
from cersa_diffusion.training.checkpoints import (
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    skip_model_weights,
)
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.data import DreamBoothDataset, collate, picture_paths
from cersa_diffusion.training.interrupt import StopRequest
from cersa_diffusion.training.loss import DreamBoothLoss
from cersa_diffusion.training.methods import METHODS, load_result
from cersa_diffusion.training.truncation import TruncationCost, probe_loss

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run made and what it took.

    Attributes:
        method: a key of `METHODS`.
        output_dir: folder of the run.
        weights_path: file or folder that `load_result` opens.
        steps: optimizer steps done in all.
        seconds: time spent in training steps by this call (a resumed run counts its own part).
        decompose_seconds: time spent preparing the models for the method.
        loss: mean loss of the last tenth of the steps of this call.
        trainable_parameters: numbers that are trained.
        weight_bytes, gradient_bytes, optimizer_bytes: tensors of UNet and text encoder while training, without activations.
        file_bytes: size of the result on disk (for full fine-tuning: of the trained components).
        truncation: what dropping components cost before the first step; None where nothing is dropped.
    """

    method: str
    output_dir: str
    weights_path: str
    steps: int
    seconds: float
    decompose_seconds: float
    loss: float
    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    truncation: TruncationCost | None


def train_dreambooth(config: DreamBoothConfig) -> TrainResult | None:
    """Runs a training from the settings to the saved result.

    Args:
        config: the settings; everything about them that can be wrong is found before the first write.

    Returns:
        The result on the main process, None on the others.

    Raises:
        ConfigError: a path, a picture folder or a setting that cannot be used.
        CersaError: a checkpoint that cannot be resumed on this machine.
        NonFiniteError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    output_dir = Path(config.output_dir)
    instance_paths = picture_paths(config.instance_data_dir, "instance_data_dir")
    checkpoint = _check_output(config, output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
    )
    base = load_base(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    base.to(accelerator.device)
    class_paths = _class_pictures(config, base, accelerator)

    run = DreamBoothRun(config, base, accelerator, probe_paths=instance_paths)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        config.write(output_dir / CONFIG_FILE)
        print("\n".join(run.description), flush=True)
    run.fit(instance_paths, class_paths, output_dir, checkpoint)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    result = run.save(output_dir)
    (output_dir / RESULT_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n")
    del run, base
    if config.validation_prompt:
        _validation_pictures(config, result, output_dir / "validation", accelerator.device)
    print(_summary(config, result), flush=True)
    return result


def _check_output(config: DreamBoothConfig, output_dir: Path) -> Path | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any."""
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
    if checkpoint and checkpoint_step(checkpoint) >= config.max_train_steps:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} has done {checkpoint_step(checkpoint)} steps, max_train_steps is "
            f"{config.max_train_steps}: raise it to train longer"
        )
    if checkpoint and (output_dir / CONFIG_FILE).is_file():
        changed = config.same_run(json.loads((output_dir / CONFIG_FILE).read_text()))
        if changed:
            raise ConfigError(f"resume_from_checkpoint: {output_dir} was started with other settings of {', '.join(changed)}")
    return checkpoint


def _class_pictures(config: DreamBoothConfig, base: StableDiffusionPipeline, accelerator: Accelerator) -> list[Path]:
    if not config.with_prior_preservation:
        return []
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            sample_class_pictures(base, config)
    return picture_paths(config.class_data_dir, "class_data_dir")


class DreamBoothRun:
    """The models of a run, prepared for its method, and the training steps.

    Args:
        config: the settings.
        base: the base pipeline; its models are changed in place.
        accelerator: device, precision and processes.
        probe_paths: pictures on which the main process measures what CERSA's truncation costs; not measured when left out.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        base: StableDiffusionPipeline,
        accelerator: Accelerator,
        probe_paths: list[Path] | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.method = METHODS[config.method](config)
        self.loss = DreamBoothLoss(config, base, accelerator.device)
        self.unet, self.text_encoder = base.unet, base.text_encoder
        self.components: dict[str, nn.Module] = {"unet": base.unet}
        if config.train_text_encoder:
            self.components["text_encoder"] = base.text_encoder
        for model in (base.vae, base.unet, base.text_encoder):
            model.requires_grad_(False)
        probed = config.method == "cersa" and probe_paths is not None and accelerator.is_main_process
        base_loss = probe_loss(self.loss, probe_paths, self.components, accelerator.autocast()) if probed else None
        # Here and not earlier: what a method draws at its start depends on nothing but the seed.
        set_seed(config.seed)
        start = time.perf_counter()
        self.method.plan(self.components, self._compute_dtype)
        self.description = [f"{name}: {self.method.prepare(name, model)}" for name, model in self.components.items()]
        self.prepare_seconds = time.perf_counter() - start
        self._set_precision(base)
        self.truncation = None
        if probed:
            truncated_loss = probe_loss(self.loss, probe_paths, self.components, accelerator.autocast())
            self.truncation = TruncationCost.of(self.method.reports, base_loss, truncated_loss)
            self.description.append(str(self.truncation))
        self.optimizer = torch.optim.AdamW(
            [{"params": trainable_parameters(model), "lr": self._learning_rate(name)} for name, model in self.components.items()],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.seconds, self.losses = 0.0, []

    def _learning_rate(self, component: str) -> float:
        own = self.config.text_encoder_lr if component == "text_encoder" else None
        return self.config.learning_rate if own is None else own

    @property
    def _compute_dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    def _set_precision(self, base: StableDiffusionPipeline) -> None:
        dtype = self._compute_dtype
        if dtype != torch.float32:
            for name in ("unet", "text_encoder"):
                if name in self.components:
                    self.method.cast_frozen(self.components[name], dtype)
                else:
                    getattr(base, name).to(dtype=dtype)
        if self.config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if "text_encoder" in self.components:
                self.text_encoder.gradient_checkpointing_enable()

    def fit(self, instance_paths: list[Path], class_paths: list[Path], output_dir: Path, checkpoint: Path | None) -> None:
        """Trains to `max_train_steps`, from a checkpoint if one is given.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the checkpoint is written.
        """
        config, accelerator = self.config, self.accelerator
        scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=config.max_train_steps * accelerator.num_processes,
        )
        skip_model_weights(accelerator)
        names = list(self.components)
        *models, optimizer, scheduler = accelerator.prepare(*self.components.values(), self.optimizer, scheduler)
        prepared = dict(zip(names, models, strict=True))
        for model in models:
            model.train()
        step = load_checkpoint(accelerator, self.components, checkpoint) if checkpoint else 0
        batches = accelerator.prepare(self._batches(instance_paths, class_paths, step))
        bar = tqdm(
            total=config.max_train_steps, initial=step, desc="training", unit="step", disable=not accelerator.is_main_process
        )
        with StopRequest() as stop, bar:
            start = time.perf_counter()
            for batch in batches:
                with accelerator.accumulate(*models):
                    loss = self.loss(batch, prepared)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self._trained(), config.max_grad_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                self.losses.append(self._checked(loss, step))
                if not accelerator.sync_gradients:
                    continue
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", lr=f"{scheduler.get_last_lr()[0]:.1e}", refresh=False)
                stopping = stop.requested and step < config.max_train_steps
                if stopping or step % config.checkpointing_steps == 0:
                    save_checkpoint(accelerator, self.components, output_dir, step, config.checkpoints_total_limit)
                if stopping:
                    raise KeyboardInterrupt(f"stopped after step {step}; checkpoint-{step} is in {output_dir}")
            self.seconds = time.perf_counter() - start

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _batches(self, instance_paths: list[Path], class_paths: list[Path], step: int) -> DataLoader:
        config = self.config
        per_step = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        dataset = DreamBoothDataset(
            instance_paths,
            class_paths,
            resolution=config.resolution,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            seed=config.seed,
            first=step * per_step,
            last=config.max_train_steps * per_step,
        )
        return DataLoader(
            dataset, batch_size=config.train_batch_size, collate_fn=collate, num_workers=config.dataloader_num_workers
        )

    def _checked(self, loss: Tensor, step: int) -> float:
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteError(f"the loss became {value} at step {step + 1}: lower learning_rate ({self.config.learning_rate})")
        return value

    def save(self, output_dir: Path) -> TrainResult:
        """Writes the result of the method and says what it took."""
        config = self.config
        for model in self.components.values():
            model.eval()
        shown = (
            "method",
            "learning_rate",
            "text_encoder_lr",
            "train_batch_size",
            "resolution",
            "seed",
            "instance_prompt",
            "class_prompt",
        )
        facts = {name: getattr(config, name) for name in shown} | {
            "steps": config.max_train_steps,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "python": platform.python_version(),
        }
        weights_path = self.method.save(self.components, output_dir, facts)
        trained = self._trained()
        held = {id(t): t for model in self.components.values() for t in (*model.parameters(), *model.buffers())}
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return TrainResult(
            method=config.method,
            output_dir=str(output_dir),
            weights_path=str(weights_path),
            steps=config.max_train_steps,
            seconds=self.seconds,
            decompose_seconds=self.prepare_seconds,
            loss=sum(tail) / len(tail),
            trainable_parameters=sum(parameter.numel() for parameter in trained),
            weight_bytes=_bytes(held.values()),
            gradient_bytes=_bytes(trained),
            optimizer_bytes=_bytes(moments),
            file_bytes=_size_on_disk(weights_path, list(self.components)),
            truncation=self.truncation,
        )


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size_on_disk(path: Path, components: list[str]) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for name in components for file in (path / name).glob("*.safetensors"))


def _validation_pictures(config: DreamBoothConfig, result: TrainResult, folder: Path, device: torch.device) -> None:
    """Pictures by the saved result in a fresh pipeline: what they show is what the file gives."""
    pipeline = load_result(
        result.method, Path(result.weights_path), config.pretrained_model_name_or_path, revision=config.revision
    ).to(device)
    folder.mkdir(exist_ok=True)
    for number in range(config.num_validation_images):
        generator = torch.Generator().manual_seed(config.seed + number)
        size = {"height": config.resolution, "width": config.resolution}
        pipeline(config.validation_prompt, generator=generator, **size).images[0].save(folder / f"{number:02d}.png")


def _summary(config: DreamBoothConfig, result: TrainResult) -> str:
    opening = METHODS[config.method].opening.format(base=config.pretrained_model_name_or_path, path=result.weights_path)
    opening = opening.replace("\n", "\n    ")
    tensors = result.weight_bytes + result.gradient_bytes + result.optimizer_bytes
    return f"""
{config.method}: {result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f} (mean of the last tenth)
trained {result.trainable_parameters / 1e6:.2f} M parameters; weights, gradients and optimizer {tensors / 2**20:.1f} MiB
result  {result.weights_path} ({result.file_bytes / 2**20:.2f} MiB)

To generate with it:
    import torch, cersa_diffusion
    from diffusers import StableDiffusionPipeline
    {opening}
    pipe("{config.instance_prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("picture.png")"""
