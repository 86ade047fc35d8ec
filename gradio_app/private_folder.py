"""The private folder for uploads and downloads; its size is limited, and old files are removed."""

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cersa_diffusion.errors import ConfigError
from gradio_app.settings import Limits

# Gradio makes a copy at once and sends this copy, so the file of a download can be removed soon.
COPIED_SECONDS = 600


class PrivateFolder:
    """The files that visitors have uploaded, and the files that they can download.

    Args:
        folder: a folder of this process only.
        limits: its `private_bytes`, `free_bytes` and `kept_seconds` are used.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder.absolute(), limits
        self.uploads, self.adapters, self.downloads = (self.folder / name for name in ("gradio", "adapters", "downloads"))
        self._announced = 0
        self._lock = threading.Lock()

    def holds_upload(self, path: str) -> bool:
        """Whether a path is an uploaded file that still exists."""
        return self.gives_out(path) and Path(path).is_file()

    def gives_out(self, path: str) -> bool:
        """Whether a path is in the folder in which Gradio keeps uploads and copies of downloads."""
        try:
            return Path(path).resolve().is_relative_to(self.uploads.resolve())
        except (OSError, ValueError):
            return False

    def remove(self, paths: Iterable[str]) -> None:
        """Removes used uploads; paths outside the folder of uploads are ignored."""
        for path in paths:
            if self.holds_upload(path):
                Path(path).unlink(missing_ok=True)

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """A context in which an upload is received.

        Args:
            size: the announced size in bytes.

        Raises:
            ConfigError: there is no room for the upload.
        """
        with self._lock:
            self.forget_old()
            check_free(self.folder, self._announced + size, self.limits)
            used = self.used()
            if used + self._announced + size > self.limits.private_bytes:
                raise ConfigError(
                    f"the uploads of all visitors take {used / 2**20:.0f} of {self.limits.private_bytes / 2**20:.0f} MiB: "
                    f"try again later; unused uploads are removed after {self.limits.kept_seconds / 3600:g} hours"
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
        """Removes old uploads and downloads; the adapters of a visitor stay until the visitor leaves."""
        now = time.time()
        for path, _, changed in self._files():
            if path.is_relative_to(self.adapters):
                continue
            kept_seconds = COPIED_SECONDS if path.is_relative_to(self.downloads) else self.limits.kept_seconds
            if changed < now - kept_seconds:
                path.unlink(missing_ok=True)
                if path.parent != self.uploads:
                    with suppress(OSError):  # the folder may contain another file
                        path.parent.rmdir()

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """(path, size in bytes, time of the last change of the name or the content in seconds)."""
        for parent, _, names in os.walk(self.folder):
            for name in names:
                path = Path(parent, name)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # another thread has removed it
                yield path, status.st_size, status.st_ctime


def check_free(folder: Path, size: int, limits: Limits) -> None:
    """Refuses a file that would leave too little free space on a disk.

    Args:
        folder: folder for the file; it does not need to exist.
        size: size in bytes.
        limits: its `free_bytes` is used.

    Raises:
        ConfigError: there is too little space; the message gives the free and the required space.
    """
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free - size < limits.free_bytes:
        raise ConfigError(
            f"the disk of the server has {free / 2**20:.0f} MiB free, expected {(size + limits.free_bytes) / 2**20:.0f} MiB: "
            "the operator of the server has to free space"
        )
