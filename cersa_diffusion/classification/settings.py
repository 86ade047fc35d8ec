"""The settings of a classification run: dataclasses from which the command line is made."""

import re
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from cersa_diffusion.classification.tasks import GLUE_TASKS
from cersa_diffusion.config import option
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.text import one_line


@dataclass(kw_only=True)
class ClassifierSettings(MethodSettings):
    """The model and the fine-tuning method.

    Raises:
        ConfigError: a value is out of range, or settings contradict each other.
    """

    model_name_or_path: str = field(metadata={"help": "Pre-trained model: a local folder or a model id on the hub."})
    revision: str | None = option(None, "Revision of the model on the hub.")
    target_modules: list[str] | None = option(
        None,
        "Layers to train beside the classifier: QV, QKV (the default), QKVP or all (Table 2 of the paper), name endings, or one "
        "regular expression for whole names. Full fine-tuning trains every parameter if this is not given.",
    )
    classifier_learning_rate: float | None = option(None, "Learning rate of the classifier. Default: learning_rate.")
    attention_dropout: float | None = option(None, "Dropout of the attention weights. Default: that of the model.")
    classifier_dropout: float | None = option(None, "Dropout before the classifier. Default: that of the model.")

    def __post_init__(self):
        super().__post_init__()
        if not self.model_name_or_path.strip():
            raise ConfigError("model_name_or_path is empty")
        if self.classifier_learning_rate is not None and self.classifier_learning_rate <= 0:
            raise ConfigError(f"classifier_learning_rate is {self.classifier_learning_rate}, expected more than 0")
        for name in ("attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}, expected a share in [0, 1)")
        if self.target_modules is not None:
            self._check_targets()

    def _check_targets(self):
        targets = self.target_modules
        if not targets or isinstance(targets, str):
            raise ConfigError(
                f"target_modules is {targets!r}, expected a list: QV, QKV, QKVP, all, name endings, or one regular expression"
            )
        try:
            re.compile(targets[0] if len(targets) == 1 else "")
        except re.error as error:
            raise ConfigError(f"target_modules: {targets[0]!r} is not a valid regular expression ({error})") from error


@dataclass(kw_only=True)
class SplitSettings:
    """The source of the examples: settings that pictures and sentences share.

    Raises:
        ConfigError: there is no source, or there are two.
    """

    dataset_name: str | None = option(None, "A data set that `datasets.load_dataset` can load: a hub id or a local folder.")
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_split: str = option("train", "Split of the data set to train on.")
    validation_split: str | None = option(None, "Split to evaluate on. Default: validation, or else test.")
    validation_fraction: float | None = option(
        None, "Without examples to evaluate on: hold back this share of the training examples, chosen by the seed."
    )
    label_column: str = option("label", "Column with the labels: numbers or class names.")

    def _check_sources(self, sources: dict[str, object]) -> None:
        given = [name for name, value in sources.items() if value]
        if len(given) != 1:
            raise ConfigError(f"data: expected one of {', '.join(sources)}, found {' and '.join(given) or 'none'}")
        if self.validation_fraction is not None and self.validation_split is not None:
            raise ConfigError("validation_fraction and validation_split both set the examples to evaluate on: leave one out")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}, expected a share in (0, 1)")


@dataclass(kw_only=True)
class ImageData(SplitSettings):
    """The source of the pictures of a run, and their random augmentation."""

    train_dir: str | None = option(None, "Folder with a sub-folder of pictures for every class.")
    validation_dir: str | None = option(None, "Such a folder with the pictures to evaluate on.")
    image_column: str = option("image", "Column of the data set that holds the pictures.")
    random_resized_crop: bool = option(False, "Train on random crops of the pictures (at least half of the area).")
    random_flip: bool = option(False, "Flip training pictures horizontally at random.")

    def __post_init__(self):
        self._check_sources({"dataset_name": self.dataset_name, "train_dir": self.train_dir})
        if self.validation_dir and not self.train_dir:
            raise ConfigError("validation_dir needs train_dir: a data set has a validation_split instead")

    @property
    def name(self) -> str:
        """The name of these data in tables."""
        return self.dataset_name or self.train_dir


@dataclass(kw_only=True)
class TextData(SplitSettings):
    """The source of the sentences of a run: a GLUE task, another data set or files."""

    task_name: str | None = option(
        None, f"GLUE task, which sets columns and metric: {', '.join(GLUE_TASKS)}. Without files it is downloaded from the hub."
    )
    train_file: str | None = option(None, "CSV, TSV, JSON or JSON-lines file with the examples to train on.")
    validation_file: list[str] | None = option(None, "Such files with the examples to evaluate on; each is reported separately.")
    text_column: str | None = option(None, "Column with the sentences. Default: that of the task, or 'text'.")
    text_pair_column: str | None = option(None, "Column with the second sentences. Default: that of the task, or none.")
    max_length: int | None = option(None, "Cut inputs to this many tokens. Default: as many as the model takes, at most 512.")
    regression: bool = option(False, "The labels are numbers to predict (as in STS-B), not classes.")

    def __post_init__(self):
        if self.task_name is not None and self.task_name not in GLUE_TASKS:
            raise ConfigError(f"task_name is {self.task_name!r}, expected one of the GLUE tasks {', '.join(GLUE_TASKS)}")
        if self.task_name and not self.dataset_name and not self.train_file:
            self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name
        self._check_sources({"dataset_name": self.dataset_name, "train_file": self.train_file})
        if self.validation_file and not self.train_file:
            raise ConfigError("validation_file needs train_file: a data set has a validation_split instead")
        if self.max_length is not None and self.max_length < 4:
            raise ConfigError(f"max_length is {self.max_length}, expected at least 4 tokens")

    @property
    def name(self) -> str:
        """The name of these data in tables."""
        return self.task_name or self.dataset_name or self.train_file


Data = ImageData | TextData


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments of transformers with the paper's settings as defaults: batch 32, AdamW, linear schedule, warm-up 0.08.

    Raises:
        ConfigError: transformers refuses a value.
    """

    output_dir: str = option("cersa-classifier", "Folder for the result and the checkpoints.")
    per_device_train_batch_size: int = option(32, "Examples per step and process.")
    per_device_eval_batch_size: int = option(64, "Examples per batch of an evaluation.")
    learning_rate: float = option(2e-4, "Learning rate of everything but the classifier; the best value depends on the method.")
    warmup_steps: float = option(0.08, "Warm-up: a number of steps, or, if below 1, a share of all steps.")
    logging_steps: float = option(50, "Report the loss every N steps.")
    report_to: str = option("none", "Also log to: tensorboard, wandb, ...")
    dataloader_pin_memory: bool = option(torch.cuda.is_available(), "Keep batches in pinned memory, which a GPU reads faster.")
    # This package chooses the columns and decodes the pictures itself.
    remove_unused_columns: bool = option(False, "Do not change.")
    # No buffer changes in training: the first process sends the frozen bases once, after they have been computed.
    ddp_broadcast_buffers: bool | None = option(False, "Send buffers from the first process at every step.")
    # With this filter, transformers leaves NaN out of the loss that it reports.
    logging_nan_inf_filter: bool = option(False, "Report the last finite loss instead of NaN.")
    # If this is not set, transformers refuses bfloat16 on a machine that has only a CPU.
    use_cpu: bool = option(
        not torch.accelerator.is_available() and not is_torch_xla_available(), "Train on the CPU. Default: if there is no GPU."
    )

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(one_line(error, 1000)) from error
