"""What the operator decides when the page is started: folders, address, limits."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for; everything beyond is refused with a message.

    Args:
        fewest_pictures, most_pictures: of an upload to train on.
        picture_bytes: of one uploaded picture.
        picture_pixels: of one uploaded picture, before anything of it is decoded.
        adapter_bytes: of one uploaded adapter.
        request_bytes: of one upload, all its files together.
        json_bytes: of one request without files.
        visitor_bytes: of the adapters of one visitor.
        private_bytes: of all uploads and downloads together.
        free_bytes: stay free on a disk that uploads are written to.
        kept_seconds: uploads and downloads are removed when they are older; adapters stay as long as their visitors.
        columns: of a comparison.
        prompts, seeds: of a comparison; their product is its rows.
        drawn: pictures of one comparison.
        characters: of a prompt.
        train_steps: of one training.
        queued_jobs: trainings that wait.
        drawings_per_visitor: drawings of one visitor, the one that runs and those that wait.
        drawings: of all visitors, likewise.
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
    """How the page was started.

    Args:
        models_dirs: folders whose pipelines are offered as bases.
        runs_dirs: folders whose trained runs are offered; new ones go into the first.
        bases: further bases, by path or hub id.
        clip: folder or hub id of the CLIP that scores; None: pictures are not scored.
        work_dir: a private folder for uploads and downloads, emptied at the end.
        max_pipelines: pipelines that are held in memory at most.
        device: where pictures are drawn.
        limits: see there.
    """

    models_dirs: tuple[Path, ...]
    runs_dirs: tuple[Path, ...]
    work_dir: Path
    bases: tuple[str, ...] = ()
    clip: str | None = None
    max_pipelines: int = 4
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
