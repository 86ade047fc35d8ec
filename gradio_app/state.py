"""What all tabs of the page share."""

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
        settings: how the page was started.
        folder: uploads and downloads.
        library: bases and runs.
        store: pipelines in memory.
        scorer: CLIPScore.
        jobs: trainings.
        messages: errors as texts.
    """

    settings: AppSettings
    folder: PrivateFolder
    library: Library
    store: PipelineStore
    scorer: Scorer
    jobs: JobQueue
    messages: Messages

    def place(self, name: str) -> Path:
        """A new private place for a file that a visitor is to get; Gradio copies it into its own cache.

        Args:
            name: of the file.
        """
        folder = self.folder.downloads / secrets.token_hex(8)
        folder.mkdir(parents=True)
        self.folder.forget_old()
        return folder / name

    @classmethod
    def of(cls, settings: AppSettings) -> "App":
        """Everything that the settings come to; what was interrupted before can be resumed."""
        library = Library(settings.models_dirs, settings.runs_dirs, settings.bases)
        hidden = {settings.work_dir: "uploads"}
        hidden |= {folder: f"models/{folder.name}" for folder in settings.models_dirs}
        hidden |= {folder: f"runs/{folder.name}" for folder in settings.runs_dirs}
        messages = Messages(hidden)
        jobs = JobQueue(messages, most_waiting=settings.limits.queued_jobs)
        jobs.restore(library.unfinished())
        store = PipelineStore(settings.max_pipelines, settings.device)
        folder = PrivateFolder(settings.work_dir, settings.limits)
        return cls(settings, folder, library, store, Scorer(settings.clip, settings.device, store.loading), jobs, messages)
