"""The settings of a DreamBooth run: names and meaning of the diffusers examples, as a dataclass that becomes the command line."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _cersa_option(name: str):
    source = next(f for f in fields(CersaConfig) if f.name == name)
    return field(default=source.default, metadata=source.metadata)


@dataclass
class DreamBoothConfig:
    """One DreamBooth run.

    Raises:
        ConfigError: settings that contradict each other or cannot work; found before anything is loaded or written.
    """

    pretrained_model_name_or_path: str = field(metadata={"help": "Base pipeline: a local folder or a model id on the hub."})
    instance_data_dir: str = field(metadata={"help": "Folder with the pictures of the subject."})
    instance_prompt: str = field(metadata={"help": "Prompt that names the subject, e.g. 'a photo of sks dog'."})
    method: Literal["cersa", "lora", "full"] = _option("cersa", "What is trained, always on the same linear layers.")
    alpha: float = _cersa_option("alpha")
    beta: float | None = _cersa_option("beta")
    rank: int = _option(32, "LoRA: rank (and lora_alpha, so that the scale is 1).")
    revision: str | None = _option(None, "Revision of the base on the hub.")
    variant: str | None = _option(None, "Variant of the base's weight files, e.g. fp16.")
    class_data_dir: str | None = _option(None, "Folder of class pictures for prior preservation; filled up by the base model.")
    class_prompt: str | None = _option(None, "Prompt of the class pictures, e.g. 'a photo of dog'.")
    with_prior_preservation: bool = _option(False, "Also train on class pictures, so that the class does not become the subject.")
    prior_loss_weight: float = _option(1.0, "Weight of the prior preservation loss.")
    num_class_images: int = _option(100, "Class pictures wanted; missing ones are sampled from the base.")
    sample_batch_size: int = _option(4, "Batch size for sampling class pictures.")
    output_dir: str = _option("cersa-dreambooth-model", "Folder for the result and the checkpoints.")
    seed: int = _option(0, "Seed of everything random: same seed, same machine, same result.")
    resolution: int = _option(512, "Pictures are resized to this many pixels on the shorter side and cropped square.")
    center_crop: bool = _option(False, "Crop the centre instead of a random square.")
    random_flip: bool = _option(False, "Mirror pictures at random.")
    train_text_encoder: bool = _option(
        True, "Also train the attention of the text encoder, as the paper does (the diffusers examples leave it frozen)."
    )
    train_batch_size: int = _option(4, "Pictures per step and process.")
    max_train_steps: int = _option(500, "Optimizer steps.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimizer step.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass: less memory, slower.")
    learning_rate: float = _option(
        5e-4, "Learning rate. The right one differs by method and decides more than the method: try a few."
    )
    text_encoder_lr: float | None = _option(
        None, "Learning rate of the text encoder. Default: learning_rate; a tenth of it forgets fewer other prompts."
    )
    lr_scheduler: str = _option("constant", "linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup.")
    lr_warmup_steps: int = _option(0, "Warm-up steps of the learning rate.")
    adam_beta1: float = _option(0.9, "AdamW beta1.")
    adam_beta2: float = _option(0.999, "AdamW beta2.")
    adam_weight_decay: float = _option(1e-2, "AdamW weight decay; for CERSA it pulls towards the base, not towards zero.")
    adam_epsilon: float = _option(1e-8, "AdamW epsilon.")
    max_grad_norm: float = _option(1.0, "Gradient clipping.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "Default: what `accelerate launch` was given.")
    checkpointing_steps: int = _option(500, "A checkpoint to resume from every so many steps.")
    checkpoints_total_limit: int | None = _option(None, "Keep only this many newest checkpoints.")
    resume_from_checkpoint: str | None = _option(None, "'latest' or the path of a checkpoint folder.")
    validation_prompt: str | None = _option(None, "Pictures of this prompt are made with the saved result at the end.")
    num_validation_images: int = _option(4, "Validation pictures.")
    dataloader_num_workers: int = _option(0, "Processes that load pictures.")

    def __post_init__(self):
        CersaConfig(alpha=self.alpha, beta=self.beta)
        for name in ("instance_prompt", "output_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty")
        for name in ("rank", "num_class_images", "sample_batch_size", "resolution", "train_batch_size", "max_train_steps",
                     "gradient_accumulation_steps", "checkpointing_steps", "num_validation_images"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "text_encoder_lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ConfigError("checkpoints_total_limit must be at least 1, or left out to keep all")
        self._check_prior()

    def _check_prior(self):
        if not self.with_prior_preservation:
            if self.class_data_dir or self.class_prompt:
                raise ConfigError("class_data_dir and class_prompt need --with_prior_preservation")
            return
        if not self.class_data_dir or not self.class_prompt:
            raise ConfigError("with_prior_preservation needs both class_data_dir and class_prompt")
        if os.path.realpath(self.class_data_dir) == os.path.realpath(self.instance_data_dir):
            raise ConfigError(f"class_data_dir and instance_data_dir are the same folder ({self.instance_data_dir})")

    def cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        """The CERSA settings of this run for one set of layers."""
        return CersaConfig(alpha=self.alpha, beta=self.beta, target_modules=target_modules)

    def same_run(self, other: dict) -> list[str]:
        """Names of the settings that decide the result and differ from a saved configuration."""
        may_change = {"resume_from_checkpoint", "output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
                      "validation_prompt", "num_validation_images", "dataloader_num_workers", "sample_batch_size"}  # fmt: skip
        own = json.loads(json.dumps(asdict(self)))
        return sorted(name for name in own if name not in may_change and own[name] != other.get(name, own[name]))

    def write(self, path: Path) -> None:
        """Writes the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
