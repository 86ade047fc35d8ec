"""What several processes that train one model must agree on."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from cersa_diffusion.errors import CersaError
from cersa_diffusion.layers.model import cersa_layers


def several() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process: all get the same answer, at the same point of their work.

    Args:
        flag: of this process.
        device: where the processes exchange tensors.
    """
    if not several():
        return flag
    count = torch.tensor(float(flag), device=device)
    distributed.all_reduce(count)
    return count.item() > 0


def share_bases(components: Mapping[str, nn.Module]) -> None:
    """Gives the CERSA layers of all processes the frozen bases of the first process.

    Singular vectors have free signs and turn within close groups, and processes may decompose the same weight differently
    (another cache, device, driver or thread count). Their gradients would then be added up in different coordinates.

    Args:
        components: the prepared models by name, on the device that the processes exchange tensors on.

    Raises:
        CersaError: the processes keep other components, in every process with the same message.
    """
    if not several():
        return
    tensors = {
        f"{component}.{name}.{kind}": tensor
        for component, model in components.items()
        for name, layer in cersa_layers(model).items()
        for kind, tensor in layer.named_buffers()
    }
    if not any_process(bool(tensors), _device(components)):
        return
    layout = hashlib.sha256(repr([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]).encode()).hexdigest()
    layouts: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(layouts, layout)
    differing = [rank for rank, other in enumerate(layouts) if other != layouts[0]]
    if differing:
        raise CersaError(
            f"processes {differing} keep other components of the weights than process 0: expected the same base model, settings "
            "and releases everywhere; compare the base and the installed versions on the machines"
        )
    for tensor in tensors.values():
        _broadcast(tensor)


def _broadcast(tensor: Tensor) -> None:
    # As bytes: not every backend takes every dtype.
    content = tensor.detach().contiguous()
    distributed.broadcast(content.reshape(-1).view(torch.uint8), src=0)
    tensor.copy_(content)


def _device(components: Mapping[str, nn.Module]) -> torch.device:
    return next(parameter.device for model in components.values() for parameter in model.parameters())
