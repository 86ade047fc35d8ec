"""Atomic writing: files are written under a temporary name, flushed to the disk, and only then renamed."""

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
def atomic_write(path: str | os.PathLike, *, flushed: bool = True) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`; when the block ends, the file is on the disk under the name `path`.

    The file gets the permissions of the umask, however the block writes it. If the block or the disk fails, the temporary file
    is removed and an old file of this name stays as it was.

    Args:
        path: the file to write; its folder exists.
        flushed: flush the file and its folder to the disk; without it a power cut may leave a damaged file.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers would make the file private
        yield temporary
        temporary.chmod(mode)
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
        if flushed:
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder in `folder`; when the block ends, its content is flushed and moved into `folder`.

    Existing files and folders of the same names are replaced one by one, each as a whole. If the block fails, nothing is moved.
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
    """Renames a file or folder to `target` and replaces a file or folder of that name.

    An old folder is renamed first, so that `target` never names a folder that is partly deleted.
    """
    if target.is_dir():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)


def flush_tree(folder: Path) -> None:
    """Flushes a folder and everything in it to the disk, so that it survives a power cut."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and writes renames to the disk at once.
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, which depend only on its content: safetensors itself orders metadata at random."""
    content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata=dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format requires that the tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def is_local(name: str) -> bool:
    """Whether a name is a path and not an id on the hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


# The end of error messages about a name that is neither a path nor a hub id.
NEITHER = "no such folder, and not the form of a hub id (owner/name)"


def is_hub_id(name: str, *, owner: bool = True) -> bool:
    """Whether a name has the form "owner/name" of an id on the hub; `owner=False` also accepts ids without owner (old models)."""
    slashes = name.count("/")
    return (slashes == 1 or (slashes == 0 and not owner)) and not name.startswith((".", "/", "~"))


def public_name(name: str) -> str:
    """The last part of a path; an id on the hub stays as it is."""
    return Path(name).absolute().name if is_local(name) else name


def public_sources(settings: dict) -> dict[str, str]:
    """The settings that name a model's source ("name_or_path", "model_name_or_path", ...), shortened by `public_name`."""
    sources = {key: value for key, value in settings.items() if key.endswith("name_or_path") and isinstance(value, str)}
    return {key: public_name(value) for key, value in sources.items() if value}
