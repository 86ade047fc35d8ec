"""transformers' Trainer for a prepared classifier: two learning rates, and checkpoints of the trained weights only."""

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
from cersa_diffusion.errors import NonFiniteError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.training.checkpoints.folder import WEIGHTS_FILE, basis_digest, check_finite, load_weights, trained_weights
from cersa_diffusion.training.checkpoints.portable import save_portable
from cersa_diffusion.training.run.rates import keep_rates

PROGRESS_FILE = "progress.json"


class _Watch(TrainerCallback):
    """Keeps the data set's epoch, the log complete at every checkpoint, and stops where the loss is lost.

    Args:
        trainer: whose run it watches.
    """

    def __init__(self, trainer: "ClassifierTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        if isinstance(lr_scheduler, LambdaLR):
            keep_rates(lr_scheduler, self.trainer.rates, state.global_step)
        # The moments were loaded after the weights, and belong to the singular vectors of another machine.
        if self.trainer.moved:
            optimizer.state.clear()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        # accelerate's loader does so itself only in one process and in a run that was not resumed.
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **_):
        # From here to the written result a checkpoint keeps what was done, whatever the strategy of saving on the way is.
        control.should_save |= state.global_step >= state.max_steps
        # Losses since the last entry of the log are in no checkpoint.
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
    """The Trainer of a classification run; everything but the methods below is transformers' own.

    Args:
        classifier: the prepared model.
        arguments: of `transformers.Trainer`, without the model and the processor.
    """

    def __init__(self, classifier: Classifier, **arguments):
        super().__init__(model=classifier.model, processing_class=classifier.processor, **arguments)
        self.classifier, self.moved, self.rates = classifier, False, []
        self.add_callback(_Watch(self))
        self._start, self._earlier_seconds = time.perf_counter(), 0.0

    def train(self, *arguments, **options) -> TrainOutput:
        """transformers' own, on the clock."""
        self._start = time.perf_counter()
        return super().train(*arguments, **options)

    @property
    def seconds(self) -> float:
        """Time since the training was started; that of an interrupted run up to the checkpoint it was resumed from."""
        return self._earlier_seconds + time.perf_counter() - self._start

    @property
    def mean_loss(self) -> float:
        """Over all steps, those before a resumption included."""
        entries = [entry for entry in self.state.log_history if "loss" in entry]
        steps = [entry["step"] for entry in entries]
        weights = [step - before for before, step in zip([0, *steps], steps, strict=False)]
        return sum(w * entry["loss"] for w, entry in zip(weights, entries, strict=True)) / steps[-1]

    @cached_property
    def bases(self) -> str:
        """`basis_digest` of the model; frozen bases never change, so it is computed once."""
        return basis_digest({"model": self.model})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with the classifier's own learning rate, and no weight decay on biases and norms."""
        if self.optimizer is None:
            trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            decayed = set(self.get_decay_parameter_names(self.model))
            head = {name for name in trained if any(name.startswith(f"{own}.") for own in self.classifier.head)}
            own = self.classifier.settings.classifier_learning_rate
            rates = {True: self.args.learning_rate if own is None else own, False: self.args.learning_rate}
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [p for name, p in trained.items() if (name in head) == of_head and (name in decayed) == decays],
                    "lr": rates[of_head],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for of_head in (False, True)
                for decays in (True, False)
            ]
            groups = [group for group in groups if group["params"]]
            self.rates = [group["lr"] for group in groups]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a result that `load_classifier` opens; as part of a checkpoint just the trained weights."""
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

    # The Trainer has no public way to say how weights come out of a checkpoint.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        self._earlier_seconds = json.loads((folder / PROGRESS_FILE).read_text())["seconds"]

    def _load_best_model(self) -> None:
        self._load_weights(Path(self.state.best_model_checkpoint))

    def _load_weights(self, folder: Path) -> None:
        self.moved = json.loads((folder / PROGRESS_FILE).read_text())["bases"] != self.bases
        load_weights({"model": self.model}, folder, solve=self.moved)


def is_complete(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end: the state of the Trainer is the last file."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (folder / WEIGHTS_FILE).is_file() and (folder / PROGRESS_FILE).is_file()
