"""CERSA for diffusers: fine-tuning inside the principal subspace of every linear layer (arXiv 2605.08174).

Importing this package adds `load_cersa_weights` and the methods around it to every diffusers pipeline, and makes
`save_pretrained` write dense weights for models with CERSA layers.
"""

from importlib.util import find_spec

from cersa_diffusion.adapters.compose import (
    active_adapters,
    adapter_names,
    add_adapter,
    delete_adapters,
    disable_adapters,
    enable_adapters,
    set_adapters,
)
from cersa_diffusion.adapters.fuse import fuse, unfuse
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.adapters.save import save_adapter
from cersa_diffusion.compressed.folder import load_compressed
from cersa_diffusion.compressed.write import CompressionReport, compress
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, CersaError, ConfigError, NonFiniteError
from cersa_diffusion.inject import InjectionReport, inject_cersa, merge, restore_base
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import trainable_parameters
from cersa_diffusion.memory.plan import MemoryPlan, choose_ranks, plan_memory
from cersa_diffusion.versions import check_versions

# The core also works without diffusers: for other torch models and for smaller installations.
if find_spec("diffusers"):
    try:
        from diffusers import DiffusionPipeline, ModelMixin
        from transformers import PreTrainedModel
    except (ImportError, RuntimeError):
        check_versions()  # raises a clearer error if the installed packages are a pair that is known to fail
        raise

    from cersa_diffusion.interop.lora import LoraExport, export_lora  # noqa: F401 (exists only with diffusers)
    from cersa_diffusion.pipelines.methods import attach
    from cersa_diffusion.pipelines.saving import save_dense

    attach(DiffusionPipeline)
    save_dense(ModelMixin)
    save_dense(PreTrainedModel)

__all__ = [
    "AdapterFormatError",
    "BaseMismatchError",
    "CersaConfig",
    "CersaError",
    "CersaLinear",
    "CompressionReport",
    "ConfigError",
    "InjectionReport",
    "MemoryPlan",
    "NonFiniteError",
    "active_adapters",
    "adapter_names",
    "add_adapter",
    "choose_ranks",
    "compress",
    "delete_adapters",
    "disable_adapters",
    "enable_adapters",
    "fuse",
    "inject_cersa",
    "load_adapter",
    "load_compressed",
    "merge",
    "plan_memory",
    "restore_base",
    "save_adapter",
    "set_adapters",
    "trainable_parameters",
    "unfuse",
]
__version__ = "0.1.0"
