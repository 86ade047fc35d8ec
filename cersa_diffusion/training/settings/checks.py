"""The checks of a run's settings that need neither models nor files."""

import difflib
import os
import re
import warnings
from dataclasses import fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin, get_type_hints

from cersa_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from cersa_diffusion.training.settings.config import DreamBoothConfig

# Options that have no effect unless another option is set.
NEEDS = {
    "text_encoder_lr": "train_text_encoder",
    "text_encoder_target_modules": "train_text_encoder",
    "ema_decay": "use_ema",
    "bucket_step": "aspect_ratio_buckets",
    "num_validation_images": "validation_prompt",
    "validation_steps": "validation_prompt",
    "validation_inference_steps": "validation_prompt",
    "logging_dir": "report_to",
    "hub_model_id": "push_to_hub",
    "hub_token": "push_to_hub",
    "dataset_config_name": "dataset_name",
    "image_column": "dataset_name",
    "num_class_images": "with_prior_preservation",
    "prior_loss_weight": "with_prior_preservation",
}
# Options that are used only for some values of another option.
READ_BY = {
    "lr_warmup_steps": ("lr_scheduler", lambda name: name != "constant"),
    "lr_power": ("lr_scheduler", lambda name: name == "polynomial"),
    "lr_num_cycles": ("lr_scheduler", lambda name: name == "cosine_with_restarts"),
    "adam_beta1": ("optimizer", lambda name: name != "adafactor"),
    "adam_beta2": ("optimizer", lambda name: name != "adafactor"),
    "adam_epsilon": ("optimizer", lambda name: name != "adafactor"),
}
AT_LEAST_ONE = ("num_class_images", "sample_batch_size", "train_batch_size", "gradient_accumulation_steps",
                "checkpointing_steps", "num_validation_images", "validation_steps", "validation_inference_steps", "repeats",
                "max_train_steps", "num_train_epochs", "checkpoints_total_limit", "lr_num_cycles")  # fmt: skip
MORE_THAN_ZERO = ("learning_rate", "text_encoder_lr", "snr_gamma", "max_grad_norm")
AT_LEAST_ZERO = ("noise_offset", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "dataloader_num_workers",
                 "prior_loss_weight", "seed")  # fmt: skip
SHARES = ("ema_decay", "adam_beta1", "adam_beta2")
# Pipelines accept only multiples of this number of pixels, the smallest unit that the models see.
PIXEL_STEP = 8


def check_names(config_class: type, names: list[str]) -> None:
    """Checks that all names are fields of the settings class.

    Raises:
        ConfigError: a name is unknown; the message suggests the most similar setting.
    """
    known = [field.name for field in fields(config_class)]
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{name} is not a setting of the training" + (f": did you mean {similar[0]}?" if similar else ""))


def check_types(config: "DreamBoothConfig") -> None:
    """Checks that every setting has its type, or is one of its choices.

    Raises:
        ConfigError: a value has another type; the message names the first such setting.
    """
    # Not the `type` of the fields: HfArgumentParser overwrites it.
    types = get_type_hints(type(config))
    for field in fields(config):
        _check_type(field.name, types[field.name], getattr(config, field.name))


def check_config(config: "DreamBoothConfig") -> None:
    """Checks the settings that all methods share, and their combinations.

    Raises:
        ConfigError: a setting cannot be used; the message names the first such setting and what to do.
    """
    _check_numbers(config)
    _check_texts(config)
    _check_sizes(config)
    _check_targets(config)
    _check_prior(config)
    _check_combinations(config)
    _warn_of_ignored(config)


def _check_type(name: str, expected: object, value: object) -> None:
    options = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return
        if option is float and type(value) is int:
            return
        if get_origin(option) is list and type(value) is list and all(type(item) is get_args(option)[0] for item in value):
            return
        if isinstance(option, type) and type(value) is option:
            return
    choices = [f"{choice!r}" for option in options if get_origin(option) is Literal for choice in get_args(option)]
    type_names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", NoneType: "nothing"}
    types = [type_names.get(option, "a list of strings") for option in options if get_origin(option) is not Literal]
    raise ConfigError(f"{name} is {value!r}, expected {' or '.join([', '.join(choices)] * bool(choices) + types)}")


def _check_numbers(config: "DreamBoothConfig") -> None:
    for names, in_range, expected in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_ZERO, lambda value: value >= 0, "0 or more"),
        (MORE_THAN_ZERO, lambda value: value > 0, "more than 0"),
        (SHARES, lambda value: 0 <= value < 1, "at least 0 and less than 1"),
        (("seed",), lambda value: value < 2**32, "less than 2**32"),
    ):
        for name in names:
            value = getattr(config, name)
            if value is not None and not in_range(value):
                raise ConfigError(f"{name} is {value}, expected {expected}")


def _check_texts(config: "DreamBoothConfig") -> None:
    for name in ("pretrained_model_name_or_path", "instance_prompt", "output_dir", "image_column", "caption_column"):
        if not getattr(config, name).strip():
            raise ConfigError(f"{name} is empty")
    if (config.instance_data_dir is None) == (config.dataset_name is None):
        given = "neither is" if config.dataset_name is None else "both are"
        raise ConfigError(f"the pictures come from instance_data_dir or from dataset_name: give one of them ({given} given)")


def _check_sizes(config: "DreamBoothConfig") -> None:
    for name in ("resolution", "bucket_step"):
        value = getattr(config, name)
        if value < PIXEL_STEP or value % PIXEL_STEP:
            raise ConfigError(f"{name} is {value}, expected a multiple of {PIXEL_STEP} pixels")
    if config.aspect_ratio_buckets and config.bucket_step > config.resolution:
        raise ConfigError(f"bucket_step is {config.bucket_step}, expected at most the resolution ({config.resolution})")


def _check_prior(config: "DreamBoothConfig") -> None:
    if not config.with_prior_preservation:
        if config.class_data_dir or config.class_prompt:
            raise ConfigError("class_data_dir and class_prompt need --with_prior_preservation")
        return
    if not config.class_data_dir or not config.class_prompt:
        raise ConfigError("with_prior_preservation needs both class_data_dir and class_prompt")
    if config.instance_data_dir and os.path.realpath(config.class_data_dir) == os.path.realpath(config.instance_data_dir):
        raise ConfigError(f"class_data_dir and instance_data_dir are the same folder ({config.instance_data_dir})")


def _check_targets(config: "DreamBoothConfig") -> None:
    for name in ("unet_target_modules", "text_encoder_target_modules"):
        targets = getattr(config, name)
        if targets is None:
            continue
        if not targets:
            raise ConfigError(f"{name} is {targets!r}, expected name endings, 'all-linear' or one regular expression")
        try:
            re.compile(targets[0] if len(targets) == 1 else "")
        except re.error as error:
            raise ConfigError(f"{name}: {targets[0]!r} is not a regular expression ({error})") from error


def _check_combinations(config: "DreamBoothConfig") -> None:
    if config.use_8bit_adam and config.optimizer not in ("adamw", "adamw8bit"):
        raise ConfigError(f"use_8bit_adam and optimizer {config.optimizer!r} contradict each other: remove one of them")
    if config.pre_compute_text_embeddings and config.train_text_encoder:
        raise ConfigError(
            "pre_compute_text_embeddings needs a frozen text encoder: add --no_train_text_encoder, or remove "
            "pre_compute_text_embeddings"
        )
    if config.cache_to_disk and not (config.caches_latents or config.caches_text_embeddings):
        raise ConfigError("cache_to_disk stores the output of cache_latents or pre_compute_text_embeddings: add one of them")
    if config.optimizer == "prodigy" and config.text_encoder_lr not in (None, config.learning_rate):
        raise ConfigError(
            f"prodigy has a single learning rate: text_encoder_lr ({config.text_encoder_lr}) and learning_rate "
            f"({config.learning_rate}) differ, remove text_encoder_lr"
        )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        warnings.warn(
            f"prodigy multiplies its own estimate by learning_rate: {config.learning_rate} is far below the usual 1", stacklevel=5
        )


def _warn_of_ignored(config: "DreamBoothConfig") -> None:
    changed = [field.name for field in fields(config) if getattr(config, field.name) != field.default]

    def warn(text: str) -> None:
        warnings.warn(text, stacklevel=6)

    for needed in dict.fromkeys(NEEDS.values()):
        ignored = [name for name in changed if NEEDS.get(name) == needed]
        if ignored and not getattr(config, needed):
            warn(f"without {needed}, {', '.join(ignored)} is ignored")
    for name, (option, reads) in READ_BY.items():
        if name in changed and not reads(getattr(config, option)):
            warn(f"{option} {getattr(config, option)} ignores {name}")
    if "num_train_epochs" in changed and config.max_train_steps is not None:
        warn("max_train_steps sets the length of the training: num_train_epochs is ignored")
