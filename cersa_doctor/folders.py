"""The cache folders of models and of this package, and their sizes."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A cache folder.

    Attributes:
        content: description of the content.
        path: the folder; None if this cache is off.
        size_bytes: size of all files.
    """

    content: str
    path: Path | None
    size_bytes: int


def cache_folders() -> list[Folder]:
    """The caches of this package and of the hub; environment variables decide their folders."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    setting = os.environ.get("CERSA_CACHE", "")
    cache = None if setting.lower() == "off" else Path(setting) if setting else home / "cersa_diffusion"
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub"
    # The other caches are folders in that of the decompositions.
    subfolders = {"decompositions": "", "latents": "latents", "text embeddings": "text_embeddings"}
    folders = []
    for content, name in subfolders.items():
        size = _size(cache / name, exclude=() if name else tuple(subfolders.values())) if cache else 0
        folders.append(Folder(content, cache and cache / name, size))
    return [*folders, Folder("models of the hub", Path(hub), _size(Path(hub)))]


def _size(folder: Path, exclude: tuple[str, ...] = ()) -> int:
    total = 0
    for directory, names, files in os.walk(folder):
        if Path(directory) == folder:
            names[:] = [name for name in names if name not in exclude]
        for file in files:
            path = os.path.join(directory, file)
            if not os.path.islink(path) and os.path.exists(path):
                total += os.path.getsize(path)
    return total
