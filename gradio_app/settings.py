"""Settings of the operator at the start of the page: folders, models and limits."""

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Limits:
    """The limits of requests; a request beyond a limit is refused with a message.

    Args:
        fewest_pictures, most_pictures: number of pictures of a training.
        picture_bytes: bytes of one uploaded picture.
        picture_pixels: pixels of one uploaded picture, checked before it is decoded.
        adapter_bytes: bytes of one uploaded adapter.
        request_bytes: bytes of all files of one upload together.
        json_bytes: bytes of one request without files.
        visitor_bytes: bytes of all adapters of one visitor.
        private_bytes: bytes of all uploads and downloads together.
        free_bytes: bytes that stay free on a disk with uploads.
        kept_seconds: age at which uploads and downloads are removed; the adapters of a visitor stay until the visitor leaves.
        columns: number of columns of a comparison.
        prompts, seeds: number of prompts and of seeds of a comparison; their product is the number of its rows.
        drawn: number of pictures of a comparison.
        characters: number of characters of a prompt.
        train_steps: number of steps of a training.
        queued_jobs: number of waiting trainings.
        drawings_per_visitor: number of running and waiting drawings of one visitor.
        drawings: number of running and waiting drawings of all visitors.
    """

    fewest_pictures: int = 3
    most_pictures: int = 20
    picture_bytes: int = 20 * 2**20
    picture_pixels: int = 24_000_000
    adapter_bytes: int = 512 * 2**20
    request_bytes: int = 600 * 2**20
    json_bytes: int = 2**20
    visitor_bytes: int = 2 * 2**30
    private_bytes: int = 8 * 2**30
    free_bytes: int = 2**30
    kept_seconds: float = 2 * 3600.0
    columns: int = 6
    prompts: int = 8
    seeds: int = 8
    drawn: int = 64
    characters: int = 500
    train_steps: int = 5000
    queued_jobs: int = 8
    drawings_per_visitor: int = 3
    drawings: int = 24


@dataclass(frozen=True)
class AppSettings:
    """The settings of the page.

    Args:
        models_dirs: folders whose pipelines are offered as bases.
        runs_dirs: folders whose trained runs are offered; new runs go into the first folder.
        bases: further bases, by path or hub id.
        clip: folder or hub id of the CLIP that scores; None: pictures are not scored.
        work_dir: a private folder for uploads and downloads, removed at the end.
        max_pipelines: largest number of pipelines in memory.
        device: device that draws the pictures.
        dtype: dtype of the pipelines that draw; None: what suits the device (see `drawing_dtypes`).
        limits: the limits of requests.
    """

    models_dirs: tuple[Path, ...]
    runs_dirs: tuple[Path, ...]
    work_dir: Path
    bases: tuple[str, ...] = ()
    clip: str | None = None
    max_pipelines: int = 4
    device: str = "cpu"
    dtype: torch.dtype | None = None
    limits: Limits = field(default_factory=Limits)
