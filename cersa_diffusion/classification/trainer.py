"""The Trainer of transformers for a prepared classifier: two learning rates, and checkpoints of the trained weights only."""

import json
import math
import time
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from cersa_diffusion.classification.model import Classifier
from cersa_diffusion.classification.result import save_classifier
from cersa_diffusion.classification.targets import is_inside
from cersa_diffusion.errors import NonFiniteError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.training.checkpoints.folder import WEIGHTS_FILE, basis_digest, check_finite, load_weights, trained_weights
from cersa_diffusion.training.checkpoints.portable import save_portable
from cersa_diffusion.training.run.rates import keep_rates

PROGRESS_FILE = "progress.json"


class _Watch(TrainerCallback):
    """Sets the epoch of the data set, completes the log before every checkpoint, and stops the run if the loss is not finite."""

    def __init__(self, trainer: "ClassifierTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        if isinstance(lr_scheduler, LambdaLR):
            keep_rates(lr_scheduler, self.trainer.rates, state.global_step)
        # The moments were loaded after the weights and belong to the singular vectors of another machine.
        if self.trainer.moved:
            optimizer.state.clear()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        # The data loader of accelerate sets the epoch only with one process and only if the run was not resumed.
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **_):
        # The last step is always saved, whatever the save strategy is, so that no work is lost until the result is written.
        control.should_save |= state.global_step >= state.max_steps
        # A checkpoint does not hold the losses since the last log entry.
        control.should_log |= control.should_save or control.should_training_stop

    def on_epoch_end(self, args, state, control, **_):
        control.should_log |= control.should_save

    def on_log(self, args, state, control, logs=None, **_):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} by step {state.global_step}: lower learning_rate ({args.learning_rate})"
            )


class ClassifierTrainer(Trainer):
    """The Trainer of a classification run.

    Args:
        classifier: the prepared model.
        arguments: arguments of `transformers.Trainer`, without the model and the processor.
    """

    def __init__(self, classifier: Classifier, **arguments):
        super().__init__(model=classifier.model, processing_class=classifier.processor, **arguments)
        self.classifier, self.moved, self.rates = classifier, False, []
        self.add_callback(_Watch(self))
        self._start, self._earlier_seconds = time.perf_counter(), 0.0

    def train(self, *arguments, **options) -> TrainOutput:
        """Trains as `transformers.Trainer` does and starts the clock of `seconds`."""
        self._start = time.perf_counter()
        return super().train(*arguments, **options)

    @property
    def seconds(self) -> float:
        """Time since the training started; a resumed run adds the time up to the checkpoint from which it was resumed."""
        return self._earlier_seconds + time.perf_counter() - self._start

    @property
    def mean_loss(self) -> float:
        """Mean training loss over all steps, including those before the run was resumed."""
        entries = [entry for entry in self.state.log_history if "loss" in entry]
        steps = [entry["step"] for entry in entries]
        counts = [step - before for before, step in zip([0, *steps], steps, strict=False)]
        return sum(count * entry["loss"] for count, entry in zip(counts, entries, strict=True)) / steps[-1]

    @cached_property
    def bases(self) -> str:
        """`basis_digest` of the model, computed once because the frozen bases never change."""
        return basis_digest({"model": self.model})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer: the head has its own learning rate, and biases and norms have no weight decay."""
        if self.optimizer is None:
            trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            decayed = set(self.get_decay_parameter_names(self.model))
            head = {name for name in trained if is_inside(name, self.classifier.head)}
            head_rate = self.classifier.settings.classifier_learning_rate
            rates = {True: self.args.learning_rate if head_rate is None else head_rate, False: self.args.learning_rate}
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [p for name, p in trained.items() if (name in head) == in_head and (name in decayed) == decays],
                    "lr": rates[in_head],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for in_head in (False, True)
                for decays in (True, False)
            ]
            groups = [group for group in groups if group["params"]]
            self.rates = [group["lr"] for group in groups]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a result that `load_classifier` opens; inside a checkpoint, only the trained weights."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call:
            save_classifier(self.classifier, folder, {"steps": self.state.global_step})
            return
        folder.mkdir(parents=True, exist_ok=True)
        components = {"model": self.model}
        check_finite(components)
        weights = {name: p.detach().cpu().contiguous() for name, p in trained_weights(components).items()}
        with atomic_write(folder / WEIGHTS_FILE) as path:
            save_file(weights, path)
        save_portable(components, folder, {})
        progress = {"bases": self.bases, "seconds": self.seconds}
        with atomic_write(folder / PROGRESS_FILE) as path:
            path.write_text(json.dumps(progress) + "\n")

    # The Trainer has no public method for loading weights from a checkpoint, so these two private ones are replaced.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._earlier_seconds = self._load_weights(resume_from_checkpoint)["seconds"]

    def _load_best_model(self) -> None:
        self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, checkpoint: str) -> dict:
        progress = json.loads((Path(checkpoint) / PROGRESS_FILE).read_text())
        self.moved = progress["bases"] != self.bases
        load_weights({"model": self.model}, Path(checkpoint), solve=self.moved)
        return progress


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint; the state of the Trainer is the last file that is written."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (folder / WEIGHTS_FILE).is_file() and (folder / PROGRESS_FILE).is_file()
