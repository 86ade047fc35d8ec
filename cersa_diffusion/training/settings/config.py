"""The settings of a DreamBooth run, named as in the diffusers examples; the command line is built from this dataclass."""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import ClassVar, Literal

import torch

from cersa_diffusion.config import listed_targets, option
from cersa_diffusion.families.base import Family
from cersa_diffusion.families.names import is_text_encoder
from cersa_diffusion.families.sdxl import STABLE_DIFFUSION_XL
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.methods.base import Origin
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.training.settings.checks import check_config, check_types

DEFAULT_STEPS = 500
# Processes that decode pictures while a GPU computes.
GPU_WORKERS = 2
RESOLUTION = "Pictures are resized to this number of pixels on the shorter side and cropped to a square."
# Settings that may differ between a run and its continuation.
FREE_ON_RESUME = {"resume_from_checkpoint", "output_dir", "num_train_epochs", "max_train_steps", "checkpointing_steps",
                  "checkpoints_total_limit", "validation_prompt", "num_validation_images", "validation_steps",
                  "validation_inference_steps", "report_to", "logging_dir", "push_to_hub", "hub_token", "hub_model_id",
                  "dataloader_num_workers", "sample_batch_size", "cache_to_disk", "allow_tf32"}  # fmt: skip


def automatic_flag(text: str):
    """A field that is true, false, or None for the default that its help text explains; the option alone means true."""
    return field(default=None, metadata={"help": text, "nargs": "?", "const": True})


@dataclass
class DreamBoothConfig(MethodSettings):
    """One DreamBooth run: the method with its settings, and the settings that all methods share.

    Raises:
        ConfigError: the settings contradict each other or cannot work; raised before anything is loaded or written.
    """

    family: ClassVar[Family] = STABLE_DIFFUSION

    pretrained_model_name_or_path: str = field(metadata={"help": "Base pipeline: a local folder or a model id on the hub."})
    instance_prompt: str = field(
        metadata={"help": "Prompt that names the subject, e.g. 'a photo of sks dog', for pictures without a caption."}
    )
    instance_data_dir: str | None = option(
        None,
        "Folder with the pictures of the subject. Captions are read from a text file with the name of the picture, or from "
        "metadata.jsonl (file_name and caption_column).",
    )
    dataset_name: str | None = option(
        None, "Instead of instance_data_dir: a data set for `datasets.load_dataset`, a hub id or a local folder."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    image_column: str = option("image", "Column of the data set with the pictures.")
    caption_column: str = option("text", "Column of the data set, or key in metadata.jsonl, with the captions.")
    repeats: int = option(1, "Number of times that an epoch contains each picture; only num_train_epochs uses it.")
    unet_target_modules: list[str] | None = option(
        None, "Layers of the UNet to train: name endings, 'all-linear' (the default), or one regular expression for whole names."
    )
    text_encoder_target_modules: list[str] | None = option(
        None, "Layers of the text encoder to train, in the same forms. Default: the attention, q_proj k_proj v_proj out_proj."
    )
    revision: str | None = option(None, "Revision of the base on the hub.")
    variant: str | None = option(None, "Variant of the base's weight files, e.g. fp16.")
    class_data_dir: str | None = option(None, "Folder of class pictures for prior preservation; the base draws missing ones.")
    class_prompt: str | None = option(None, "Prompt of the class pictures, e.g. 'a photo of dog'.")
    with_prior_preservation: bool = option(False, "Also train on class pictures, so that the class does not become the subject.")
    prior_loss_weight: float = option(1.0, "Weight of the prior preservation loss.")
    num_class_images: int = option(100, "Number of class pictures; the base draws missing ones.")
    sample_batch_size: int = option(4, "Batch size for drawing class pictures.")
    output_dir: str = option("cersa-dreambooth-model", "Folder for the result and the checkpoints.")
    seed: int = option(0, "Seed of all random numbers: the same seed on the same machine gives the same result.")
    resolution: int = option(512, RESOLUTION)
    aspect_ratio_buckets: bool = option(
        False, "Keep the aspect ratios of the pictures, at about resolution x resolution pixels, instead of a square crop."
    )
    bucket_step: int = option(64, "The sides of the buckets are multiples of this number of pixels.")
    cache_latents: bool | None = automatic_flag(
        "Encode every picture once, before training; each picture then has one crop. Default: true with center_crop and without "
        "random_flip, where this changes nothing that the model sees."
    )
    pre_compute_text_embeddings: bool | None = automatic_flag(
        "Encode every prompt once, before training, and move the text encoder to the CPU. Default: true if no text encoder is "
        "trained."
    )
    cache_to_disk: bool = option(False, "Keep cached latents and text embeddings in the cache folder, for later runs.")
    center_crop: bool = option(False, "Crop the centre instead of a random square.")
    random_flip: bool = option(False, "Mirror pictures at random.")
    train_text_encoder: bool = option(
        True, "Also train the attention of the text encoder, as the paper does (the diffusers examples leave it frozen)."
    )
    train_batch_size: int = option(4, "Pictures per batch and process.")
    num_train_epochs: int | None = option(None, "Length of the training in epochs, unless max_train_steps is given.")
    max_train_steps: int | None = option(
        None, f"Length of the training in optimizer steps. Default: num_train_epochs, or {DEFAULT_STEPS} steps."
    )
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    learning_rate: float = option(
        5e-4, "Learning rate. The best value differs by method and matters more than the method: try several values."
    )
    text_encoder_lr: float | None = option(
        None, "Learning rate of the text encoder. Default: learning_rate; with a tenth of it, fewer other prompts are forgotten."
    )
    scale_lr: bool = option(
        False, "Multiply the learning rates by the pictures per step (batch size x accumulated batches x processes)."
    )
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = option(
        "constant", "Schedule of the learning rate."
    )
    lr_warmup_steps: int = option(0, "Warm-up steps of the learning rate.")
    lr_num_cycles: int = option(1, "Restarts of cosine_with_restarts.")
    lr_power: float = option(1.0, "Power of polynomial.")
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = option(
        "adamw", "adamw8bit needs the package bitsandbytes, prodigy needs prodigyopt (it finds its own rate: learning_rate 1)."
    )
    use_8bit_adam: bool = option(False, "The same as --optimizer adamw8bit.")
    adam_beta1: float = option(0.9, "AdamW, Prodigy: beta1.")
    adam_beta2: float = option(0.999, "AdamW, Prodigy: beta2.")
    adam_weight_decay: float = option(1e-2, "Weight decay of every optimizer; CERSA decays towards the base, not towards zero.")
    adam_epsilon: float = option(1e-8, "AdamW, Prodigy: epsilon.")
    use_ema: bool = option(False, "Save the moving average of the trained weights, and draw the previews with it.")
    ema_decay: float = option(0.999, "Decay of the moving average (lower in the first steps).")
    snr_gamma: float | None = option(
        None, "Weight samples, also class pictures, by min-SNR with this gamma (arXiv 2303.09556 recommends 5). Default: equally."
    )
    noise_offset: float = option(
        0.0, "Shift the noise of every channel by a random number of this scale: for dark and bright pictures."
    )
    max_grad_norm: float = option(1.0, "Largest norm of the gradients; larger ones are clipped.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Default: the precision given to `accelerate launch`.")
    prior_generation_precision: Literal["fp32", "fp16", "bf16"] | None = option(
        None, "Precision for drawing class pictures. Default: 16 bits on a GPU (bf16 where it computes in it), otherwise fp32."
    )
    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere and later GPUs: faster, less exact.")
    checkpointing_steps: int = option(500, "Steps between two checkpoints.")
    checkpoints_total_limit: int | None = option(None, "Keep only this number of checkpoints, the newest.")
    resume_from_checkpoint: str | None = option(None, "'latest' or the path of a checkpoint folder.")
    validation_prompt: str | None = option(
        None, "Draw previews of this prompt with fixed seeds: before the first step, during training, and with the saved result."
    )
    num_validation_images: int = option(4, "Pictures per preview.")
    validation_steps: int = option(100, "Steps between two previews.")
    validation_inference_steps: int = option(25, "Denoising steps of the pipeline's scheduler for a preview.")
    report_to: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "Also log loss, learning rates and previews to this tracker (its package must be installed)."
    )
    logging_dir: str = option("logs", "Folder of the logs, inside output_dir.")
    push_to_hub: bool = option(False, "Upload the result, its card and the last pictures to the hub at the end.")
    hub_token: str | None = option(None, "Token for the upload. Default: the token of `hf auth login`.")
    hub_model_id: str | None = option(None, "Repository to upload to. Default: the name of output_dir.")
    dataloader_num_workers: int | None = option(
        None, f"Processes that load pictures. Default: {GPU_WORKERS} on a GPU if pictures are decoded between steps, otherwise 0."
    )

    def __post_init__(self):
        check_types(self)
        super().__post_init__()
        check_config(self)

    def target_modules(self, component: str) -> str | list[str] | None:
        """The target layers given for a component, by its name in the pipeline, for `match_targets`; None: the default."""
        chosen = self.text_encoder_target_modules if is_text_encoder(component) else self.unet_target_modules
        return None if chosen is None else listed_targets(chosen)

    @property
    def targets(self) -> dict[str, str | list[str]]:
        """Component -> the layers that are trained, as `match_targets` takes them; the default layers if none are given."""
        return {
            name: self.target_modules(name) or default
            for name, default in self.family.trained.items()
            if self.train_text_encoder or not is_text_encoder(name)
        }

    @property
    def origin(self) -> Origin:
        """The base that is loaded before the training."""
        return Origin(self.pretrained_model_name_or_path, self.revision, self.variant)

    @property
    def caches_latents(self) -> bool:
        """Whether every picture is encoded once, before training: `cache_latents`, or its default."""
        if self.cache_latents is not None:
            return self.cache_latents
        return self.center_crop and not self.random_flip

    @property
    def caches_text_embeddings(self) -> bool:
        """Whether every prompt is encoded once, before training: `pre_compute_text_embeddings`, or its default."""
        if self.pre_compute_text_embeddings is not None:
            return self.pre_compute_text_embeddings
        return not self.train_text_encoder

    def loader_workers(self, device: torch.device) -> int:
        """Processes that load the pictures of a training on this device: `dataloader_num_workers`, or its default."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        # On a CPU they would take its cores from the steps; cached latents are there at once.
        return GPU_WORKERS if device.type == "cuda" and not self.caches_latents else 0

    def total_steps(self, pictures: int, processes: int) -> int:
        """Optimizer steps of the whole training, for a number of pictures of the subject and of processes that train together."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return DEFAULT_STEPS
        return self.num_train_epochs * math.ceil(pictures * self.repeats / self.samples_per_step(processes))

    def samples_per_step(self, processes: int) -> int:
        """Pictures of the subject in one optimizer step of all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def rate(self, component: str, processes: int) -> float:
        """Learning rate of a component, by its name in the pipeline; only `scale_lr` uses the number of processes."""
        separate = is_text_encoder(component) and self.text_encoder_lr is not None
        rate = self.text_encoder_lr if separate else self.learning_rate
        return rate * (self.samples_per_step(processes) if self.scale_lr else 1)

    def same_run(self, other: dict) -> list[str]:
        """Names of the settings that affect the result and differ from saved settings."""
        current = json.loads(json.dumps(asdict(self)))
        # A setting that is missing in a file had its default.
        saved = {f.name: f.default for f in fields(self) if f.default is not MISSING} | other
        return sorted(name for name in current if name not in FREE_ON_RESUME and current[name] != saved.get(name))


@dataclass
class DreamBoothXLConfig(DreamBoothConfig):
    """A DreamBooth run on SDXL; its text encoders are trained together, with the same settings. Raises as `DreamBoothConfig`."""

    family: ClassVar[Family] = STABLE_DIFFUSION_XL

    resolution: int = option(1024, RESOLUTION)
