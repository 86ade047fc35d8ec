"""The on-disk cache of singular value decompositions, and of latents and text embeddings that training computes beforehand.

Entries are safetensors files, named by a hash of everything they depend on (for a decomposition the bytes of the weight and the
algorithm). Every read checks a checksum over the whole file and then maps the file into memory. Writing is atomic. The entries
are divided among 256 locks, so that two processes do not compute the same entry. `CERSA_CACHE` names the folder or is "off";
`CERSA_CACHE_LIMIT` limits its size in GiB, and separately the size of each of its parts.
"""

import contextlib
import hashlib
import mmap
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.functional import Pivots, choose_pivots, decompose
from cersa_diffusion.weights.checksum import NO_CHECKSUM, is_intact, write_checksum

# Changed whenever the same weight may get another entry.
ALGORITHM = "gram-or-svd-2"
DEFAULT_LIMIT_GIB = 20.0
# Sub-folders of the cache: decompositions are in the folder itself, training uses the others.
LATENTS, TEXT_EMBEDDINGS = "latents", "text_embeddings"
CACHE_PARTS = ("", LATENTS, TEXT_EMBEDDINGS)
# How long to wait for another process that computes an entry before computing it in this process too.
CLAIM_SECONDS = 600
# A process that wrote a temporary file this old is no longer running.
ABANDONED_SECONDS = 3600
_CHECKSUM_MARKER = b'"sha256":"'
# On an accelerator layers are decomposed one at a time: decomposing several at once needs more memory and saves no time.
_ACCELERATOR = threading.Lock()


@dataclass(frozen=True)
class CacheInfo:
    """The content of a cache; the size includes temporary files that killed processes left behind."""

    folder: Path
    entries: int
    size_bytes: int
    limit_bytes: int


class TensorCache:
    """Named tensors on disk, one set for each key.

    Args:
        folder: the folder of the entries; created when the first one is written.
        limit_bytes: above this size, `trim` removes the least recently used entries.
    """

    def __init__(self, folder: str | os.PathLike, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._writable, self._warning = True, threading.Lock()

    @classmethod
    def default(cls, part: str = "") -> "TensorCache | None":
        """The cache (or the sub-folder `part` of it) that the environment names; None if it is off.

        By default it is in the user's cache folder.

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
        return cls((Path(setting) if setting else home / "cersa_diffusion") / part, limit_bytes)

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """The memory-mapped entry of a key, or None if there is none; a damaged entry is removed with a warning."""
        path = self._path(key)
        try:
            intact = _is_intact(path)
        except OSError:
            return None
        if not intact:
            warnings.warn(f"the cache entry {path} is damaged: it is removed and computed again", stacklevel=2)
            with contextlib.suppress(OSError):  # the cache of another user
                path.unlink()
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, safetensors.SafetensorError):  # another process has just removed it
            return None
        with contextlib.suppress(OSError):  # the cache of another user, which can still be read
            os.utime(path)
        return tensors

    def write_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry atomically: other processes read the old entry, the new one, or none.

        If the folder cannot be written (or the disk is full), this warns once, and the cache is only read from then on.
        """
        if not self._writable:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to the disk: an entry that is incomplete after a power cut does not match its checksum.
            with atomic_write(path, flushed=False) as temporary:
                content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
                save_file(content, temporary, metadata={"sha256": NO_CHECKSUM})
                with open(temporary, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                    write_checksum(mapped, _CHECKSUM_MARKER)
        except (OSError, safetensors.SafetensorError) as error:
            with self._warning:
                if self._writable:
                    warnings.warn(
                        f"the cache {self.folder} cannot be written ({error}), so every run computes its entries again: set "
                        "CERSA_CACHE to another folder",
                        stacklevel=2,
                    )
                self._writable = False

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Waits until no other process computes this entry; the claim of a process ends with the process.

        If locks are impossible (in a read-only folder), or after `CLAIM_SECONDS`, both processes compute the entry.
        """
        path = self._path(key)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, Timeout):
                path.parent.mkdir(parents=True, exist_ok=True)
                # One lock for all entries of a subfolder limits the number of lock files; an unnecessary wait does no harm.
                stack.enter_context(FileLock(path.parent / ".lock", timeout=CLAIM_SECONDS))
            yield

    def trim(self) -> None:
        """Removes old temporary files, and the least recently used entries until the others fit the limit."""
        for path, status in self._temporary_files():
            if time.time() - status.st_mtime > ABANDONED_SECONDS:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)
        entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime)
        excess = sum(status.st_size for _, status in entries) - self.limit_bytes
        for path, status in entries:
            if excess <= 0:
                return
            with contextlib.suppress(PermissionError):  # the cache of another user
                path.unlink(missing_ok=True)
            excess -= status.st_size

    def clear(self) -> None:
        """Removes all entries and all temporary files."""
        for path, _ in self._entries() + self._temporary_files():
            path.unlink(missing_ok=True)

    def info(self) -> CacheInfo:
        """The folder of the cache and its content."""
        entries = self._entries()
        size = sum(status.st_size for _, status in entries + self._temporary_files())
        return CacheInfo(self.folder, len(entries), size, self.limit_bytes)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        return self._files("??/*.safetensors")

    def _temporary_files(self) -> list[tuple[Path, os.stat_result]]:
        return self._files("??/.*.tmp")

    def _files(self, pattern: str) -> list[tuple[Path, os.stat_result]]:
        files = []
        for path in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process may be trimming too
                files.append((path, path.stat()))
        return files


def _is_intact(path: Path) -> bool:
    """Whether a file matches its checksum; a memory map avoids a copy of the file."""
    with open(path, "rb") as file:
        header_end = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < header_end <= os.fstat(file.fileno()).st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return is_intact(mapped, _CHECKSUM_MARKER, header_end)


class LeadingFactors(NamedTuple):
    """The leading singular triplets of a weight, its whole spectrum, and the pivots of the triplets.

    Attributes:
        U: (m, k) float32.
        s: (p,) float64, all singular values, descending.
        Vh: (k, n) float32.
        rows: (k,) pivot rows from `cersa_diffusion.functional.choose_pivots`.
        columns: (k,) pivot columns from it.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def pivots(self) -> Pivots:
        """The pivot rows and columns in one tuple."""
        return Pivots(self.rows, self.columns)


class DecompositionCache(TensorCache):
    """Decompositions on disk."""

    def read(self, key: str) -> LeadingFactors | None:
        """The entry of a key, or None if there is no readable one."""
        tensors = self.read_tensors(key)
        if tensors is None or tensors.keys() != set(LeadingFactors._fields):
            return None
        return LeadingFactors(**tensors)

    def write(self, key: str, factors: LeadingFactors) -> None:
        """Writes an entry, as `write_tensors` does."""
        self.write_tensors(key, factors._asdict())


def weight_key(weight: Tensor) -> str:
    """A hash of the bytes, dtype and shape of a weight and of the algorithm that decomposes it."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{ALGORITHM} {data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def leading_factors(
    weight: Tensor,
    choose_rank: Callable[[Tensor], int],
    cache: DecompositionCache | None,
    device: torch.device | None = None,
) -> LeadingFactors:
    """The leading singular triplets of a weight, from the cache if it has enough of them.

    The bases are rounded to float32 with and without a cache, so that both give the same layers.

    Args:
        weight: (m, n) matrix of any floating dtype.
        choose_rank: gives the required number of triplets for the whole spectrum (float64, descending).
        cache: the cache that is read and written, or None.
        device: where to decompose; None: where the weight is.

    Returns:
        At least the required number of triplets, in CPU memory if they come from the cache, else on the device.
    """
    device = device or weight.device
    if cache is None:
        return _compute_factors(weight, choose_rank, device)
    key = weight_key(weight)
    factors = cache.read(key)
    if _suffices(factors, weight, choose_rank):
        return factors
    with cache.claim(key):
        factors = cache.read(key)  # another process may have written the entry in the meantime
        if not _suffices(factors, weight, choose_rank):
            factors = _compute_factors(weight, choose_rank, device)
            cache.write(key, factors)
    return factors


def _suffices(factors: LeadingFactors | None, weight: Tensor, choose_rank: Callable[[Tensor], int]) -> bool:
    if factors is None or len(factors.s) != min(weight.shape) or (len(factors.U), factors.Vh.shape[-1]) != weight.shape:
        return False
    return factors.U.shape[1] >= choose_rank(factors.s)


def _compute_factors(weight: Tensor, choose_rank: Callable[[Tensor], int], device: torch.device) -> LeadingFactors:
    with contextlib.nullcontext() if device.type == "cpu" else _ACCELERATOR:
        factors = decompose(weight.to(device))
        rank = choose_rank(factors.s)
        U, Vh = factors.U[:, :rank].float(), factors.Vh[:rank].float()
        return LeadingFactors(U, factors.s, Vh, *choose_pivots(U, Vh))
