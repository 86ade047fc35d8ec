"""The inputs of the linear layers of a model in one step: they decide how much is saved for the backward pass."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cersa_diffusion.layers.kinds import can_be_factored
from cersa_diffusion.layers.model import components_of, named_layers
from cersa_diffusion.memory.cost import LayerInput


def count_tokens(model: nn.Module | Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, LayerInput]:
    """Runs a forward pass and records the input of every linear layer.

    Args:
        model: any torch model, or the components of a pipeline by name.
        forward: runs the model once. All inputs stay in memory until it returns; under `FakeTensorMode` they take no memory.

    Returns:
        "component.layer name" -> rows and source; 0 rows for a layer that does not run.
    """
    inputs: dict[str, list[Tensor]] = {}
    handles = []

    def recording_hook(name: str) -> Callable:
        def hook(_module, args, kwargs):
            inputs[name].append(args[0] if args else kwargs["input"])

        return hook

    for component, module in components_of(model).items():
        for name, layer in named_layers(module).items():
            if can_be_factored(layer):
                key = f"{component}.{name}"
                inputs[key] = []
                handles.append(layer.register_forward_pre_hook(recording_hook(key), with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    sources: dict[StorageWeakRef, int] = {}
    return {name: _layer_input(tensors, sources) for name, tensors in inputs.items()}


def _layer_input(tensors: list[Tensor], sources: dict[StorageWeakRef, int]) -> LayerInput:
    rows = sum(x.numel() // x.shape[-1] for x in tensors)
    if len(tensors) != 1:
        return LayerInput(rows)
    # Tensors are compared by storage, so that reshaped views count as the same tensor.
    storage = StorageWeakRef(tensors[0].untyped_storage())
    return LayerInput(rows, sources.setdefault(storage, len(sources)))
