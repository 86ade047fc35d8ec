"""What takes long is done once: an on-disk cache of singular value decompositions, and of what training computes beforehand.

Entries are safetensors, named by a hash of all that they depend on (a weight's bytes and the algorithm), with a checksum over
the whole file that every reading compares, and then memory-mapped. Writing is atomic, and one lock for every 256th part of the
entries keeps two processes from computing the same one. `CERSA_CACHE` names the folder or is "off", `CERSA_CACHE_LIMIT` bounds
it in GiB, and so each of its parts.
"""

import contextlib
import hashlib
import mmap
import os
import threading
import time
import uuid
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
from cersa_diffusion.functional import Pivots, choose_pivots, decompose
from cersa_diffusion.weights.checksum import NO_CHECKSUM, is_intact, write_checksum

# Raised whenever the same weight may get another entry.
ALGORITHM = "gram-or-svd-2"
DEFAULT_LIMIT_GIB = 20.0
# Sub-folders of the cache: decompositions are in the folder itself, the others are training's.
LATENTS, TEXT_EMBEDDINGS = "latents", "text_embeddings"
CACHE_PARTS = ("", LATENTS, TEXT_EMBEDDINGS)
# How long to wait for another process that computes an entry, before computing it here as well.
CLAIM_SECONDS = 600
# A temporary file this old is no writer's that still lives.
ABANDONED_SECONDS = 3600
_CHECKSUM_MARKER = b'"sha256":"'
# On an accelerator layers are decomposed one at a time: more at once take memory and no less time.
_ACCELERATOR = threading.Lock()


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds; the size counts what writers that were killed have left."""

    folder: Path
    entries: int
    size_bytes: int
    limit_bytes: int


class TensorCache:
    """Named tensors on disk, some for each key.

    Args:
        folder: where the entries are; made when the first one is written.
        limit_bytes: `trim` removes the entries that were unused for longest beyond this size.
    """

    def __init__(self, folder: str | os.PathLike, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._writable, self._warning = True, threading.Lock()

    @classmethod
    def default(cls, part: str = "") -> "TensorCache | None":
        """The cache that the environment names, by default under the user's cache folder; None when it is off.

        Args:
            part: sub-folder of entries of another kind than decompositions.

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
        """The entry of a key, memory-mapped, or None when there is none; a damaged one is removed with a warning."""
        path = self._path(key)
        try:
            intact = _is_intact(path)
        except OSError:
            return None
        if not intact:
            warnings.warn(f"the cache entry {path} is damaged: it is removed and computed anew", stacklevel=2)
            with contextlib.suppress(OSError):  # someone else's cache
                path.unlink()
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, safetensors.SafetensorError):  # another process has just removed it
            return None
        with contextlib.suppress(OSError):  # someone else's cache: readable all the same
            os.utime(path)
        return tensors

    def write_tensors(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry under a temporary name and renames it: readers see the old entry, the new one, or none.

        A folder that cannot be written (or a full disk) costs a warning, once, and the cache is only read from then on.
        """
        if not self._writable:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, tensors)
        except (OSError, safetensors.SafetensorError) as error:
            with self._warning:
                if self._writable:
                    warnings.warn(
                        f"the cache {self.folder} cannot be written ({error}): set CERSA_CACHE to another folder, or every run "
                        "computes its entries anew",
                        stacklevel=2,
                    )
                self._writable = False

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask has it; safetensors alone would make the file private
            content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(content, temporary, metadata={"sha256": NO_CHECKSUM})
            with open(temporary, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
                write_checksum(mapped, _CHECKSUM_MARKER)
            temporary.chmod(mode)
            # Not flushed to the disk first: an entry that a power cut leaves half-written does not fit its checksum.
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Waits until no other process computes this entry; a process that dies gives its claim up.

        Where there are no locks (a read-only folder), or after `CLAIM_SECONDS`, the entry is computed by both.
        """
        path = self._path(key)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, Timeout):
                path.parent.mkdir(parents=True, exist_ok=True)
                # One lock for all entries of a subfolder: their number stays bounded, and waiting in vain does no harm.
                stack.enter_context(FileLock(path.parent / ".lock", timeout=CLAIM_SECONDS))
            yield

    def trim(self) -> None:
        """Removes what killed writers have left, and the entries that were unused for longest until the rest fits the limit."""
        for path, status in self._temporary_files():
            if time.time() - status.st_mtime > ABANDONED_SECONDS:
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)
        entries = sorted(self._entries(), key=lambda entry: entry[1].st_mtime)
        excess = sum(status.st_size for _, status in entries) - self.limit_bytes
        for path, status in entries:
            if excess <= 0:
                return
            with contextlib.suppress(PermissionError):  # someone else's cache
                path.unlink(missing_ok=True)
            excess -= status.st_size

    def clear(self) -> None:
        """Removes all entries, and what writers that were killed have left."""
        for path, _ in self._entries() + self._temporary_files():
            path.unlink(missing_ok=True)

    def info(self) -> CacheInfo:
        """Where the cache is and what it holds."""
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
            try:
                files.append((path, path.stat()))
            except FileNotFoundError:  # another process trims as well
                continue
        return files


def _is_intact(path: Path) -> bool:
    """Whether a file fits its checksum, read through a memory map: no copy of it is made."""
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
        rows: (k,) and
        columns: (k,): as `cersa_diffusion.functional.choose_pivots` gives them.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def pivots(self) -> Pivots:
        """Rows and columns together."""
        return Pivots(self.rows, self.columns)


class DecompositionCache(TensorCache):
    """Decompositions on disk."""

    def read(self, key: str) -> LeadingFactors | None:
        """The entry of a key, or None when there is none that can be read."""
        tensors = self.read_tensors(key)
        if tensors is None or tensors.keys() != set(LeadingFactors._fields):
            return None
        return LeadingFactors(**tensors)

    def write(self, key: str, factors: LeadingFactors) -> None:
        """Writes an entry, as `write_tensors` does."""
        self.write_tensors(key, factors._asdict())


def weight_key(weight: Tensor) -> str:
    """A hash of a weight's bytes, dtype and shape and of the algorithm that decomposes it."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{ALGORITHM} {data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def leading_factors(weight: Tensor, choose_rank: Callable[[Tensor], int], cache: DecompositionCache | None) -> LeadingFactors:
    """The leading singular triplets of a weight, from the cache where it has enough of them.

    The bases are rounded to float32 with and without a cache, so that both give the same layers.

    Args:
        weight: (m, n) matrix of any floating dtype.
        choose_rank: from the whole spectrum (float64, descending) to the number of triplets wanted.
        cache: where to look and to keep the result, or None.

    Returns:
        At least as many triplets as are wanted.
    """
    if cache is None:
        return _rounded(weight, choose_rank)
    key = weight_key(weight)
    found = _enough(cache.read(key), weight, choose_rank)
    if found is not None:
        return found
    with cache.claim(key):
        found = _enough(cache.read(key), weight, choose_rank)  # another process may have been at it
        if found is None:
            found = _rounded(weight, choose_rank)
            cache.write(key, found)
    return found


def _enough(found: LeadingFactors | None, weight: Tensor, choose_rank: Callable[[Tensor], int]) -> LeadingFactors | None:
    if found is None or len(found.s) != min(weight.shape) or (len(found.U), found.Vh.shape[-1]) != weight.shape:
        return None
    return found if found.U.shape[1] >= choose_rank(found.s) else None


def _rounded(weight: Tensor, choose_rank: Callable[[Tensor], int]) -> LeadingFactors:
    with contextlib.nullcontext() if weight.device.type == "cpu" else _ACCELERATOR:
        factors = decompose(weight)
        rank = choose_rank(factors.s)
        U, Vh = factors.U[:, :rank].float(), factors.Vh[:rank].float()
        return LeadingFactors(U, factors.s, Vh, *choose_pivots(U, Vh))
