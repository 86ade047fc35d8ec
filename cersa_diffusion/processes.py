"""What several processes that train one model have to share."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import distributed, nn

from cersa_diffusion.errors import CersaError
from cersa_diffusion.layers.model import layers_by_key

T = TypeVar("T")


def several() -> bool:
    """Whether this process trains together with other processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; all processes must call this at the same point and get the same answer.

    `device` is the device on which the processes exchange tensors.
    """
    if not several():
        return flag
    count = torch.tensor(float(flag), device=device)
    distributed.all_reduce(count)
    return count.item() > 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The entries of a list that fall to this process; the processes take them in turn."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if several() else items


def value_of_first(value: T) -> T:
    """The value that the first process gives; all processes must call this at the same point, and wait for each other."""
    if not several():
        return value
    values: list[T | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values[0]


def wait_for_all() -> None:
    """Returns when all processes have called this."""
    if several():
        distributed.barrier()


def share_bases(components: Mapping[str, nn.Module]) -> None:
    """Copies the frozen bases of the first process into the CERSA layers of all processes.

    The signs of singular vectors are arbitrary, and vectors of close singular values may rotate. With another cache, device,
    driver or thread count, two processes may decompose the same weight differently and would add gradients in different
    coordinates.

    Args:
        components: the prepared models by name, on the device on which the processes exchange tensors.

    Raises:
        CersaError: the processes keep different components; every process raises the same message.
    """
    if not several():
        return
    tensors = {
        f"{key}.{name}": tensor
        for key, layer in layers_by_key(components).items()
        for name, tensor in layer.frozen_tensors().items()
    }
    device = next(parameter.device for model in components.values() for parameter in model.parameters())
    if not any_process(bool(tensors), device):
        return
    layout = hashlib.sha256(repr([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]).encode()).hexdigest()
    layouts: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(layouts, layout)
    differing = [rank for rank, other in enumerate(layouts) if other != layouts[0]]
    if differing:
        raise CersaError(
            f"processes {differing} keep other components of the weights than process 0: expected the same base model, settings "
            "and releases in all processes; compare the base and the installed versions on the machines"
        )
    for tensor in tensors.values():
        # As bytes, because not every backend supports every dtype.
        content = tensor.detach().contiguous()
        distributed.broadcast(content.reshape(-1).view(torch.uint8), src=0)
        tensor.copy_(content)
