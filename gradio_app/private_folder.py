"""The private folder for uploads and downloads: bounded, and emptied of what nobody asks for any more."""

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cersa_diffusion.errors import ConfigError
from gradio_app.settings import Limits

# Gradio gives out a copy that it makes at once; the download itself may go soon.
COPIED_SECONDS = 600


class PrivateFolder:
    """What visitors have sent, and what was made for them to download.

    Args:
        folder: of this process alone.
        limits: `private_bytes`, `free_bytes` and `kept_seconds`.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder.absolute(), limits
        self.uploads, self.adapters, self.downloads = (self.folder / name for name in ("gradio", "adapters", "downloads"))
        self._announced = 0
        self._lock = threading.Lock()

    def holds_upload(self, path: str) -> bool:
        """Whether a path is that of an uploaded file that is still here."""
        return self.gives_out(path) and Path(path).is_file()

    def gives_out(self, path: str) -> bool:
        """Whether a path lies in the folder that Gradio keeps uploads in, and copies of downloads."""
        try:
            return Path(path).resolve().is_relative_to(self.uploads.resolve())
        except (OSError, ValueError):
            return False

    def remove(self, paths: Iterable[str]) -> None:
        """Removes uploads that were used; nothing outside the folder of uploads."""
        for path in paths:
            if self.holds_upload(path):
                Path(path).unlink(missing_ok=True)

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """A context in which an upload is received.

        Args:
            size: bytes that it says to have.

        Raises:
            ConfigError: there is no room.
        """
        with self._lock:
            self.forget_old()
            check_free(self.folder, self._announced + size, self.limits)
            used = self.used()
            if used + self._announced + size > self.limits.private_bytes:
                raise ConfigError(
                    f"the uploads of all visitors take {used / 2**20:.0f} of {self.limits.private_bytes / 2**20:.0f} MiB: "
                    f"try again later, unused ones are removed after {self.limits.kept_seconds / 3600:g} hours"
                )
            self._announced += size
        try:
            yield
        finally:
            with self._lock:
                self._announced -= size

    def used(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def forget_old(self) -> None:
        """Removes uploads and downloads that are old; adapters stay as long as their visitors."""
        now = time.time()
        for path, _, changed in self._files():
            if path.is_relative_to(self.adapters):
                continue
            kept = COPIED_SECONDS if path.is_relative_to(self.downloads) else self.limits.kept_seconds
            if changed < now - kept:
                path.unlink(missing_ok=True)
                if path.parent != self.uploads:
                    with suppress(OSError):  # another file is in it
                        path.parent.rmdir()

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """(path, bytes, seconds of the last change of its name or content)."""
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = Path(parent, name)
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue  # another thread was faster
                yield path, found.st_size, found.st_ctime


def check_free(folder: Path, size: int, limits: Limits) -> None:
    """Refuses a file that would leave too little room on a disk.

    Args:
        folder: where it will lie; it need not exist.
        size: bytes.
        limits: `free_bytes`.

    Raises:
        ConfigError: naming what is free and what is needed.
    """
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free - size < limits.free_bytes:
        raise ConfigError(
            f"the server's disk has {free / 2**20:.0f} MiB free, expected {(size + limits.free_bytes) / 2**20:.0f} for this: "
            "its operator has to make room"
        )
