"""A classification run: from the settings to the saved result and its report."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DataCollatorWithPadding, EvalPrediction, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cersa_diffusion.classification.data import Splits
from cersa_diffusion.classification.images import load_images, with_pixels
from cersa_diffusion.classification.model import load_config, load_for_training, load_processor
from cersa_diffusion.classification.result import save_classifier
from cersa_diffusion.classification.scores import METRICS
from cersa_diffusion.classification.settings import ClassifierSettings, Data, ImageData, RunArguments
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
# The arguments of the Trainer that affect the result.
_RESULT_ARGUMENTS = (
    "seed learning_rate weight_decay per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps "
    "lr_scheduler_type warmup_steps optim max_grad_norm bf16 fp16 world_size"
).split()


@dataclass(frozen=True)
class TrainReport:
    """The scores of a run and its costs.

    Attributes:
        data: name of the data.
        method: a name in `cersa_diffusion.methods.settings.METHOD_NAMES`.
        model: the pre-trained model.
        metric: key in `cersa_diffusion.classification.scores.METRICS`.
        score: the metric over all examples to evaluate on (for MNLI: both parts together).
        scores: split -> metric.
        examples: split -> number of examples.
        loss: mean training loss.
        steps: optimizer steps.
        seconds: time of the training; for a resumed run without the steps that were lost after the checkpoint.
        trainable_parameters: trained numbers, including those of the head.
        head_parameters: trained numbers of the head.
        weight_bytes, gradient_bytes, optimizer_bytes: memory of the tensors during training, without activations.
        file_bytes: size of the files with the trained weights.
        seed: seed of the run.
        preset: name of the preset, with the table of the paper; None without a preset.
        result: the folder that `load_classifier` opens.
        versions: library -> version.
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
        """A Markdown table with one row; the score is in percent."""
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
    settings: ClassifierSettings, data: Data, arguments: RunArguments, preset: str | None = None
) -> TrainReport | None:
    """Trains and evaluates a classifier and saves the result.

    Args:
        settings: model and method.
        data: source of the examples; its class decides between pictures and sentences.
        arguments: arguments of the Trainer.
        preset: name of the preset, for the report.

    Returns:
        The report on the main process, None on the others.

    Raises:
        ConfigError: a path, a setting, examples or labels cannot be used; raised before anything is trained or written.
        CersaError: the checkpoint cannot be resumed, or the result cannot be written.
        NonFiniteError: the loss or the predictions became NaN or infinite.
    """
    check_versions()
    output_dir = Path(arguments.output_dir)
    checkpoint = _checkpoint(settings, data, arguments, output_dir)
    trainer, splits, metric = _prepare(settings, data, arguments)
    share_bases({"model": trainer.model})
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(output_dir / SETTINGS_FILE, _result_settings(settings, data, arguments))
        print(trainer.classifier.description, flush=True)
    steps = trainer.train(resume_from_checkpoint=checkpoint).global_step
    seconds = trainer.seconds
    predictions = {split: trainer.predict(rows, metric_key_prefix=split) for split, rows in splits.validation.items()}
    logits = {split: _logits(outputs) for split, outputs in predictions.items()}
    labels = {split: outputs.label_ids for split, outputs in predictions.items()}
    for split in predictions:
        if not np.isfinite(logits[split]).all():
            raise NonFiniteError(f"{split}: NaN or infinity in the predictions: lower learning_rate ({arguments.learning_rate})")
    if not trainer.is_world_process_zero():
        return None
    measured = {
        "data": data.name,
        "metric": metric,
        "score": METRICS[metric](*(np.concatenate(list(arrays.values())) for arrays in (logits, labels))),
        "scores": {split: METRICS[metric](logits[split], labels[split]) for split in predictions},
        "examples": {"train": len(splits.train)} | {split: len(rows) for split, rows in splits.validation.items()},
        "loss": trainer.mean_loss,
        "steps": steps,
        "seconds": seconds,
        "seed": arguments.seed,
        "preset": preset,
    }
    report = _save_and_report(trainer, measured, output_dir)
    with atomic_write(output_dir / ROW_FILE) as temporary:
        temporary.write_text(report.row)
    # Written last: this file marks the run as finished.
    _write_json(output_dir / METRICS_FILE, asdict(report))
    print(report.row, flush=True)
    return report


def _write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _prepare(settings: ClassifierSettings, data: Data, arguments: RunArguments) -> tuple[ClassifierTrainer, Splits, str]:
    """Creates the Trainer with model and data; also returns the examples and the name of the metric."""
    kind = "image" if isinstance(data, ImageData) else "text"
    processor = load_processor(kind, settings)
    # The main process goes first: it fills the caches of data sets and decompositions, which the other processes then read.
    with arguments.main_process_first(desc="data"):
        splits = load_splits(data, arguments.seed)
        config = load_config(settings, splits.label_names)
        splits, collator = model_inputs(splits, processor, data, config, arguments.seed)
    with arguments.main_process_first(desc="model"):
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
        classifier = load_for_training(kind, settings, processor, config, arguments.seed, dtype)
    metric = metric_name(data) if kind == "text" else "accuracy"
    validation = splits.validation if len(splits.validation) > 1 else next(iter(splits.validation.values()))
    if arguments.metric_for_best_model == "loss" and len(splits.validation) > 1:
        # With several splits each loss carries the name of its split, but the Trainer looks for "loss": take the first split.
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
    # Some models return hidden states beside the logits.
    return outputs.predictions[0] if isinstance(outputs.predictions, tuple) else outputs.predictions


def load_splits(data: Data, seed: int) -> Splits:
    """Loads and checks the examples of a run, as `load_images` or `load_texts`."""
    return load_images(data, seed) if isinstance(data, ImageData) else load_texts(data, seed)


def model_inputs(splits: Splits, processor, data: Data, config, seed: int) -> tuple[Splits, Callable]:
    """Turns the examples into inputs of the model; also returns the collator that makes batches of them."""
    if isinstance(data, ImageData):
        return with_pixels(splits, processor, data, seed), default_data_collator
    limit = token_limit(data.max_length, processor, config)
    return with_tokens(splits, processor, text_columns(data), limit), DataCollatorWithPadding(processor)


def _result_settings(settings: ClassifierSettings, data: Data, arguments: RunArguments) -> dict:
    """The settings that affect the result, as plain values."""
    chosen = {name: getattr(arguments, name) for name in _RESULT_ARGUMENTS}
    return json.loads(json.dumps({**asdict(settings), **asdict(data), **chosen}))


def _last_checkpoint(output_dir: Path) -> str | None:
    """The newest complete checkpoint."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_complete(folder):
            return str(folder)
        warnings.warn(f"{folder} is incomplete (writing it was interrupted) and is ignored", stacklevel=2)
    return None


def _checkpoint(settings: ClassifierSettings, data: Data, arguments: RunArguments, output_dir: Path) -> str | None:
    """Refuses a folder that holds another run; returns the checkpoint to resume from, if there is one."""
    if arguments.resume_from_checkpoint is None:
        if any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) or (output_dir / METRICS_FILE).exists():
            raise ConfigError(
                f"output_dir: {output_dir} already holds a run: add --resume_from_checkpoint latest to continue it, or choose "
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
        raise CersaError(f"{checkpoint} is not a complete checkpoint of a classification run: name another one")
    if (output_dir / SETTINGS_FILE).is_file():
        started, now = json.loads((output_dir / SETTINGS_FILE).read_text()), _result_settings(settings, data, arguments)
        changeable = _changeable_settings(Path(checkpoint), arguments)
        changed = sorted(name for name in now if name not in changeable and name in started and now[name] != started[name])
        if changed:
            raise ConfigError(f"resume_from_checkpoint: {output_dir} was started with other settings of {', '.join(changed)}")
    return checkpoint


def _changeable_settings(checkpoint: Path, arguments: RunArguments) -> tuple[str, ...]:
    """The settings that a resumed run may change: after it diverged, a run can continue with a lower learning rate."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    finished = state["global_step"] >= state["max_steps"]
    # This schedule lowers the rate itself, and the checkpoint does not hold the rate with which it started.
    return () if finished or arguments.lr_scheduler_type == "reduce_lr_on_plateau" else ("learning_rate",)


def _save_and_report(trainer: ClassifierTrainer, measured: dict, output_dir: Path) -> TrainReport:
    """Saves the result; returns the report of the measured values and the costs of the run."""
    classifier = trainer.classifier
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "datasets")}
    training = {name: measured[name] for name in ("data", "metric", "score", "steps", "seed", "preset")}
    folder = output_dir / RESULT_FOLDER
    settings = asdict(classifier.settings)
    # Other users may receive the adapter file: it must not hold the local paths of models and examples.
    training |= {"data": public_name(measured["data"]), "settings": settings | public_sources(settings), "versions": versions}
    try:
        path = save_classifier(classifier, folder, training)
    except (OSError, SafetensorError) as error:  # safetensors does not raise OSError if the disk is full
        raise CersaError(
            f"{folder}: all steps are done, but the result cannot be written ({error}): free some disk space, then continue with "
            "--resume_from_checkpoint latest"
        ) from error
    trained = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    head = {id(p) for name in classifier.head for p in classifier.model.get_submodule(name).parameters()}
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return TrainReport(
        **measured,
        method=classifier.settings.method,
        model=classifier.settings.model_name_or_path,
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        head_parameters=sum(parameter.numel() for parameter in trained if id(parameter) in head),
        weight_bytes=_bytes([*classifier.model.parameters(), *classifier.model.buffers()]),
        gradient_bytes=_bytes(trained),
        optimizer_bytes=_bytes(moments),
        file_bytes=sum(file.stat().st_size for file in {path, *folder.glob("head.safetensors")}),
        result=str(folder),
        versions=versions,
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
