"""The settings of a DreamBooth run: names and meaning of the diffusers examples, as a dataclass that becomes the command line."""

import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from cersa_diffusion.baselines import svfit_config, svft_config
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError

LORA_METHODS = ("lora", "pissa", "dora")
# Options that not all methods read, with those that do.
READ_BY = dict.fromkeys(("alpha", "beta", "core", "block", "unprofitable", "memory_budget"), ("cersa",)) | {
    "rank": LORA_METHODS,
    "svfit_rank": ("svfit",),
    "sparse_pattern": ("svft", "cersa"),
    "off_diagonals": ("svft", "cersa"),
}


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
    method: Literal["cersa", "lora", "pissa", "dora", "svfit", "svft", "full"] = _option(
        "cersa", "What is trained, always on the same linear layers."
    )
    alpha: float = _cersa_option("alpha")
    beta: float | None = _cersa_option("beta")
    core: Literal["matrix", "diagonal", "sparse"] = _cersa_option("core")
    block: Literal["top", "bottom"] = _cersa_option("block")
    unprofitable: Literal["factor", "skip"] = _cersa_option("unprofitable")
    memory_budget: str | None = _cersa_option("memory_budget")
    rank: int = _option(32, "LoRA, PiSSA, DoRA: rank (and lora_alpha, so that the scale is 1).")
    svfit_rank: int = _option(768, "SVFit: singular values that are trained; all of a layer that has fewer.")
    sparse_pattern: Literal["banded", "random", "top_k"] = _option(
        "banded", "SVFT (and core='sparse'): which entries are trained."
    )
    off_diagonals: int = _option(
        2,
        "SVFT (and core='sparse'): off-diagonals on either side; the other patterns train as many entries as the banded one "
        "would. 2 comes to the trained parameters of the CERSA paper's comparison (Table 14), 0 is SVFT-plain.",
    )
    unet_target_modules: list[str] | None = _option(
        None,
        "Layers of the UNet to train: name endings, 'all-linear' (the default), or one regular expression for whole names.",
    )
    text_encoder_target_modules: list[str] | None = _option(
        None,
        "Layers of the text encoder to train, in the same forms. Default: those of the attention, q_proj k_proj v_proj out_proj.",
    )
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
    snr_gamma: float | None = _option(
        None, "Weight samples by min-SNR with this gamma (arXiv 2303.09556 recommends 5), class pictures too. Default: all alike."
    )
    noise_offset: float = _option(
        0.0, "Shift the noise of every channel by a random number of this scale: for dark and bright pictures."
    )
    max_grad_norm: float = _option(1.0, "Gradient clipping.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "Default: what `accelerate launch` was given.")
    checkpointing_steps: int = _option(500, "A checkpoint to resume from every so many steps.")
    checkpoints_total_limit: int | None = _option(None, "Keep only this many newest checkpoints.")
    resume_from_checkpoint: str | None = _option(None, "'latest' or the path of a checkpoint folder.")
    validation_prompt: str | None = _option(None, "Pictures of this prompt are made with the saved result at the end.")
    num_validation_images: int = _option(4, "Validation pictures.")
    dataloader_num_workers: int = _option(0, "Processes that load pictures.")

    def __post_init__(self):
        if self.memory_budget is not None and self.method != "cersa":
            raise ConfigError(f"memory_budget chooses what CERSA keeps: method {self.method!r} takes the memory it takes")
        for name in ("instance_prompt", "output_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty")
        for name in ("rank", "svfit_rank", "num_class_images", "sample_batch_size", "resolution", "train_batch_size",
                     "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
                     "num_validation_images"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "text_encoder_lr", "snr_gamma"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ConfigError("checkpoints_total_limit must be at least 1, or left out to keep all")
        if self.noise_offset < 0:
            raise ConfigError(f"noise_offset is {self.noise_offset}, expected 0 or more")
        self._method_config("all-linear")
        self._check_targets()
        self._check_prior()
        self._warn_of_ignored()

    def _check_prior(self):
        if not self.with_prior_preservation:
            if self.class_data_dir or self.class_prompt:
                raise ConfigError("class_data_dir and class_prompt need --with_prior_preservation")
            return
        if not self.class_data_dir or not self.class_prompt:
            raise ConfigError("with_prior_preservation needs both class_data_dir and class_prompt")
        if os.path.realpath(self.class_data_dir) == os.path.realpath(self.instance_data_dir):
            raise ConfigError(f"class_data_dir and instance_data_dir are the same folder ({self.instance_data_dir})")

    def _check_targets(self):
        for name in ("unet_target_modules", "text_encoder_target_modules"):
            targets = getattr(self, name)
            if targets is None:
                continue
            if not targets or isinstance(targets, str):
                raise ConfigError(
                    f"{name} is {targets!r}, expected a list of name endings, ['all-linear'] or one regular expression"
                )
            try:
                re.compile(targets[0] if len(targets) == 1 else "")
            except re.error as error:
                raise ConfigError(f"{name}: {targets[0]!r} is no regular expression ({error})") from error

    def _warn_of_ignored(self):
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        ignored = [name for name in changed if self.method not in READ_BY.get(name, (self.method,))]
        if ignored:
            warnings.warn(f"method {self.method!r} ignores {', '.join(ignored)}", stacklevel=4)
        sparse = [name for name in changed if name in ("sparse_pattern", "off_diagonals")]
        if sparse and self.method == "cersa" and self.core != "sparse":
            warnings.warn(f"without core='sparse', {', '.join(sparse)} is ignored", stacklevel=4)
        frozen = [name for name in changed if name in ("text_encoder_lr", "text_encoder_target_modules")]
        if frozen and not self.train_text_encoder:
            warnings.warn(f"without train_text_encoder, {', '.join(frozen)} is ignored", stacklevel=4)

    def cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        """The CERSA settings that the method (cersa, svfit or svft) comes to, for one set of layers."""
        with warnings.catch_warnings():
            # Said once, when the settings of the run were checked.
            warnings.simplefilter("ignore")
            return self._method_config(target_modules)

    def _method_config(self, target_modules: str | list[str]) -> CersaConfig:
        sparse = {"sparse_pattern": self.sparse_pattern, "off_diagonals": self.off_diagonals}
        if self.method == "svfit":
            return svfit_config(self.svfit_rank, target_modules=target_modules)
        if self.method == "svft":
            return svft_config(self.sparse_pattern, self.off_diagonals, target_modules=target_modules)
        return CersaConfig(
            alpha=self.alpha,
            beta=self.beta,
            core=self.core,
            block=self.block,
            unprofitable=self.unprofitable,
            memory_budget=self.memory_budget,
            target_modules=target_modules,
            **(sparse if self.core == "sparse" else {}),
        )

    def target_modules(self, component: str) -> str | list[str] | None:
        """Which layers of a component were asked for, as `match_targets` takes it; None for the default.

        Args:
            component: "unet" or "text_encoder".
        """
        chosen = {"unet": self.unet_target_modules, "text_encoder": self.text_encoder_target_modules}[component]
        if chosen is None:
            return None
        # One plain name is an ending, as it is among several; anything else that is alone is a pattern for whole names.
        pattern = len(chosen) == 1 and (chosen[0] == "all-linear" or not re.fullmatch(r"[\w.]+", chosen[0]))
        return chosen[0] if pattern else chosen

    def same_run(self, other: dict) -> list[str]:
        """Names of the settings that decide the result and differ from a saved configuration."""
        may_change = {"resume_from_checkpoint", "output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
                      "validation_prompt", "num_validation_images", "dataloader_num_workers", "sample_batch_size"}  # fmt: skip
        own = json.loads(json.dumps(asdict(self)))
        return sorted(name for name in own if name not in may_change and own[name] != other.get(name, own[name]))

    def write(self, path: Path) -> None:
        """Writes the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
