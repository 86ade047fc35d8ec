"""Decomposing is done once: an on-disk cache of singular value decompositions.

Entries are safetensors, named by a hash of the weight's bytes and of the algorithm, read memory-mapped. Writing is atomic, so
that several processes may fill one cache. `CERSA_CACHE` names the folder or is "off", `CERSA_CACHE_LIMIT` bounds it in GiB.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import Decomposition, decompose

# Raised whenever `decompose` may give other numbers for the same weight.
ALGORITHM = "gram-or-svd-1"
DEFAULT_LIMIT_GIB = 20.0


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds."""

    folder: Path
    entries: int
    size_bytes: int
    limit_bytes: int


class DecompositionCache:
    """Decompositions on disk: the whole spectrum and the leading singular vectors in float32.

    Args:
        folder: where the entries are; made when the first one is written.
        limit_bytes: `trim` removes the entries that were unused for longest beyond this size.
    """

    def __init__(self, folder: str | os.PathLike, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes

    @classmethod
    def default(cls) -> "DecompositionCache | None":
        """The cache that the environment names, by default under the user's cache folder; None when it is off.

        Raises:
            ConfigError: `CERSA_CACHE_LIMIT` is not a positive number.
        """
        setting = os.environ.get("CERSA_CACHE", "")
        if setting.lower() == "off":
            return None
        limit = os.environ.get("CERSA_CACHE_LIMIT", str(DEFAULT_LIMIT_GIB))
        try:
            limit_bytes = int(float(limit) * 2**30)
        except (ValueError, OverflowError):
            limit_bytes = 0
        if limit_bytes <= 0:
            raise ConfigError(f"CERSA_CACHE_LIMIT is {limit!r}, expected a size in GiB such as 20")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(setting) if setting else home / "cersa_diffusion", limit_bytes)

    def read(self, key: str) -> Decomposition | None:
        """The entry of a key, memory-mapped, or None when there is none that can be read."""
        path = self._path(key)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                factors = Decomposition(*(file.get_tensor(name) for name in ("U", "s", "Vh")))
            os.utime(path)
        except (OSError, safetensors.SafetensorError):
            return None
        return factors

    def write(self, key: str, factors: Decomposition) -> None:
        """Writes an entry under a temporary name and renames it: readers see the old entry, the new one, or none."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            save_file({name: tensor.contiguous().cpu() for name, tensor in factors._asdict().items()}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def trim(self) -> None:
        """Removes the entries that were unused for longest until the rest fits the limit."""
        entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime)
        excess = sum(status.st_size for _, status in entries) - self.limit_bytes
        for path, status in entries:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= status.st_size

    def clear(self) -> None:
        """Removes all entries."""
        for path, _ in self._entries():
            path.unlink(missing_ok=True)

    def info(self) -> CacheInfo:
        """Where the cache is and what it holds."""
        sizes = [status.st_size for _, status in self._entries()]
        return CacheInfo(self.folder, len(sizes), sum(sizes), self.limit_bytes)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob("??/*.safetensors"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:  # another process trims as well
                continue
        return found


def weight_key(weight: Tensor) -> str:
    """A hash of a weight's bytes, dtype and shape and of the algorithm that decomposes it."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{ALGORITHM} {data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def leading_factors(weight: Tensor, choose_rank: Callable[[Tensor], int], cache: DecompositionCache | None) -> Decomposition:
    """The leading singular triplets of a weight, from the cache where it has enough of them.

    The bases are rounded to float32 with and without a cache, so that both give the same layers.

    Args:
        weight: (m, n) matrix of any floating dtype.
        choose_rank: from the whole spectrum (float64, descending) to the number of triplets wanted.
        cache: where to look and to keep the result, or None.

    Returns:
        U (m, k) and Vh (k, n) in float32, and the *whole* spectrum s (p,) in float64.
    """
    key = weight_key(weight) if cache else ""
    found = cache.read(key) if cache else None
    if found is not None and found.U.shape[1] >= choose_rank(found.s):
        return found
    factors = decompose(weight)
    rank = choose_rank(factors.s)
    factors = Decomposition(factors.U[:, :rank].float(), factors.s, factors.Vh[:rank].float())
    if cache:
        cache.write(key, factors)
    return factors
