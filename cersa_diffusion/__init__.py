"""CERSA for diffusers: fine-tuning inside the principal subspace of every linear layer (arXiv 2605.08174).

Importing this package gives `load_cersa_weights` and `unload_cersa_weights` to every diffusers pipeline.
"""

from importlib.util import find_spec

from cersa_diffusion.adapter import load_adapter, save_adapter
from cersa_diffusion.composition import (
    active_adapters,
    adapter_names,
    add_adapter,
    delete_adapters,
    disable_adapters,
    enable_adapters,
    set_adapters,
)
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, CersaError, ConfigError, NonFiniteError
from cersa_diffusion.inject import InjectionReport, inject_cersa, merge, restore_base, trainable_parameters
from cersa_diffusion.linear import CersaLinear
from cersa_diffusion.planner import MemoryPlan, plan_memory

# The core works without diffusers: other torch models, smaller installations.
if find_spec("diffusers"):
    from diffusers import DiffusionPipeline

    from cersa_diffusion.pipelines import attach

    attach(DiffusionPipeline)

__all__ = [
    "AdapterFormatError",
    "BaseMismatchError",
    "CersaConfig",
    "CersaError",
    "CersaLinear",
    "ConfigError",
    "InjectionReport",
    "MemoryPlan",
    "NonFiniteError",
    "active_adapters",
    "adapter_names",
    "add_adapter",
    "delete_adapters",
    "disable_adapters",
    "enable_adapters",
    "inject_cersa",
    "load_adapter",
    "merge",
    "plan_memory",
    "restore_base",
    "save_adapter",
    "set_adapters",
    "trainable_parameters",
]
__version__ = "0.1.0"
