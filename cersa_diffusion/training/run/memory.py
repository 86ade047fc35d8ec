"""What the training of a method will keep in memory, beside LoRA and full fine-tuning of the same layers, before it begins."""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.memory.budget import dense_layers, untouched_bytes
from cersa_diffusion.memory.cost import LayerInput, MemoryUse, full_memory, lora_memory
from cersa_diffusion.memory.plan import plan_memory
from cersa_diffusion.memory.tables import PARTS
from cersa_diffusion.methods.base import Method
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.text import mib, table
from cersa_diffusion.training.run.optimizers import optimizer_name
from cersa_diffusion.training.settings.config import DreamBoothConfig


def planned_memory(
    config: DreamBoothConfig,
    method: Method,
    components: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    tokens: Mapping[str, LayerInput],
) -> dict[str, MemoryUse]:
    """Bytes of the trained components by method, the run's own first.

    DoRA is counted as LoRA: its magnitudes, a number per output feature, are left out.

    Args:
        config: the settings.
        method: that is trained.
        components: the dense models by name.
        dtype: compute dtype of the training.
        tokens: what the layers are given in one step.
    """
    optimizer = optimizer_name(config)
    if isinstance(method, CersaMethod):
        settings = {name: method.config(name) for name in components}
        plan = plan_memory(
            components, settings, lora_rank=config.rank, optimizer=optimizer, weight_dtype=dtype, tokens=tokens
        )  # fmt: skip
        whole = plan.totals()["whole_model"]
        return {config.method: whole["cersa"], _lora_title(config): whole["lora"], "full": whole["full"]}
    linears = {
        f"{component}.{name}": layer
        for component, model in components.items()
        for name, layer in match_targets(model, method.targets[component]).items()
    }
    layers = dense_layers(linears, dtype, tokens).values()
    frozen, full = (sum(untouched_bytes(components, list(linears.values()), each).values()) for each in (dtype, torch.float32))
    uses = {
        _lora_title(config): sum((lora_memory(layer, config.rank, optimizer) for layer in layers), MemoryUse(frozen)),
        "full": sum((full_memory(layer, optimizer) for layer in layers), MemoryUse(full)),
    }
    return dict(reversed(uses.items())) if config.method == "full" else uses


def _lora_title(config: DreamBoothConfig) -> str:
    method = config.method if config.method in ("pissa", "dora") else "lora"
    return f"{method} r={config.rank}"


def memory_table(uses: Mapping[str, MemoryUse], config: DreamBoothConfig, dtype: torch.dtype) -> str:
    """The plan as a table in MiB.

    Args:
        uses: of `planned_memory`.
        config: the settings.
        dtype: compute dtype of the training.
    """
    rows = [[title, *(mib(getattr(use, part)) for use in uses.values())] for part, title in PARTS.items()]
    rows.append(["together", *(mib(use.total) for use in uses.values())])
    caption = (
        f"memory plan of {' and '.join(_trained(config))} in MiB, {optimizer_name(config)}, {str(dtype).removeprefix('torch.')}; "
        "saved activations are those of the target layers"
    )
    if config.gradient_checkpointing:
        caption += ", and gradient checkpointing keeps only a part of them"
    if config.use_ema:
        caption += "; the moving average takes the trained weights once more"
    return f"{caption}\n{table(['', *uses], rows)}"


def _trained(config: DreamBoothConfig) -> list[str]:
    return ["UNet", "text encoder"] if config.train_text_encoder else ["UNet"]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers in tensors.

    Args:
        tensors: each is counted once.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or on a CPU the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # getrusage would also count what the process that started this one held at that moment.
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    if sys.platform == "win32":
        # Imported here, as below: each is there for one kind of system.
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
