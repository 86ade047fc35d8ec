"""The folders that models and this package's caches fill, and how full they are."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A cache folder.

    Attributes:
        content: what lies there.
        path: where; None when this cache is off.
        size_bytes: of all files there.
    """

    content: str
    path: Path | None
    size_bytes: int


def cache_folders() -> list[Folder]:
    """The caches of this package and of the hub, as the environment names them."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    setting = os.environ.get("CERSA_CACHE", "")
    own = None if setting.lower() == "off" else Path(setting) if setting else home / "cersa_diffusion"
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub"
    parts = {"decompositions": "", "latents": "latents", "text embeddings": "text_embeddings"}
    # The parts are folders in that of the decompositions.
    folders = [
        Folder(content, own and own / part, _size(own / part, exclude=() if part else tuple(parts.values())) if own else 0)
        for content, part in parts.items()
    ]
    return [*folders, Folder("models of the hub", Path(hub), _size(Path(hub)))]


def _size(folder: Path, exclude: tuple[str, ...] = ()) -> int:
    total = 0
    for place, names, files in os.walk(folder):
        if Path(place) == folder:
            names[:] = [name for name in names if name not in exclude]
        for file in files:
            path = os.path.join(place, file)
            if not os.path.islink(path) and os.path.exists(path):
                total += os.path.getsize(path)
    return total
