"""The loop that every training stage shares: schedule, progress, checkpoints, resuming."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

CHECKPOINT_SECONDS = 120
LOG_STEPS = 50


def learning_rate_factor(step: int, steps: int, warm_up: int = 200, decay_from: float = 0.6) -> float:
    """Factor on the learning rate: a short rise, a plateau, and a linear fall to zero.

    Args:
        step: Steps done.
        steps: Steps in all.
        warm_up: Steps of the rise.
        decay_from: Part of the training after which the fall begins.
    """
    rise = min(1.0, (step + 1) / warm_up)
    fall = min(1.0, max(0.0, (steps - step) / (steps * (1 - decay_from))))
    return rise * fall


class Stage:
    """Trains one model for a number of steps, and goes on where an earlier run was stopped.

    Args:
        folder: Work folder of the stage.
        steps: Steps in all.
        batch_size: Samples a step.
        parts: What a checkpoint holds: objects with `state_dict` and `load_state_dict`.
    """

    def __init__(self, folder: Path, steps: int, batch_size: int, parts: dict[str, object]) -> None:
        self.folder = folder
        self.steps = steps
        self.batch_size = batch_size
        self.parts = parts
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        self._stop_asked = False

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        """Take up the checkpoint, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=False)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        torch.set_rng_state(state["rng"])

    def save(self) -> None:
        """Write the checkpoint; an interruption while writing leaves the previous one."""
        state = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "rng": torch.get_rng_state(),
        }
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(self.path)
        (self.folder / "log.json").write_text(json.dumps(self.log))

    def run(self, train_step: Callable[[int], torch.Tensor]) -> None:
        """Train to the end.

        Args:
            train_step: Does one step of the given number, and returns its loss.
        """
        self.resume()
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        losses = []
        with tqdm(total=self.steps, initial=self.step, desc=self.folder.name, mininterval=5) as bar:
            while self.step < self.steps and not self._stop_asked:
                losses.append(train_step(self.step).item())
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                if self.step % LOG_STEPS == 0 or self.step == self.steps:
                    self.log.append({"step": self.step, "seconds": round(self.seconds), "loss": sum(losses) / len(losses)})
                    bar.set_postfix(loss=f"{self.log[-1]['loss']:.4f}")
                    losses.clear()
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if self._stop_asked:
            raise SystemExit(f"stopped at step {self.step} of {self.steps}; start again to go on from there")

    def report(self) -> dict[str, float]:
        """Figures of the finished training, for the model card."""
        last = self.log[-10:]
        return {
            "samples": self.step * self.batch_size,
            "batch_size": self.batch_size,
            "minutes": self.seconds / 60,
            "loss": sum(entry["loss"] for entry in last) / len(last),
        }

    def _ask_to_stop(self, *_: object) -> None:
        self._stop_asked = True


def make_optimizer(
    groups: list[tuple[torch.nn.Module, float]], steps: int, weight_decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW that decays matrices only, with the schedule.

    Args:
        groups: Modules with their learning rates.
        steps: Steps in all.
        weight_decay: Weight decay of everything that has at least two dimensions.
    """
    options = []
    for module, rate in groups:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        options.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        options.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(options, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    return optimizer, schedule
