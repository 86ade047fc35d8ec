"""The checkpoint that a model was loaded from: it may store the weights more exactly than the model in memory.

Rounding a weight to bfloat16 rotates its singular vectors. If the kept components end between two close singular values, even
the kept subspace rotates, and an adapter no longer fits it. Therefore the weight on disk is decomposed, but only if, rounded to
the dtype in memory, it equals the weight in memory bit for bit. A model that was changed after loading, or another model of the
same name, is never confused with its checkpoint. Only safetensors files are read, never a pickle.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor, nn

# Of several variants of a checkpoint, the one with the smallest relative rounding error is decomposed.
_ROUNDING = {
    name: torch.finfo(dtype).eps
    for name, dtype in (("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16))
}


@dataclass(frozen=True)
class StoredWeight:
    """A reference to a weight on disk, which takes no memory.

    Attributes:
        path: a safetensors file.
        key: the name of the tensor in it.
        rounding: relative rounding error of the numbers on disk.
        dtype: dtype of the weight in memory.
        requires_grad: that of the weight in memory.
        state: size, modification time and inode of the file when it was compared with the weight in memory.
    """

    path: Path
    key: str
    rounding: float
    dtype: torch.dtype
    requires_grad: bool
    state: tuple[int, int, int]

    def read(self) -> Tensor | None:
        """The weight in its dtype in memory, on the CPU, or None if the file was changed or removed since the comparison."""
        try:
            if _state(self.path) != self.state:
                return None
            with safetensors.safe_open(self.path, framework="pt") as file:
                tensor = file.get_tensor(self.key)
        except (OSError, safetensors.SafetensorError):
            return None
        return tensor.to(self.dtype, copy=True).requires_grad_(self.requires_grad)


class FinestWeight(NamedTuple):
    """A weight with the most exact numbers there are.

    Attributes:
        tensor: (m, n) in CPU memory, or memory-mapped from the checkpoint if that is more exact than the model.
        stored: the weight in the checkpoint, if its file holds exactly this weight.
    """

    tensor: Tensor
    stored: StoredWeight | None = None


class Checkpoint:
    """The safetensors files of a model's checkpoint; each tensor is read only when it is needed.

    Args:
        folder: the folder of the files (shards and variants included), or None if the model was not loaded from files.
        nested: search its subfolders instead (a model loaded with `subfolder=` remembers only the parent folder).
    """

    def __init__(self, folder: Path | None, nested: bool = False):
        self.folder, self.nested = folder, nested
        # Every file is opened only once, because the header of a large file is long.
        self._files: dict[Path, tuple[tuple[int, int, int], safetensors.safe_open]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Checkpoint":
        """The checkpoint named in a diffusers or transformers model; an empty one if the model names none."""
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
        # diffusers keeps the path that a user passed, in whatever form.
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str) or not name:
            return cls(None)
        folder = Path(name).resolve() if Path(name).is_dir() else _hub_snapshot(name)
        return cls(folder, nested=folder is not None and not any(folder.glob("*.safetensors")))

    @cached_property
    def _variants(self) -> dict[str, list[tuple[float, Path]]]:
        """Tensor name -> (rounding error, file) of all variants, most exact first."""
        variants: dict[str, list[tuple[float, Path]]] = {}
        pattern = "*/*.safetensors" if self.nested else "*.safetensors"
        for path in sorted(self.folder.glob(pattern)) if self.folder else ():
            try:
                file = safetensors.safe_open(path, framework="pt")
                self._files[path] = _state(path), file
                for key in file.keys():
                    rounding = _ROUNDING.get(file.get_slice(key).get_dtype())
                    if rounding:
                        variants.setdefault(key, []).append((rounding, path))
            except (OSError, safetensors.SafetensorError):
                continue
        return {key: sorted(files) for key, files in variants.items()}

    def finest(self, layer_name: str, weight: Tensor) -> FinestWeight:
        """The weight of a layer with the most exact numbers, and its place on disk if a file holds exactly this weight.

        A weight on an accelerator is copied from there once, and a file is read once: the result serves to compare, to hash and
        to decompose.

        Args:
            layer_name: name of the layer in the model.
            weight: its (m, n) weight in memory, compared with the files bit for bit.
        """
        in_memory = weight.detach().cpu()
        for key in self._candidate_keys(f"{layer_name}.weight", in_memory):
            for rounding, path in self._variants[key]:
                state, file = self._files[path]
                if tuple(file.get_slice(key).get_shape()) != tuple(weight.shape):
                    continue
                tensor = file.get_tensor(key)
                if torch.equal(tensor.to(weight.dtype), in_memory):
                    stored = StoredWeight(path, key, rounding, weight.dtype, weight.requires_grad, state)
                    return FinestWeight(tensor if rounding < torch.finfo(weight.dtype).eps else in_memory, stored)
        return FinestWeight(in_memory)

    def _candidate_keys(self, key: str, weight: Tensor) -> list[str]:
        if key in self._variants:
            return [key]
        # Checkpoints of a model with a head, or of another transformers release, have one prefix more or less.
        similar = [other for other in self._variants if other.endswith(f".{key}") or key.endswith(f".{other}")]
        # Modules that transformers renames while loading (such as those of a ViT) can only be found by their numbers.
        return similar or [other for other in self._variants if self._begins_like(other, weight)]

    def _begins_like(self, key: str, weight: Tensor) -> bool:
        """Whether a stored tensor has the shape and the first row of a weight."""
        stored = self._files[self._variants[key][0][1]][1].get_slice(key)
        if tuple(stored.get_shape()) != tuple(weight.shape):
            return False
        return torch.equal(stored[:1].to(weight.dtype), weight[:1])


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _hub_snapshot(name: str) -> Path | None:
    if name.count("/") != 1:
        return None
    # Imported here, because only hub ids need it. Nothing is downloaded: a model loaded from the hub is in its cache.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None
