"""The optimizers of `--optimizer` and the moving average, each from the library that maintains it."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training.settings.config import DreamBoothConfig

# Optimizers of other packages: the package, and the extra of this package that installs it.
_PACKAGES = {"adamw8bit": ("bitsandbytes", "8bit"), "prodigy": ("prodigyopt", "prodigy")}


def optimizer_name(config: DreamBoothConfig) -> str:
    """The name of a run's optimizer, which `use_8bit_adam` may change."""
    return "adamw8bit" if config.use_8bit_adam else config.optimizer


def check_optimizer(config: DreamBoothConfig) -> None:
    """Refuses an optimizer whose package is not installed.

    Raises:
        ConfigError: the package is missing; the message names the command that installs it.
    """
    name = optimizer_name(config)
    package, extra = _PACKAGES.get(name, (None, None))
    if package and not find_spec(package):
        raise ConfigError(f"optimizer {name} needs the package {package}: pip install 'cersa-diffusion[{extra}]'")


def make_optimizer(config: DreamBoothConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of a run, for groups with "params" and "lr" of each component."""
    name = optimizer_name(config)
    if name == "adafactor":
        # Steps are not scaled by the size of the weights: cores and LoRA's B start at zero and would hardly change.
        return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=config.adam_weight_decay)
    betas = (config.adam_beta1, config.adam_beta2)
    adam = {"betas": betas, "weight_decay": config.adam_weight_decay, "eps": config.adam_epsilon}
    if name == "adamw":
        # One kernel for all parameters of a GPU; on a CPU the plain implementation keeps the bits of earlier runs.
        fused = groups[0]["params"][0].device.type == "cuda"
        return torch.optim.AdamW(groups, **adam, fused=fused)
    package = import_module(_PACKAGES[name][0])
    optimizer_class = package.optim.AdamW8bit if name == "adamw8bit" else package.Prodigy
    return optimizer_class(groups, **adam)


def make_average(config: DreamBoothConfig, parameters: Sequence[nn.Parameter]) -> EMAModel:
    """The moving average of the trained parameters."""
    # As for AdamW: a few kernels for all parameters of a GPU, and the bits of earlier runs on a CPU.
    return EMAModel(parameters, decay=config.ema_decay, foreach=parameters[0].device.type == "cuda")
