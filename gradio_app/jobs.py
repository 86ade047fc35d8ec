"""Trainings, one at a time: a queue with places, what each one has done so far, cancelling and resuming."""

import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate.state import AcceleratorState
from PIL import Image

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, TrainingStopped, train_dreambooth
from cersa_diffusion.training.checkpoints import list_checkpoints
from gradio_app.messages import Messages

State = Literal["queued", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped", "failed")
# Finished jobs are remembered by their runs; their curves and previews are not kept for ever.
MOST_REMEMBERED = 20
MOST_PREVIEWS = 12


@dataclass
class Job:
    """A training and what it has done; changed by the queue alone, under its lock.

    Args:
        name: of the run, as the library lists it.
        config: its settings.
        state: where it is.
        step: optimizer steps done.
        losses: (step, loss).
        previews: (step, pictures).
        description: what the trainer says before the first step.
        message: why it ended.
        cancelled: whether its end was asked for.
        speed: pictures per second.
        peak_memory: bytes.
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

    @property
    def resumable(self) -> bool:
        """Whether it ended early and left a checkpoint."""
        return self.state in ("stopped", "failed") and bool(list_checkpoints(Path(self.config.output_dir)))


class _Watcher(TrainingCallback):
    """Writes down what the trainer tells, and stops it when that was asked for."""

    def __init__(self, job: Job, queue: "JobQueue"):
        self.job, self.queue = job, queue

    def on_start(self, start):
        with self.queue.changes():
            self.job.step, self.job.description = start.first_step, "\n".join(start.description)

    def on_step(self, progress):
        with self.queue.changes():
            self.job.step = progress.step
            self.job.losses.append((progress.step, progress.loss))
            self.job.speed, self.job.peak_memory = progress.pictures_per_second, progress.peak_memory

    def on_preview(self, step, pictures):
        with self.queue.changes():
            self.job.previews = [*self.job.previews, (step, list(pictures))][-MOST_PREVIEWS:]

    def should_stop(self):
        return self.job.cancelled


class JobQueue:
    """Runs one training after the other in a thread of its own; what becomes of one leaves the others alone.

    Args:
        messages: turns errors into texts.
        most_waiting: jobs that wait.
    """

    def __init__(self, messages: Messages, most_waiting: int):
        self._messages, self._most_waiting = messages, most_waiting
        self._jobs: dict[str, Job] = {}
        self._waiting: list[str] = []
        self._condition = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self.version = 0

    @contextmanager
    def changes(self) -> Iterator[None]:
        """A context for changing a job; everybody who looks afterwards sees another `version`."""
        with self._condition:
            self.version += 1
            yield

    def restore(self, unfinished: Mapping[str, DreamBoothConfig]) -> None:
        """Lists runs that an earlier process left behind, to be resumed.

        Args:
            unfinished: name -> settings.
        """
        with self.changes():
            for name, config in unfinished.items():
                steps = list_checkpoints(Path(config.output_dir))[-1][0]
                message = f"interrupted; its last checkpoint is of step {steps}"
                self._jobs.setdefault(name, Job(name, config, "stopped", step=steps, message=message))

    def check_room(self) -> None:
        """Refuses where too many wait already.

        Raises:
            ConfigError: the queue is full.
        """
        if len(self._waiting) >= self._most_waiting:
            raise ConfigError(f"{len(self._waiting)} trainings are waiting already: try again when one of them is done")

    def submit(self, name: str, config: DreamBoothConfig) -> None:
        """Puts a training at the end of the queue.

        Args:
            name: of the run, not in use.
            config: its settings.

        Raises:
            ConfigError: the queue is full.
        """
        with self.changes():
            self.check_room()
            self._jobs[name] = Job(name, config)
            self._enqueue(name)

    def resume(self, name: str) -> None:
        """Lets a training that was stopped or has failed go on from its last checkpoint.

        Raises:
            ConfigError: no such training, nothing to go on from, or the queue is full.
        """
        with self.changes():
            job = self.job(name)
            if not job.resumable:
                raise ConfigError(f"{name} is {job.state} and cannot be resumed: only what ended early with a checkpoint can")
            self.check_room()
            job.config = replace(job.config, resume_from_checkpoint="latest")
            job.state, job.cancelled, job.message = "queued", False, ""
            self._enqueue(name)

    def cancel(self, name: str) -> None:
        """Takes a training out of the queue, or asks it to stop after its step, with a checkpoint.

        Raises:
            ConfigError: no such training, or it is not going on.
        """
        with self.changes():
            job = self.job(name)
            if job.state in ENDED:
                raise ConfigError(f"{name} is {job.state}: there is nothing to cancel")
            job.cancelled = True
            if job.state == "queued":
                self._waiting.remove(name)
                job.state, job.message = "stopped", "cancelled before it began"
                if not job.resumable:
                    shutil.rmtree(job.config.output_dir, ignore_errors=True)

    def job(self, name: str) -> Job:
        """The job of a name.

        Raises:
            ConfigError: there is none.
        """
        with self._condition:
            if name not in self._jobs:
                raise ConfigError(f"no training named {str(name)!r}: choose one from the list")
            return self._jobs[name]

    def jobs(self) -> list[tuple[Job, int | None]]:
        """Copies of all jobs with the place of those that wait (1 is next), the newest last."""
        with self._condition:
            places = {name: number for number, name in enumerate(self._waiting, start=1)}
            return [
                (replace(job, losses=list(job.losses), previews=list(job.previews)), places.get(job.name))
                for job in self._jobs.values()
            ]

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
            state, message = self._run(job)
            with self.changes():
                job.state, job.message = state, message
                self._forget(job for job in list(self._jobs.values()) if job.state in ENDED and not job.resumable)

    def _run(self, job: Job) -> tuple[State, str]:
        try:
            # accelerate keeps the precision of the first training for the whole process.
            AcceleratorState._reset_state(reset_partial_state=True)
            result = train_dreambooth(job.config, [_Watcher(job, self)])
            return "finished", f"{result.steps} steps, loss {result.loss:.4f}"
        except TrainingStopped:
            return "stopped", f"stopped after step {job.step}; it can be resumed from there"
        except BaseException as error:  # whatever happens, the next in the queue gets its turn
            return "failed", self._messages.text(error)

    def _forget(self, ended: Iterable[Job]) -> None:
        for job in list(ended)[:-MOST_REMEMBERED]:
            del self._jobs[job.name]


def new_name(method: str, taken: Iterable[str]) -> str:
    """A name for a run that is not taken: the method and a few random letters; nothing that a visitor wrote.

    Args:
        method: a key of `METHODS`.
        taken: names in use.
    """
    taken = set(taken)
    while (name := f"{method}-{secrets.token_hex(3)}") in taken:
        pass
    return name
