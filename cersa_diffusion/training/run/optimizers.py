"""The optimizers behind `--optimizer`, each from the library that keeps it."""

from importlib import import_module
from importlib.util import find_spec

import torch

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training.settings.config import DreamBoothConfig

# Optimizers of other packages, and the extra of this one that brings them.
_PACKAGES = {"adamw8bit": ("bitsandbytes", "8bit"), "prodigy": ("prodigyopt", "prodigy")}


def optimizer_name(config: DreamBoothConfig) -> str:
    """The optimizer of a run, `use_8bit_adam` counted in."""
    return "adamw8bit" if config.use_8bit_adam else config.optimizer


def check_optimizer(config: DreamBoothConfig) -> None:
    """Refuses an optimizer whose package is not installed.

    Raises:
        ConfigError: naming the command that installs it.
    """
    name = optimizer_name(config)
    package, extra = _PACKAGES.get(name, (None, None))
    if package and not find_spec(package):
        raise ConfigError(f"optimizer {name} needs the package {package}: pip install 'cersa-diffusion[{extra}]'")


def make_optimizer(config: DreamBoothConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Args:
        config: the settings.
        groups: "params" and "lr" of each component.
    """
    name = optimizer_name(config)
    if name == "adafactor":
        # Steps are not scaled by the size of the weights: cores and LoRA's B begin at zero and would hardly move.
        return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=config.adam_weight_decay)
    adam = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if name == "adamw":
        return torch.optim.AdamW(groups, **adam)
    package = import_module(_PACKAGES[name][0])
    if name == "adamw8bit":
        return package.optim.AdamW8bit(groups, **adam)
    return package.Prodigy(groups, **adam)
