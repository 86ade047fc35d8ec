"""The queue of trainings, which runs one at a time: places, progress, cancelling and resuming."""

import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Literal

from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.checkpoints.folder import list_checkpoints
from cersa_diffusion.training.run.lock import training_process
from cersa_diffusion.training.run.result import RESULT_FILE
from gradio_app.messages import Messages
from gradio_app.worker import Ending, new_stop, run_training

# "elsewhere": the job has ended here, and another process trains the run now.
State = Literal["queued", "running", "finished", "stopped", "failed", "elsewhere"]
ENDED = ("finished", "stopped", "failed", "elsewhere")
# Finished jobs stay available as runs; only so many ended jobs keep their curves and previews.
MOST_REMEMBERED = 20
MOST_PREVIEWS = 12


@dataclass
class Job:
    """A training and its progress; only the queue changes it, under its lock.

    Args:
        name: name of the run in the library.
        config: its settings.
        state: its state.
        step: number of finished optimizer steps.
        losses: (step, loss).
        previews: (step, pictures).
        description: output of the trainer before the first step.
        message: why it ended.
        cancelled: whether a visitor has cancelled it.
        speed: pictures per second.
        peak_memory: peak memory in bytes.
        stop: flag that stops its process.
    """

    name: str
    config: DreamBoothConfig
    state: State = "queued"
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    previews: list[tuple[int, Sequence[Image.Image]]] = field(default_factory=list)
    description: str = ""
    message: str = ""
    cancelled: bool = False
    speed: float = 0.0
    peak_memory: int = 0
    stop: Event = field(default_factory=new_stop, repr=False)

    @property
    def resumable(self) -> bool:
        """Whether the training ended early and has a checkpoint."""
        return self.state in ("stopped", "failed") and bool(list_checkpoints(Path(self.config.output_dir)))

    def seen(self) -> "Job":
        """A copy, updated with the work of other processes on its run since it ended here."""
        copy = replace(self, losses=list(self.losses), previews=list(self.previews))
        if self.state not in ("stopped", "failed"):
            return copy
        folder = Path(self.config.output_dir)
        process = training_process(folder)
        if process is not None:
            return replace(copy, state="elsewhere", step=_saved_step(folder), message=f"{process} trains it")
        if (folder / RESULT_FILE).exists():
            return replace(copy, state="finished", step=self.config.max_train_steps or self.step, message="trained elsewhere")
        return copy


class JobQueue:
    """Runs one training after the other, each in its own process; a failed training does not affect the others.

    Args:
        messages: turns errors into texts.
        most_waiting: largest number of waiting jobs.
        make_room: frees memory that the page can do without; called before every training.
    """

    def __init__(self, messages: Messages, most_waiting: int, make_room: Callable[[], None]):
        self._messages, self._most_waiting, self._make_room = messages, most_waiting, make_room
        self._jobs: dict[str, Job] = {}
        self._waiting: list[str] = []
        self._condition = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self.version = 0

    @contextmanager
    def changes(self) -> Iterator[None]:
        """A context for a change of a job; it increases `version`, so that every page sees the change."""
        with self._condition:
            self.version += 1
            yield

    def restore(self, unfinished: Mapping[str, DreamBoothConfig]) -> None:
        """Adds unfinished runs of an earlier process, so that they can be resumed.

        Args:
            unfinished: name -> settings.
        """
        with self.changes():
            for name, config in unfinished.items():
                step = _saved_step(Path(config.output_dir))
                message = f"interrupted; its last checkpoint is from step {step}"
                self._jobs.setdefault(name, Job(name, config, "stopped", step=step, message=message))

    def check_room(self) -> None:
        """Refuses another training if too many are waiting.

        Raises:
            ConfigError: the queue is full.
        """
        if len(self._waiting) >= self._most_waiting:
            raise ConfigError(f"{len(self._waiting)} trainings are already waiting: try again when one of them is done")

    def submit(self, name: str, config: DreamBoothConfig) -> None:
        """Adds a training to the end of the queue.

        Args:
            name: a new name for the run.
            config: its settings.

        Raises:
            ConfigError: the queue is full.
        """
        with self.changes():
            self.check_room()
            self._jobs[name] = Job(name, config)
            self._enqueue(name)

    def resume(self, name: str) -> None:
        """Adds a stopped or failed training to the queue again; it continues from its last checkpoint.

        Raises:
            ConfigError: there is no such training, it cannot be resumed, or the queue is full.
        """
        with self.changes():
            job = self.job(name)
            seen = job.seen()
            if seen.state == "elsewhere":
                raise ConfigError(f"{name} cannot be resumed here: {seen.message}; wait until it ends")
            if not seen.resumable:
                raise ConfigError(
                    f"{name} is {seen.state} and cannot be resumed: choose a training that ended early and has a checkpoint"
                )
            self.check_room()
            job.config = replace(job.config, resume_from_checkpoint="latest")
            job.state, job.cancelled, job.message, job.stop = "queued", False, "", new_stop()
            self._enqueue(name)

    def cancel(self, name: str) -> None:
        """Removes a training from the queue, or stops it after its current step with a checkpoint.

        Raises:
            ConfigError: there is no such training, or it has ended.
        """
        with self.changes():
            job = self.job(name)
            if job.state in ENDED:
                raise ConfigError(f"{name} is {job.state}: there is nothing to cancel")
            self._stop(job)
            if job.state == "queued":
                self._waiting.remove(name)
                job.state, job.message = "stopped", "cancelled before it began"
                if job.seen().state == "stopped" and not job.resumable:
                    shutil.rmtree(job.config.output_dir, ignore_errors=True)

    def job(self, name: str) -> Job:
        """The job with this name.

        Raises:
            ConfigError: there is no such job.
        """
        with self._condition:
            if name not in self._jobs:
                raise ConfigError(f"no training named {str(name)!r}: choose one from the list")
            return self._jobs[name]

    def jobs(self) -> list[tuple[Job, int | None]]:
        """Copies of all jobs, the newest last; waiting jobs with their place in the queue (1 is next), others with None."""
        with self._condition:
            queue_places = {name: place for place, name in enumerate(self._waiting, start=1)}
            return [(job.seen(), queue_places.get(job.name)) for job in self._jobs.values()]

    def _enqueue(self, name: str) -> None:
        self._waiting.append(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="training", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting)
                job = self._jobs[self._waiting.pop(0)]
                self.version += 1
                job.state = "running"
            ending = self._run(job)
            with self.changes():
                job.state, job.message = ending
                self._condition.notify_all()
                self._forget(job for job in list(self._jobs.values()) if job.state in ENDED and not job.resumable)

    def _run(self, job: Job) -> Ending:
        try:
            self._make_room()
            return run_training(job.config, self._messages, job.stop, lambda kind, data: self._record(job, kind, data))
        except Exception as error:  # after any error the next training in the queue has to start
            return Ending("failed", self._messages.text(error))

    def _record(self, job: Job, kind: str, data) -> None:
        with self.changes():
            if kind == "start":
                job.step, job.description = data
            elif kind == "step":
                job.step = data.step
                job.losses.append((data.step, data.loss))
                job.speed, job.peak_memory = data.pictures_per_second, data.peak_memory
            elif kind == "preview":
                job.previews = [*job.previews, data][-MOST_PREVIEWS:]

    def close(self, seconds: float = 60.0) -> None:
        """Stops the running training and waits for its checkpoint; removes the waiting trainings from the queue.

        Args:
            seconds: longest time to wait.
        """
        with self.changes():
            self._waiting.clear()
            running = [job for job in self._jobs.values() if job.state == "running"]
            for job in running:
                self._stop(job)
            self._condition.wait_for(lambda: all(job.state in ENDED for job in running), timeout=seconds)

    @staticmethod
    def _stop(job: Job) -> None:
        job.cancelled = True
        job.stop.set()

    def _forget(self, ended: Iterable[Job]) -> None:
        for job in list(ended)[:-MOST_REMEMBERED]:
            del self._jobs[job.name]


def _saved_step(folder: Path) -> int:
    """The step of the last checkpoint of a run; 0 if it has no checkpoint."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1][0] if checkpoints else 0


def new_name(method: str, taken: Iterable[str]) -> str:
    """A new name for a run: the method and random letters, and no text of a visitor.

    Args:
        method: a key of `METHODS`.
        taken: names that are in use.
    """
    taken = set(taken)
    while (name := f"{method}-{secrets.token_hex(3)}") in taken:
        pass
    return name
