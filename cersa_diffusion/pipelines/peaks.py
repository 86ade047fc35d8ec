"""The planned peaks of a training: what preparing the models takes on the device and in system memory, and what a step takes."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from cersa_diffusion.families.table import family_of
from cersa_diffusion.memory.cost import MemoryUse, solver_bytes
from cersa_diffusion.memory.plan import MemoryPlan
from cersa_diffusion.pipelines.step import encoding_bytes, step_bytes
from cersa_diffusion.weights.decompose import MAX_WORKERS


@dataclass(frozen=True)
class Conditions:
    """What the peaks depend on, beside the method.

    Attributes:
        batch: pictures per step.
        resolution: their width and height in pixels.
        dtype: compute dtype.
        trained: names of the trained components.
        latents_cached: the latents are encoded before the denoiser is prepared, so that the VAE can leave the device.
        prompts_cached: so are the prompts, and the text encoders leave it.
    """

    batch: int
    resolution: int
    dtype: torch.dtype
    trained: Collection[str]
    latents_cached: bool = False
    prompts_cached: bool = False


@dataclass(frozen=True)
class PreparingPeak:
    """Planned bytes while the models are prepared: on the device, and in CPU memory beside Python and its libraries."""

    device: int
    ram: int


def preparing_peak(
    pipeline, use: MemoryUse, shapes: Collection[tuple[int, int]], conditions: Conditions, *, on_cpu: bool, truncates: bool
) -> PreparingPeak:
    """The peak while the trainer prepares the models.

    Args:
        pipeline: the dense pipeline in CPU memory, whose files may be mapped into memory.
        use: what the method needs for all trained components.
        shapes: (m, n) of the layers that are decomposed; empty for a method that decomposes none.
        conditions: the conditions.
        on_cpu: the training runs on the CPU: both figures are then the same.
        truncates: the loss is measured before and after the layers are prepared.
    """
    family, dtype = family_of(type(pipeline).__name__), conditions.dtype
    size = {"batch": conditions.batch, "resolution": conditions.resolution}
    models = family.components(pipeline)
    base = sum(model_bytes(model) for model in (pipeline.vae, *models.values()))
    final, largest = use.frozen + use.trained, max((solver_bytes(*shape) for shape in shapes), default=0)
    probe = step_bytes(pipeline, **size, dtype=dtype, train=False) if truncates else 0
    encoding = model_bytes(pipeline.vae) + encoding_bytes(pipeline, **size)
    if on_cpu:
        dense = sum(model_bytes(models[name]) for name in conditions.trained)
        kept = dense - sum(m * n for m, n in shapes) * 4 if dtype == torch.float32 else 0
        workers = min(torch.get_num_threads(), MAX_WORKERS)
        peak = base + final - kept + max(largest * workers, probe, encoding - model_bytes(pipeline.vae))
        return PreparingPeak(peak, peak)
    other = device_bytes_beside(pipeline, conditions)
    encoders = sum(model_bytes(models[name]) for name in family.text_encoders)
    leaf = max(model_bytes(module) for module in models[family.denoiser].modules() if not list(module.children()))
    phases = [final + largest, final + probe]
    if conditions.latents_cached:
        phases.append(encoding)
    if conditions.prompts_cached:
        phases.append(encoders)
    if truncates:
        phases.append(probe + leaf + (0 if conditions.prompts_cached else encoders))
    return PreparingPeak(other + max(phases), base)


def planned_peaks(pipeline, plan: MemoryPlan, batch: int, resolution: int | None) -> dict:
    """The peaks of a training on an accelerator, in bytes, whose latents are cached and whose text encoders are trained.

    Args:
        pipeline: the dense pipeline in CPU memory.
        plan: the plan of its denoiser and text encoders.
        batch: pictures per step.
        resolution: width and height of the pictures in pixels; None: the native resolution of the denoiser.

    Returns:
        "preparing" CERSA on the device, "steps" by method, and the "system" memory beside Python and its libraries.
    """
    family = family_of(type(pipeline).__name__)
    resolution = resolution or family.native_resolution(pipeline)
    dtype, components = plan.weight_dtype or torch.float32, family.components(pipeline)
    conditions = Conditions(batch, resolution, dtype, tuple(components), latents_cached=True)
    uses = plan.totals()["whole_model"]
    shapes = [(layer.out_features, layer.in_features) for layer in plan.layers]
    preparing = preparing_peak(pipeline, uses["cersa"], shapes, conditions, on_cpu=False, truncates=True)
    beside = step_bytes(pipeline, batch=batch, resolution=resolution, dtype=dtype, as_loaded=False)
    steps = {method: use.total + beside for method, use in uses.items()}
    return {"preparing": preparing.device, "steps": steps, "system": preparing.ram}


def device_bytes_beside(pipeline, conditions: Conditions) -> int:
    """Bytes of the models that a step needs on the device and nobody trains."""
    family = family_of(type(pipeline).__name__)
    frozen = {
        name: model
        for name, model in family.components(pipeline).items()
        if name not in conditions.trained and not (conditions.prompts_cached and name in family.text_encoders)
    }
    vae = 0 if conditions.latents_cached else model_bytes(pipeline.vae)
    return vae + sum(model_bytes(model, conditions.dtype) for model in frozen.values())


def model_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of all tensors of a model; if a dtype is given, as if all floating-point tensors had it."""
    return sum(
        tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in (*model.parameters(), *model.buffers())
    )
