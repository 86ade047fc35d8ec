"""Pipelines in memory: loaded once, limited in number, shared by all visitors, and each used by one visitor at a time."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from torch import nn

from cersa_diffusion.pipelines.draw import drawing_dtypes
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import load_result
from gradio_app.library import Base, Run


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    pipeline: DiffusionPipeline | None = None


class PipelineStore:
    """Holds pipelines; if it is full, it removes the least recently used pipelines that are not in use.

    The models of a pipeline are never changed after loading, so components that are equal to those of the base (the autoencoder,
    a text encoder that was not trained) are one object in all pipelines.

    Args:
        capacity: largest number of pipelines at once.
        device: device of the pipelines.
        dtype: their dtype (see `drawing_dtypes`).
    """

    def __init__(self, capacity: int, device: str = "cpu", dtype: torch.dtype | None = None):
        self.capacity, self.device = max(1, capacity), torch.device(device)
        self.dtypes = drawing_dtypes(dtype, self.device)
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._changed = threading.Condition()
        # Loading temporarily changes how modules are created in the whole process, so two loads must not run at the same time.
        self.loading = threading.RLock()
        self._shared: weakref.WeakValueDictionary[tuple[str, str], nn.Module] = weakref.WeakValueDictionary()

    @contextmanager
    def lease(self, base: Base, run: Run | None = None) -> Iterator[DiffusionPipeline]:
        """A pipeline for one visitor only; waits while others use it, or while all held pipelines are in use.

        Do not keep a lease across a `yield` of a stream: if the visitor leaves, the lease would never end.

        Args:
            base: the base.
            run: the run to load on the base; None: the untouched base.

        Raises:
            CersaError: the pipeline cannot be loaded.
        """
        key = _key(base, run)
        entry = self._enter(key)
        try:
            with entry.lock:
                if entry.pipeline is None:
                    with self.loading:
                        entry.pipeline = self._load(base, run)
                yield entry.pipeline
        finally:
            with self._changed:
                entry.users -= 1
                if entry.pipeline is None and not entry.users:
                    self._entries.pop(key, None)
                self._changed.notify_all()

    def held(self) -> int:
        """The number of pipelines in memory."""
        return len(self._entries)

    def put_away(self) -> None:
        """Frees the memory of all pipelines that are not in use; the next lease loads its pipeline again."""
        with self._changed:
            for key in [key for key, entry in self._entries.items() if not entry.users]:
                del self._entries[key]
            self._changed.notify_all()
        if self.device.type == "cuda":
            # torch keeps what it has freed, and other processes cannot use it.
            torch.cuda.empty_cache()

    def _enter(self, key: tuple) -> _Entry:
        with self._changed:
            self._changed.wait_for(lambda: key in self._entries or self._make_room())
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.users += 1
            return entry

    def _make_room(self) -> bool:
        idle = [key for key, entry in self._entries.items() if not entry.users]
        while len(self._entries) >= self.capacity and idle:
            del self._entries[idle.pop(0)]
        return len(self._entries) < self.capacity

    def _load(self, base: Base, run: Run | None) -> DiffusionPipeline:
        if run is None:
            pipeline = load_base(base.source, dtype=self.dtypes)
        else:
            origin = {"revision": run.revision, "variant": run.variant}
            pipeline = load_result(run.method, run.weights_path, base.source, dtype=self.dtypes, **origin)
        pipeline.set_progress_bar_config(disable=True)
        self._share(base, pipeline, untouched=run is None)
        return pipeline.to(self.device)

    def _share(self, base: Base, pipeline: DiffusionPipeline, *, untouched: bool) -> None:
        for name, module in pipeline.components.items():
            if not isinstance(module, nn.Module):
                continue
            module.requires_grad_(False)
            shared = self._shared.get((base.source, name))
            if shared is not None and _same_weights(shared, module):
                pipeline.register_modules(**{name: shared})
            elif shared is None and (untouched or name == "vae"):
                self._shared[base.source, name] = module


def weight_bytes(pipeline: DiffusionPipeline) -> int:
    """Bytes of all weights of a pipeline; each tensor counts once."""
    models = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _key(base: Base, run: Run | None) -> tuple:
    if run is None:
        return (base.source, None, None)
    # A run that was trained again under the same name gets another key.
    return (base.source, str(run.weights_path), run.weights_path.stat().st_mtime_ns)


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    state, other = first.state_dict(), second.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name].cpu(), other[name].cpu()) for name in state)
