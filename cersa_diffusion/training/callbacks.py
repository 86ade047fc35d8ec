"""What a program that runs a training can listen to (plan, steps, previews, checkpoints, end), and how it stops one."""

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
    """A callback asked for the end of the training; a checkpoint was written before."""


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step.

    Attributes:
        description: what is trained, what it takes and what it costs, a paragraph each.
        plan: bytes of the trained components by method: the run's own first ("cersa"), then what it is compared with
            ("lora r=32", "full").
        first_step: steps done before, by a run that is resumed.
        total_steps: of the whole training.
        expected_seconds: that the steps will take, by a trial.
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
        total_steps: of the whole training.
        loss: of this step, the mean over all its pictures and processes.
        learning_rate: of the UNet in this step.
        pictures_per_second: of the subject and the class, over all processes, since this call began.
        peak_memory: bytes: on a GPU the most allocated so far, else the most that the process has held.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    pictures_per_second: float
    peak_memory: int


class TrainingCallback:
    """Override what is of interest; called on the main process, in the thread that trains."""

    def on_start(self, start: RunStart) -> None:
        """Before the first step."""

    def on_step(self, progress: StepProgress) -> None:
        """After every optimizer step."""

    def on_preview(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """When previews were drawn, after so many steps."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """When a checkpoint was written."""

    def on_end(self, result: "TrainResult") -> None:
        """When the result is saved."""

    def should_stop(self) -> bool:
        """Asked after every step: True ends the training with a checkpoint and `TrainingStopped`."""
        return False


class ProgressBar(TrainingCallback):
    """The description of the run, a bar with loss, learning rate, pictures a second and peak memory, and how to use the result.

    Args:
        config: the settings of the run.
    """

    def __init__(self, config: "DreamBoothConfig"):
        self.config = config

    def on_start(self, start: RunStart) -> None:
        print("\n".join(start.description), flush=True)
        self._bar = tqdm(total=start.total_steps, initial=start.first_step, desc="training", unit="step")

    def on_step(self, progress: StepProgress) -> None:
        self._bar.set_postfix_str(
            f"loss {progress.loss:.4f}, lr {progress.learning_rate:.1e}, {progress.pictures_per_second:.1f} pictures/s, "
            f"peak {progress.peak_memory / 2**30:.2f} GiB",
            refresh=False,
        )
        self._bar.update()
        if progress.step == progress.total_steps:
            self._bar.close()

    def on_preview(self, step: int, pictures: Sequence[Image.Image]) -> None:
        # The time of previews and checkpoints says nothing about that of the steps to come.
        self._bar.unpause()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._bar.unpause()

    def on_end(self, result: "TrainResult") -> None:
        print(result.summary(self.config), flush=True)
