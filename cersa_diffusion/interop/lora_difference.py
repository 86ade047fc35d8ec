"""What a LoRA made of an adapter does to the outputs of a model: real forward passes on the original and the truncated base."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cersa_diffusion.functional import float64
from cersa_diffusion.layers.kinds import as_dense
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers, replace_module


@dataclass(frozen=True)
class OutputDifference:
    """``|y_lora - y_cersa| / |y_cersa|`` of a component's output; None on the original base where its weights were not kept."""

    original: float | None
    truncated: float

    def __str__(self) -> str:
        original = "not measured (its weights were not kept)" if self.original is None else f"{self.original:.2%}"
        return f"{original} on the original base, {self.truncated:.2%} on the truncated base"


def captured_inputs(pipeline, components: Mapping[str, nn.Module], prompt: str) -> dict[str, tuple[tuple, dict]]:
    """What the components are given first when the pipeline draws a prompt.

    Args:
        pipeline: a text-to-image pipeline.
        components: some of its models by name.
        prompt: what to draw, in two steps, without decoding the picture.

    Returns:
        Component -> positional and keyword arguments; components that do not run are left out.
    """
    inputs: dict[str, tuple[tuple, dict]] = {}

    def note(name: str) -> Callable:
        return lambda _module, args, kwargs: inputs.setdefault(name, (args, kwargs)) and None

    handles = [model.register_forward_pre_hook(note(name), with_kwargs=True) for name, model in components.items()]
    quiet = dict(getattr(pipeline, "_progress_bar_config", {}))
    try:
        pipeline.set_progress_bar_config(**(quiet | {"disable": True}))
        generator = torch.Generator().manual_seed(0)
        pipeline(prompt, num_inference_steps=2, output_type="latent", generator=generator)
    finally:
        pipeline.set_progress_bar_config(**quiet)
        for handle in handles:
            handle.remove()
    return inputs


def output_differences(
    components: Mapping[str, nn.Module],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    inputs: Mapping[str, tuple[tuple, dict]],
) -> dict[str, OutputDifference]:
    """Runs every component that inputs are given for: as it is, and as plain layers with the LoRA added.

    Args:
        components: injected models by name; left as they are.
        factors: "component.layer" -> LoRA factors (m, rank) and (rank, n).
        inputs: component -> positional and keyword arguments.
    """
    differences = {}
    for component, (args, kwargs) in inputs.items():
        model = components[component]
        layers = cersa_layers(model)
        changes = {name: factors.get(f"{component}.{name}") for name in layers}
        if not any(changes.values()):
            continue
        expected = _output(model, args, kwargs)

        def measure(weight: Callable[[CersaLinear], Tensor], model=model, changes=changes, args=args, kwargs=kwargs) -> Tensor:
            with _plain(model, weight, changes):
                return _output(model, args, kwargs)

        kept = all(layer.dense_weight is not None for layer in layers.values())
        original = measure(lambda layer: layer.dense_weight) if kept else None
        truncated = measure(lambda layer: layer.effective_weight({}))
        differences[component] = OutputDifference(
            None if original is None else _difference(original, expected), _difference(truncated, expected)
        )
    return differences


@contextmanager
def _plain(model: nn.Module, weight: Callable[[CersaLinear], Tensor], changes: Mapping[str, tuple | None]) -> Iterator[None]:
    layers = cersa_layers(model)
    try:
        for name, layer in layers.items():
            dense = float64(weight(layer)).to(layer.U.device)
            if changes[name]:
                up, down = (float64(factor).to(dense.device) for factor in changes[name])
                dense = dense + up @ down
            replace_module(model, name, as_dense(layer, dense.to(layer.U)))
        yield
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)


@torch.no_grad()
def _output(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    training = model.training
    try:
        output = model.eval()(*args, **kwargs)
    finally:
        model.train(training)
    return output if isinstance(output, Tensor) else output[0]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((float64(found) - float64(expected)).norm() / float64(expected).norm().clamp_min(1e-30))
