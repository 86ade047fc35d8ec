"""The peak memory of a computation, counted without doing it: fake tensors have a shape and a dtype, but no numbers."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, as long as these live.

    Attributes:
        live: bytes of the tensors that are alive.
        peak: the highest count so far.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **kwargs)
        # Views and results in place share the memory of an argument.
        for storage in {_storage(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)} - known:
            size = storage.nbytes()
            self.live += size
            weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storage(tensor):
    return tensor.untyped_storage()
