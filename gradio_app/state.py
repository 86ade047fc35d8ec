"""The objects that all tabs of the page share."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from gradio_app.comparing import Scorer
from gradio_app.jobs import JobQueue
from gradio_app.library import Library
from gradio_app.messages import Messages
from gradio_app.private_folder import PrivateFolder
from gradio_app.settings import AppSettings
from gradio_app.store import PipelineStore


@dataclass(frozen=True)
class App:
    """The parts behind the page, one of each for all visitors.

    Args:
        settings: the settings of the page.
        folder: the uploads and downloads.
        library: the bases and runs.
        store: the pipelines in memory.
        scorer: gives the CLIPScore.
        jobs: the trainings.
        messages: turns errors into texts.
    """

    settings: AppSettings
    folder: PrivateFolder
    library: Library
    store: PipelineStore
    scorer: Scorer
    jobs: JobQueue
    messages: Messages

    def place(self, name: str) -> Path:
        """A new private path for a file that a visitor can download; Gradio copies the file into its own cache.

        Args:
            name: name of the file.
        """
        folder = self.folder.downloads / secrets.token_hex(8)
        folder.mkdir(parents=True)
        self.folder.forget_old()
        return folder / name

    @classmethod
    def of(cls, settings: AppSettings) -> "App":
        """The parts for these settings; trainings that were interrupted earlier can be resumed."""
        library = Library(settings.models_dirs, settings.runs_dirs, settings.bases)
        hidden = {settings.work_dir: "uploads"}
        hidden |= {folder: f"models/{folder.name}" for folder in settings.models_dirs}
        hidden |= {folder: f"runs/{folder.name}" for folder in settings.runs_dirs}
        messages = Messages(hidden)
        store = PipelineStore(settings.max_pipelines, settings.device, settings.dtype)
        jobs = JobQueue(messages, most_waiting=settings.limits.queued_jobs, make_room=store.put_away)
        jobs.restore(library.unfinished())
        folder = PrivateFolder(settings.work_dir, settings.limits)
        return cls(settings, folder, library, store, Scorer(settings.clip, settings.device, store.loading), jobs, messages)
