"""Measures how far the outputs of a model with an exported LoRA differ from those with the CERSA adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cersa_diffusion.functional import float64
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.pipelines.saving import dense_layers


@dataclass(frozen=True)
class OutputDifference:
    """``|y_lora - y_cersa| / |y_cersa|`` of the output of a component; `original` is None if the base weights were not kept."""

    original: float | None
    truncated: float

    def __str__(self) -> str:
        original = "not measured (its weights were not kept)" if self.original is None else f"{self.original:.2%}"
        return f"{original} on the original base, {self.truncated:.2%} on the truncated base"


def captured_inputs(pipeline, components: Mapping[str, nn.Module], prompt: str) -> dict[str, tuple[tuple, dict]]:
    """Records the arguments of the first forward pass of each component while the pipeline draws a prompt.

    Args:
        pipeline: a text-to-image pipeline.
        components: name -> model, for the models to record.
        prompt: prompt of the picture; it is drawn in two steps and not decoded.

    Returns:
        Component -> positional and keyword arguments; components that do not run are missing.
    """
    inputs: dict[str, tuple[tuple, dict]] = {}

    def recording_hook(name: str) -> Callable:
        return lambda _module, args, kwargs: inputs.setdefault(name, (args, kwargs)) and None

    handles = [model.register_forward_pre_hook(recording_hook(name), with_kwargs=True) for name, model in components.items()]
    progress_config = dict(getattr(pipeline, "_progress_bar_config", {}))
    try:
        pipeline.set_progress_bar_config(**(progress_config | {"disable": True}))
        pipeline(prompt, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0))
    finally:
        pipeline.set_progress_bar_config(**progress_config)
        for handle in handles:
            handle.remove()
    return inputs


def output_differences(
    components: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    inputs: Mapping[str, tuple[tuple, dict]],
) -> dict[str, OutputDifference]:
    """Runs every component with inputs twice: with its CERSA adapter, and as dense layers with the LoRA.

    Args:
        components: name -> model with CERSA layers; the models are not changed.
        factors: "component.layer" -> LoRA factors (m, rank) and (rank, n).
        inputs: component -> positional and keyword arguments.
    """
    differences = {}
    for component, (args, kwargs) in inputs.items():
        changes = {name: factors.get(f"{component}.{name}") for name in cersa_layers(components[component])}
        if any(changes.values()):
            differences[component] = _output_difference(components[component], changes, args, kwargs)
    return differences


def _output_difference(model: nn.Module, changes: Mapping[str, tuple | None], args: tuple, kwargs: dict) -> OutputDifference:
    layers, expected = cersa_layers(model), _output(model, args, kwargs)

    def difference(base_weight: Callable[[CersaLinear], Tensor]) -> float:
        def weight_with_lora(name: str, layer: CersaLinear) -> Tensor:
            weight = float64(base_weight(layer)).to(layer.U.device)
            if changes[name]:
                up, down = (float64(factor).to(weight.device) for factor in changes[name])
                weight = weight + up @ down
            return weight.to(layer.U)

        with dense_layers(model, layers, weight_with_lora):
            output = _output(model, args, kwargs)
        return float((float64(output) - float64(expected)).norm() / float64(expected).norm().clamp_min(1e-30))

    kept = all(layer.dense_weight is not None for layer in layers.values())
    original = difference(lambda layer: layer.dense_weight) if kept else None
    return OutputDifference(original, difference(lambda layer: layer.effective_weight({})))


@torch.no_grad()
def _output(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    training = model.training
    try:
        output = model.eval()(*args, **kwargs)
    finally:
        model.train(training)
    return output if isinstance(output, Tensor) else output[0]
