"""The methods by name."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from cersa_diffusion.methods.base import Method, Targets
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.methods.full import FullMethod
from cersa_diffusion.methods.lora import DoraMethod, LoraMethod, PissaMethod
from cersa_diffusion.methods.settings import MethodSettings

METHODS: dict[str, type[Method]] = {
    "cersa": CersaMethod,
    "svfit": CersaMethod,
    "svft": CersaMethod,
    "lora": LoraMethod,
    "pissa": PissaMethod,
    "dora": DoraMethod,
    "full": FullMethod,
}


def make_method(settings: MethodSettings, targets: Mapping[str, Targets]) -> Method:
    """The method that the settings choose; `targets` as in `Method`."""
    return METHODS[settings.method](settings, targets)


def load_result(
    method: str,
    weights_path: Path,
    base: str,
    *,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Opens the result of a run in a new pipeline, as the code that is printed at the end of the run does.

    Args:
        method: a key of `METHODS`.
        weights_path: `TrainResult.weights_path`.
        base: the base of the run.
        dtype, revision, variant: see `load_base`.
    """
    return METHODS[method].open(weights_path, base, dtype=dtype, revision=revision, variant=variant)
