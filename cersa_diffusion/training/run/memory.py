"""The planned memory of a training, compared with LoRA and full fine-tuning of the same layers; and measured memory."""

from collections.abc import Iterable, Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cersa_diffusion.layers.model import cersa_layers, match_targets, trainable_parameters
from cersa_diffusion.memory.budget import dense_layers, untouched_bytes
from cersa_diffusion.memory.cost import FLOAT32, OPTIMIZERS, LayerInput, MemoryUse, full_memory, lora_memory
from cersa_diffusion.memory.plan import plan_memory
from cersa_diffusion.memory.tables import PARTS
from cersa_diffusion.methods.base import Method
from cersa_diffusion.methods.cersa import CersaMethod
from cersa_diffusion.pipelines.peaks import Conditions, device_bytes_beside, model_bytes, preparing_peak
from cersa_diffusion.pipelines.step import step_bytes
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
    """Planned bytes of the trained components by method; the first entry is the method of the run.

    DoRA is counted as LoRA, without its magnitudes (one number per output feature).

    Args:
        config: the settings.
        method: the method of the run.
        components: the dense models by name.
        dtype: compute dtype of the training.
        tokens: the inputs of the layers in one step.
    """
    rank, optimizer = config.rank, optimizer_name(config)
    if isinstance(method, CersaMethod):
        settings = {name: method.config(name) for name in components}
        plan = plan_memory(components, settings, lora_rank=rank, optimizer=optimizer, weight_dtype=dtype, tokens=tokens)
        totals = plan.totals()["whole_model"]
        return {config.method: totals["cersa"], _lora_title(config): totals["lora"], "full": totals["full"]}
    target_layers = {
        f"{component}.{name}": layer
        for component, model in components.items()
        for name, layer in match_targets(model, method.targets[component]).items()
    }
    layers = dense_layers(components, target_layers, dtype, tokens).values()
    targets = list(target_layers.values())
    # Bytes of the weights outside the target layers: full fine-tuning keeps them in float32.
    lora_rest, full_rest = (sum(untouched_bytes(components, targets, kept).values()) for kept in (dtype, torch.float32))
    uses = {
        _lora_title(config): sum((lora_memory(layer, rank, optimizer) for layer in layers), MemoryUse(lora_rest)),
        "full": sum((full_memory(layer, optimizer) for layer in layers), MemoryUse(full_rest)),
    }
    return dict(reversed(uses.items())) if config.method == "full" else uses


def _lora_title(config: DreamBoothConfig) -> str:
    method = config.method if config.method in ("pissa", "dora") else "lora"
    return f"{method} r={config.rank}"


def planned_preparing(
    config: DreamBoothConfig,
    base: DiffusionPipeline,
    method: Method,
    components: Mapping[str, nn.Module],
    use: MemoryUse,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """The planned peak of preparing the models in bytes: on the device, or on a CPU beside Python and its libraries.

    Args:
        config: the settings.
        base: the dense base pipeline in CPU memory.
        method: the method of the run.
        components: the models to train by name.
        use: what they need for the method.
        device, dtype: of the training.
    """
    factors = isinstance(method, CersaMethod)
    shapes = [
        tuple(layer.weight.shape)
        for name, model in components.items()
        for layer in (match_targets(model, method.targets[name]).values() if factors else ())
    ]
    on_cpu, conditions = device.type == "cpu", _conditions(config, components, dtype)
    return preparing_peak(base, use, shapes, conditions, on_cpu=on_cpu, truncates=config.method == "cersa").device


def planned_training(
    config: DreamBoothConfig,
    base: DiffusionPipeline,
    components: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """The planned peak of the steps in bytes, counted on the prepared models; arguments and result as in `planned_preparing`."""
    conditions = _conditions(config, components, dtype)
    trained = [parameter for model in components.values() for parameter in trainable_parameters(model)]
    state = sum(OPTIMIZERS[optimizer_name(config)](*parameter.shape) for parameter in trained)
    state += tensor_bytes(trained) if config.use_ema else 0
    step = step_bytes(base, batch=conditions.batch, resolution=conditions.resolution, dtype=dtype)
    models = sum(map(model_bytes, components.values()))
    if device.type != "cpu":
        return device_bytes_beside(base, conditions) + models + state + step
    others = [model for model in base.components.values() if isinstance(model, nn.Module) and model not in components.values()]
    # In float32 the weights that nobody changed keep the files mapped, with the pages of those that were replaced.
    mapped = sum(layer.weight.numel() * FLOAT32 for model in components.values() for layer in cersa_layers(model).values())
    return sum(map(model_bytes, others)) + models + state + step + (mapped if dtype == torch.float32 else 0)


def _conditions(config: DreamBoothConfig, components: Mapping[str, nn.Module], dtype: torch.dtype) -> Conditions:
    pictures = config.train_batch_size * (2 if config.with_prior_preservation else 1)
    cached = {"latents_cached": config.caches_latents, "prompts_cached": config.caches_text_embeddings}
    return Conditions(pictures, config.resolution, dtype, tuple(components), **cached)


def memory_table(uses: Mapping[str, MemoryUse], config: DreamBoothConfig, dtype: torch.dtype) -> str:
    """The plan as a table in MiB.

    Args:
        uses: the result of `planned_memory`.
        config: the settings.
        dtype: compute dtype of the training.
    """
    rows = [[title, *(mib(getattr(use, part)) for use in uses.values())] for part, title in PARTS.items()]
    rows.append(["together", *(mib(use.total) for use in uses.values())])
    models = "UNet and text encoder" if config.train_text_encoder else "UNet"
    caption = (
        f"memory plan of {models} in MiB, {optimizer_name(config)}, {str(dtype).removeprefix('torch.')}; saved activations are "
        "those of the target layers"
    )
    if config.gradient_checkpointing:
        caption += ", and gradient checkpointing keeps only a part of them"
    if config.use_ema:
        caption += "; the moving average needs the memory of the trained weights once more"
    return f"{caption}\n{table(['', *uses], rows)}"


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the values in all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
