"""transformers' Trainer for a prepared classifier: two learning rates, and checkpoints of the trained weights only."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from cersa_diffusion.classification.model import Classifier
from cersa_diffusion.classification.result import save_classifier
from cersa_diffusion.errors import CersaError
from cersa_diffusion.training.checkpoints import WEIGHTS_FILE, basis_digest, trained_weights

BASES_FILE = "bases.json"


class ClassifierTrainer(Trainer):
    """The Trainer of a classification run; everything but the methods below is transformers' own.

    Args:
        classifier: the prepared model.
        arguments: of `transformers.Trainer`, without the model and the processor.
    """

    def __init__(self, classifier: Classifier, **arguments):
        super().__init__(model=classifier.model, processing_class=classifier.processor, **arguments)
        self.classifier = classifier

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
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
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
        weights = {name: p.detach().cpu().contiguous() for name, p in trained_weights({"model": self.model}).items()}
        save_file(weights, folder / WEIGHTS_FILE)
        (folder / BASES_FILE).write_text(json.dumps(basis_digest({"model": self.model})) + "\n")

    # The Trainer has no public way to say how weights come out of a checkpoint.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        current = trained_weights({"model": self.model})
        if not (folder / WEIGHTS_FILE).is_file():
            raise CersaError(f"{folder} is no checkpoint of a classification run (no {WEIGHTS_FILE} in it)")
        if json.loads((folder / BASES_FILE).read_text()) != basis_digest({"model": self.model}):
            raise CersaError(
                f"{folder}: the singular vectors came out differently than when it was written (another machine, thread count or "
                "torch release), so its cores cannot go on: resume where it was started, or train anew"
            )
        stored = load_file(folder / WEIGHTS_FILE)
        if set(stored) != set(current) or any(stored[name].shape != current[name].shape for name in current):
            raise CersaError(f"{folder}: its {len(stored)} trained tensors are not those of this run: other settings?")
        with torch.no_grad():
            for name, parameter in current.items():
                parameter.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
