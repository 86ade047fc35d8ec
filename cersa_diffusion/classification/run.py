"""A classification run from its settings to the saved result and its figures."""

import json
import warnings
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DataCollatorWithPadding, EvalPrediction
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cersa_diffusion.classification.data import Splits
from cersa_diffusion.classification.images import load_images, with_pixels
from cersa_diffusion.classification.model import load_config, load_for_training, load_processor
from cersa_diffusion.classification.result import save_classifier
from cersa_diffusion.classification.scores import METRICS
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData
from cersa_diffusion.classification.texts import load_texts, metric_name, text_columns, token_limit, with_tokens
from cersa_diffusion.classification.trainer import ClassifierTrainer, is_complete
from cersa_diffusion.errors import CersaError, ConfigError, NonFiniteError
from cersa_diffusion.files import atomic_write, public_name, public_sources
from cersa_diffusion.processes import share_bases
from cersa_diffusion.versions import check_versions

METRICS_FILE = "metrics.json"
ROW_FILE = "table_row.md"
SETTINGS_FILE = "settings.json"
RESULT_FOLDER = "result"


@dataclass(frozen=True)
class TrainReport:
    """What a run reached and what it took.

    Attributes:
        data: what was learned.
        method: a name in `cersa_diffusion.methods.settings.METHOD_NAMES`.
        model: the pre-trained model.
        metric: key of `cersa_diffusion.classification.scores.METRICS`.
        score: the metric over all examples to evaluate on (of MNLI: both parts).
        scores: the metric of each split.
        examples: how many examples each split has.
        loss: mean training loss.
        steps: optimizer steps.
        seconds: time the training took; of an interrupted run without what came after the checkpoint it was resumed from.
        trainable_parameters: numbers that are trained, the classifier's included.
        head_parameters: of these the classifier's.
        weight_bytes, gradient_bytes, optimizer_bytes: tensors while training, without activations.
        file_bytes: size of the files with the trained weights.
        seed: of the run.
        preset: the hyper-parameters by name, with the table of the paper; None where they are one's own.
        result: the folder that `load_classifier` opens.
        versions: of the libraries.
    """

    data: str
    method: str
    model: str
    metric: str
    score: float
    scores: dict[str, float]
    examples: dict[str, int]
    loss: float
    steps: int
    seconds: float
    trainable_parameters: int
    head_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    seed: int
    preset: str | None
    result: str
    versions: dict[str, str]

    @property
    def row(self) -> str:
        """A table of one row, in Markdown; the score in percent."""
        memory = (self.weight_bytes + self.gradient_bytes + self.optimizer_bytes) / 2**20
        columns = {
            "data": self.data,
            "method": self.method,
            self.metric: " / ".join(f"{100 * score:.1f}" for score in self.scores.values()),
            "trained (M)": f"{self.trainable_parameters / 1e6:.3f}",
            "memory (MiB)": f"{memory:.1f}",
            "file (MiB)": f"{self.file_bytes / 2**20:.2f}",
            "steps": str(self.steps),
            "seconds": f"{self.seconds:.0f}",
            "seed": str(self.seed),
        }
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), columns.values())) + "\n"


def train_classifier(
    settings: ClassifierSettings, data: ImageData | TextData, arguments: RunArguments, preset: str | None = None
) -> TrainReport | None:
    """Runs a training from the settings to the saved result.

    Args:
        settings: model and method.
        data: where the examples come from; their class decides between pictures and sentences.
        arguments: of the Trainer.
        preset: name of the hyper-parameters, for the report.

    Returns:
        The report on the main process, None on the others.

    Raises:
        ConfigError: a path, a setting, examples or labels that cannot be used; found before anything is trained or written.
        CersaError: a checkpoint that cannot be resumed.
        NonFiniteError: the loss or the predictions became NaN or infinite.
    """
    check_versions()
    output_dir = Path(arguments.output_dir)
    checkpoint = _checkpoint(settings, data, arguments, output_dir)
    trainer, splits, metric = _prepare(settings, data, arguments)
    share_bases({"model": trainer.model})
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_text(output_dir / SETTINGS_FILE, json.dumps(_deciding(settings, data, arguments), indent=2) + "\n")
        print(trainer.classifier.description, flush=True)
    steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    seconds = trainer.seconds
    predictions = {name: trainer.predict(rows, metric_key_prefix=name) for name, rows in splits.validation.items()}
    for name, outputs in predictions.items():
        if not np.isfinite(_logits(outputs)).all():
            raise NonFiniteError(f"{name}: NaN or infinity in the predictions: lower learning_rate ({arguments.learning_rate})")
    if not trainer.is_world_process_zero():
        return None
    scores = {name: METRICS[metric](_logits(outputs), outputs.label_ids) for name, outputs in predictions.items()}
    together = (np.concatenate([f(outputs) for outputs in predictions.values()]) for f in (_logits, lambda o: o.label_ids))
    figures = {
        "data": data.name,
        "metric": metric,
        "score": METRICS[metric](*together),
        "scores": scores,
        "examples": {"train": len(splits.train)} | {name: len(rows) for name, rows in splits.validation.items()},
        "loss": trainer.mean_loss,
        "steps": steps,
        "seconds": seconds,
        "seed": arguments.seed,
        "preset": preset,
    }
    report = _finish(trainer, figures, output_dir)
    _write_text(output_dir / ROW_FILE, report.row)
    # Last: it says that the run is finished.
    _write_text(output_dir / METRICS_FILE, json.dumps(asdict(report), indent=2) + "\n")
    print(report.row, flush=True)
    return report


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _prepare(
    settings: ClassifierSettings, data: ImageData | TextData, arguments: RunArguments
) -> tuple[ClassifierTrainer, Splits, str]:
    """The Trainer with model and data, the examples, and the name of the metric."""
    kind = "image" if isinstance(data, ImageData) else "text"
    processor = load_processor(kind, settings)
    # The main process fills the caches of the data sets, and of the decompositions, from which the others then read.
    with arguments.main_process_first(desc="data"):
        splits = load_images(data, arguments.seed) if kind == "image" else load_texts(data, arguments.seed)
        config = load_config(settings, splits.label_names)
        splits, collator = _inputs(splits, processor, data, config, arguments.seed)
    with arguments.main_process_first(desc="model"):
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
        classifier = load_for_training(kind, settings, processor, config, arguments.seed, dtype)
    metric = metric_name(data) if kind == "text" else "accuracy"
    validation = splits.validation if len(splits.validation) > 1 else next(iter(splits.validation.values()))
    if arguments.metric_for_best_model == "loss" and len(splits.validation) > 1:
        # Every split has a loss of its own; the Trainer looks for one without a name.
        arguments.metric_for_best_model = f"{next(iter(splits.validation))}_loss"
    trainer = ClassifierTrainer(
        classifier,
        args=arguments,
        train_dataset=splits.train,
        eval_dataset=validation,
        data_collator=collator,
        compute_metrics=lambda outputs: {metric: METRICS[metric](_logits(outputs), outputs.label_ids)},
    )
    return trainer, splits, metric


def _logits(outputs: EvalPrediction) -> np.ndarray:
    # Some models give hidden states beside the logits.
    return outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions


def _inputs(
    splits: Splits, processor, data: ImageData | TextData, config, seed: int
) -> tuple[Splits, DataCollatorWithPadding | None]:
    if isinstance(data, ImageData):
        return with_pixels(splits, processor, data, seed), None
    limit = token_limit(data.max_length, processor, config)
    return with_tokens(splits, processor, text_columns(data), limit), DataCollatorWithPadding(processor)


def _deciding(settings: ClassifierSettings, data: ImageData | TextData, arguments: RunArguments) -> dict:
    """The settings that decide the result, as plain values."""
    shown = (
        "seed",
        "learning_rate",
        "weight_decay",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "max_grad_norm",
        "bf16",
        "fp16",
        "world_size",
    )
    own = {name: getattr(arguments, name) for name in shown}
    return json.loads(json.dumps({**asdict(settings), **asdict(data), **own}))


def _last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_complete(folder):
            return str(folder)
        warnings.warn(f"{folder} was not written to its end and is left alone", stacklevel=2)
    return None


def _checkpoint(
    settings: ClassifierSettings, data: ImageData | TextData, arguments: RunArguments, output_dir: Path
) -> str | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if any."""
    if arguments.resume_from_checkpoint is None:
        if any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (output_dir / METRICS_FILE).exists():
            raise ConfigError(
                f"output_dir: {output_dir} holds a run already: add --resume_from_checkpoint latest to go on with it, or choose "
                "another folder"
            )
        return None
    latest = arguments.resume_from_checkpoint == "latest"
    checkpoint = _last_checkpoint(output_dir) if latest else arguments.resume_from_checkpoint
    if checkpoint is None:
        return None
    if not Path(checkpoint).is_dir():
        raise ConfigError(f"resume_from_checkpoint: {checkpoint} is not a folder: name a checkpoint, or 'latest'")
    if not is_complete(Path(checkpoint)):
        raise CersaError(f"{checkpoint} is no checkpoint of a classification run, or was not written to its end: name another")
    if (output_dir / SETTINGS_FILE).is_file():
        started, now = json.loads((output_dir / SETTINGS_FILE).read_text()), _deciding(settings, data, arguments)
        free = _free_settings(Path(checkpoint), arguments)
        changed = sorted(name for name in now if name not in free and name in started and now[name] != started[name])
        if changed:
            raise ConfigError(f"resume_from_checkpoint: {output_dir} was started with other settings of {', '.join(changed)}")
    return checkpoint


def _free_settings(checkpoint: Path, arguments: RunArguments) -> tuple[str, ...]:
    """What may be another when a run goes on: a run that has diverged is to go on with a lower rate."""
    progress = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    done = progress["global_step"] >= progress["max_steps"]
    # That schedule lowers the rate by itself, and what it began with is not in the checkpoint.
    return () if done or arguments.lr_scheduler_type == "reduce_lr_on_plateau" else ("learning_rate",)


def _finish(trainer: ClassifierTrainer, figures: dict, output_dir: Path) -> TrainReport:
    """Saves the result and adds what the run took to its figures."""
    classifier = trainer.classifier
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "datasets")}
    facts = {name: figures[name] for name in ("data", "metric", "score", "steps", "seed", "preset")}
    folder = output_dir / RESULT_FOLDER
    settings = {f.name: getattr(classifier.settings, f.name) for f in fields(ClassifierSettings)}
    # An adapter that is passed on does not tell where models and examples lie here.
    facts |= {"data": public_name(figures["data"]), "settings": settings | public_sources(settings), "versions": versions}
    try:
        path = save_classifier(classifier, folder, facts)
    except (OSError, SafetensorError) as error:  # safetensors has no OSError for a full disk
        raise CersaError(
            f"{folder}: all steps are done, but the result cannot be written ({error}): make room, then "
            "--resume_from_checkpoint latest writes it"
        ) from error
    trained = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    head = {id(p) for name in classifier.head for p in classifier.model.get_submodule(name).parameters()}
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    weights = list(classifier.model.parameters()) + list(classifier.model.buffers())
    files = {path, *folder.glob("head.safetensors")}
    return TrainReport(
        **figures,
        method=classifier.settings.method,
        model=classifier.settings.model_name_or_path,
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        head_parameters=sum(parameter.numel() for parameter in trained if id(parameter) in head),
        weight_bytes=_bytes(weights),
        gradient_bytes=_bytes(trained),
        optimizer_bytes=_bytes(moments),
        file_bytes=sum(file.stat().st_size for file in files),
        result=str(folder),
        versions=versions,
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
