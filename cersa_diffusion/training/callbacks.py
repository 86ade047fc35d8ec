"""Callbacks: a program that runs a training receives its events (plan, steps, previews, checkpoints, end) and can stop it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm.auto import tqdm

from cersa_diffusion.memory.cost import MemoryUse

if TYPE_CHECKING:
    from cersa_diffusion.training.run.result import TrainResult
    from cersa_diffusion.training.settings.config import DreamBoothConfig


class TrainingStopped(Exception):
    """A callback asked to stop the training; a checkpoint was written first."""


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step.

    Attributes:
        description: paragraphs on what is trained, its memory, its time, and the cost of truncation.
        plan: bytes of the trained components by method: first the method of the run ("cersa"), then the methods it is compared
            with ("lora r=32", "full").
        first_step: steps that a resumed run did before.
        total_steps: steps of the whole training.
        expected_seconds: time of the remaining steps, estimated from one measured batch.
    """

    description: tuple[str, ...]
    plan: Mapping[str, MemoryUse]
    first_step: int
    total_steps: int
    expected_seconds: float


@dataclass(frozen=True)
class StepProgress:
    """A finished optimizer step.

    Attributes:
        step: steps done.
        total_steps: steps of the whole training.
        loss: loss of this step, the mean over all its pictures and processes.
        learning_rate: learning rate of the UNet in this step.
        pictures_per_second: pictures of the subject and the class, over all processes, since this call began.
        peak_memory: peak of the steps so far in bytes: on a GPU the most allocated, otherwise the most that the process held.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    pictures_per_second: float
    peak_memory: int


class TrainingCallback:
    """The base of all callbacks: override the methods you need; they run in the main process, in the thread that trains."""

    def on_start(self, start: RunStart) -> None:
        """Is called before the first step."""

    def on_step(self, progress: StepProgress) -> None:
        """Is called after every optimizer step."""

    def on_preview(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Is called when previews were drawn, after `step` steps."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Is called when a checkpoint was written."""

    def on_end(self, result: "TrainResult") -> None:
        """Is called when the result is saved."""

    def should_stop(self) -> bool:
        """Is called after every step: True ends the training with a checkpoint and `TrainingStopped`."""
        return False


class ProgressBar(TrainingCallback):
    """Prints the description of the run, a bar with loss, learning rate, pictures per second and peak memory, and the summary.

    Args:
        config: the settings of the run.
    """

    def __init__(self, config: "DreamBoothConfig"):
        self.config = config

    def on_start(self, start: RunStart) -> None:
        print("\n".join(start.description), flush=True)
        self._bar = tqdm(total=start.total_steps, initial=start.first_step, desc="training", unit="step")

    def on_step(self, progress: StepProgress) -> None:
        figures = f"loss {progress.loss:.4f}, lr {progress.learning_rate:.1e}, {progress.pictures_per_second:.1f} pictures/s"
        self._bar.set_postfix_str(f"{figures}, peak {progress.peak_memory / 2**30:.2f} GiB", refresh=False)
        self._bar.update()
        if progress.step == progress.total_steps:
            self._bar.close()

    def on_preview(self, step: int, pictures: Sequence[Image.Image]) -> None:
        # Without this, the bar's estimate would count the time of previews and checkpoints as time of the steps.
        self._bar.unpause()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._bar.unpause()

    def on_end(self, result: "TrainResult") -> None:
        print(result.summary(self.config), flush=True)
