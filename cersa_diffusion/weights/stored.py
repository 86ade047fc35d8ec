"""The checkpoint that a model was loaded from: its weights as they are stored, where memory holds them less exactly.

Rounding a weight to bfloat16 turns its singular vectors; where the kept components end between two close singular values, the
kept subspace itself turns, and an adapter is no longer right. So what is decomposed is the weight on disk. It is trusted only
where it is the weight in memory bit for bit, once it is rounded to the dtype in memory: a model that was changed after loading,
or another model under the same name, is never confused with its checkpoint. Only safetensors are read, never a pickle.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

# Of two variants of a checkpoint the one that lost least is decomposed: that with the smallest relative rounding error.
_ROUNDING = {
    name: torch.finfo(dtype).eps
    for name, dtype in (("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16))
}


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies on disk; nothing is held in memory.

    Attributes:
        path: a safetensors file.
        key: the name of the tensor in it.
        rounding: relative rounding error of the numbers on disk.
        dtype: dtype of the weight in memory.
        requires_grad: as it was in memory.
        state: size, modification time and inode of the file when it was compared with the weight in memory.
    """

    path: Path
    key: str
    rounding: float
    dtype: torch.dtype
    requires_grad: bool
    state: tuple[int, int, int]

    def read(self, *, rounded: bool = True) -> Tensor | None:
        """The weight on the CPU, or None when the file was changed or removed since it was compared.

        Args:
            rounded: in the dtype of the weight in memory, as a copy; otherwise as stored, memory-mapped.
        """
        try:
            if _state(self.path) != self.state:
                return None
            with safetensors.safe_open(self.path, framework="pt") as file:
                tensor = file.get_tensor(self.key)
        except (OSError, safetensors.SafetensorError):
            return None
        return tensor.to(self.dtype, copy=True).requires_grad_(self.requires_grad) if rounded else tensor


class Checkpoint:
    """The safetensors files of a model's checkpoint, read tensor by tensor and only when asked.

    Args:
        folder: where they are (shards and variants included), or None when the model came from none.
        nested: whether they may as well be in its subfolders (a model loaded with `subfolder=` only remembers the folder above).
    """

    def __init__(self, folder: Path | None, nested: bool = False):
        self.folder, self.nested = folder, nested
        # Opened once: the header of a large file is long.
        self._files: dict[Path, tuple[tuple[int, int, int], safetensors.safe_open]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Checkpoint":
        """The checkpoint that a diffusers or transformers model says it was loaded from; an empty one where it says nothing."""
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
        if not isinstance(name, str) or not name:
            return cls(None)
        folder = Path(name).resolve() if Path(name).is_dir() else _hub_snapshot(name)
        if folder is None:
            return cls(None)
        return cls(folder, nested=not any(folder.glob("*.safetensors")))

    @cached_property
    def _places(self) -> dict[str, list[tuple[float, Path]]]:
        """Tensor name -> (rounding error, file), most exact first."""
        places: dict[str, list[tuple[float, Path]]] = {}
        pattern = "*/*.safetensors" if self.nested else "*.safetensors"
        for path in sorted(self.folder.glob(pattern)) if self.folder else ():
            try:
                file = safetensors.safe_open(path, framework="pt")
                self._files[path] = _state(path), file
                for key in file.keys():
                    rounding = _ROUNDING.get(file.get_slice(key).get_dtype())
                    if rounding:
                        places.setdefault(key, []).append((rounding, path))
            except (OSError, safetensors.SafetensorError):
                continue
        return {key: sorted(found) for key, found in places.items()}

    def find(self, layer_name: str, weight: Tensor, *, finer_only: bool = False) -> StoredWeight | None:
        """Where a layer's weight is stored, or None when no file holds this very weight.

        Args:
            layer_name: name of the layer in the model.
            weight: its (m, n) weight in memory, compared bit for bit.
            finer_only: only where the file is more exact than memory.
        """
        places = [(key, *place) for key in self._keys(f"{layer_name}.weight", weight) for place in self._places[key]]
        if finer_only:
            places = [place for place in places if place[1] < torch.finfo(weight.dtype).eps]
        for key, rounding, path in places:
            state, file = self._files[path]
            if tuple(file.get_slice(key).get_shape()) != tuple(weight.shape):
                continue
            if torch.equal(file.get_tensor(key).to(weight.device).to(weight.dtype), weight.detach()):
                return StoredWeight(path, key, rounding, weight.dtype, weight.requires_grad, state)
        return None

    def _keys(self, key: str, weight: Tensor) -> list[str]:
        if key in self._places:
            return [key]
        # Checkpoints of a model with a head, or of another transformers release, carry a prefix more or less.
        named = [other for other in self._places if other.endswith(f".{key}") or key.endswith(f".{other}")]
        # Modules that transformers renames while loading (a ViT's, for one) are known by their numbers alone.
        return named or [other for other in self._places if self._begins_like(other, weight)]

    def _begins_like(self, key: str, weight: Tensor) -> bool:
        """Whether a stored tensor has a weight's shape and first row."""
        stored = self._files[self._places[key][0][1]][1].get_slice(key)
        if tuple(stored.get_shape()) != tuple(weight.shape):
            return False
        return torch.equal(stored[:1].to(weight.device).to(weight.dtype), weight.detach()[:1])


def finest_weight(weight: Tensor, stored: StoredWeight | None) -> Tensor:
    """What to decompose: the weight as the checkpoint stores it where that is more exact than the one in memory.

    Args:
        weight: (m, n) in memory.
        stored: where the checkpoint has it, or None.

    Returns:
        (m, n) tensor on the weight's device.
    """
    if stored is None or stored.rounding >= torch.finfo(weight.dtype).eps:
        return weight
    tensor = stored.read(rounded=False)
    return weight if tensor is None else tensor.to(weight.device)


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _hub_snapshot(name: str) -> Path | None:
    if name.count("/") != 1:
        return None
    # Imported here: only hub ids need it. Nothing is downloaded: what was loaded from the hub is in its cache.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None
