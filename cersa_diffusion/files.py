"""Files that are whole or not there: written under a temporary name, flushed to the disk, and only then renamed."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`; when the block ends, its content is on the disk under `path`.

    The file has the permissions that the umask gives, whatever the block writes it with. Where the block or the disk fails, the
    temporary file is removed and an old file of this name stays as it was.

    Args:
        path: the file to write; its folder exists.

    Yields:
        The temporary file, empty; the block writes it by any means.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder in `folder`; when the block ends, what it wrote there is on the disk and moved into `folder`.

    Files and folders of the same names are replaced one by one, each as a whole. Where the block fails, nothing is moved.

    Args:
        folder: an existing folder.

    Yields:
        The temporary folder, empty.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        flush_tree(temporary)
        for written in sorted(temporary.iterdir()):
            replace_path(written, folder / written.name)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_path(source: Path, target: Path) -> None:
    """Renames a file or folder to `target`, in the place of a file or folder that may be there.

    A folder that is in the way is renamed first: at no moment is a part of the old one under the name of the new one.
    """
    if target.is_dir():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)


def flush_tree(folder: Path) -> None:
    """Flushes a folder and everything in it to the disk: after a power cut it is whole."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and writes renames through.
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone.

    safetensors itself writes several entries of metadata in a random order.

    Args:
        tensors: name -> tensor, on any device.
        metadata: for the header.
    """
    content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata=dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format wants the tensors to begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def is_local(name: str) -> bool:
    """Whether this is a path, and no id on the hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


# What an error says of a name that is neither.
NEITHER = "no such folder, and not the form of a hub id (owner/name)"


def is_hub_id(name: str, *, owner: bool = True) -> bool:
    """Whether a name has the form of an id on the hub.

    Args:
        name: "owner/name".
        owner: without it a name alone will do as well, as for the first models on the hub.
    """
    slashes = name.count("/")
    return (slashes == 1 or (slashes == 0 and not owner)) and not name.startswith((".", "/", "~"))


def public_name(name: str) -> str:
    """An id on the hub as it is, of a path its last part."""
    return Path(name).absolute().name if is_local(name) else name


def public_sources(settings: dict) -> dict[str, str]:
    """The settings that say what a model was loaded from ("name_or_path", "model_name_or_path", ...), with `public_name`."""
    named = {key: value for key, value in settings.items() if key.endswith("name_or_path") and isinstance(value, str)}
    return {key: public_name(value) for key, value in named.items() if value}
