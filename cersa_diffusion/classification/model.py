"""Loads the pre-trained model with a classifier on top, and applies the fine-tuning method to it."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import logging

from cersa_diffusion.classification.settings import ClassifierSettings
from cersa_diffusion.classification.targets import check_outside_head, target_pattern
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import NEITHER, is_hub_id
from cersa_diffusion.layers.model import LONE_COMPONENT
from cersa_diffusion.methods.base import Method
from cersa_diffusion.methods.table import make_method
from cersa_diffusion.text import one_line


@dataclass(frozen=True)
class Kind:
    """A kind of input: the classes of transformers that load the model and the processor of its inputs."""

    model: type
    processor: type


KINDS = {
    "image": Kind(AutoModelForImageClassification, AutoImageProcessor),
    "text": Kind(AutoModelForSequenceClassification, AutoTokenizer),
}


@dataclass
class Classifier:
    """A model in training.

    Attributes:
        kind: key in `KINDS`.
        model: the model, prepared by the method.
        processor: the image processor or tokenizer of the model.
        head: names of the modules that every method trains: the classifier, and a pooler that the checkpoint has no weights for.
        settings: the model and the method.
        method: the method that prepared the model.
        description: one line for the user on what the method changed.
    """

    kind: str
    model: PreTrainedModel
    processor: object
    head: list[str]
    settings: ClassifierSettings
    method: Method
    description: str


def _tensors_of(model: nn.Module, module: str) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items()}


def load_processor(kind: str, settings: ClassifierSettings):
    """Loads the image processor or tokenizer of the pre-trained model.

    Raises:
        ConfigError: the folder or model does not exist, or it has no processor for this kind of input.
    """
    path = settings.model_name_or_path
    if not os.path.isdir(path) and not is_hub_id(path, owner=False):
        raise ConfigError(f"model {path}: {NEITHER}")
    try:
        return KINDS[kind].processor.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path}: no {kind} processor can be loaded ({one_line(error)})") from error


def load_config(settings: ClassifierSettings, label_names: list[str] | None) -> PreTrainedConfig:
    """Loads the configuration of the model for these classes (None: a regression), with the dropouts of the settings.

    Raises:
        ConfigError: the configuration cannot be loaded, or the architecture has no such dropout.
    """
    path = settings.model_name_or_path
    labels = {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    try:
        config = AutoConfig.from_pretrained(path, revision=settings.revision, **labels)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: its configuration cannot be loaded ({one_line(error)})") from error
    # The configuration of DeBERTa has its `cls_dropout` only if it was set before.
    classifier_dropout = "cls_dropout" if config.model_type in ("deberta", "deberta-v2") else "classifier_dropout"
    for option, name in {"attention_dropout": "attention_probs_dropout_prob", "classifier_dropout": classifier_dropout}.items():
        value = getattr(settings, option)
        if value is not None and not hasattr(config, name) and name != "cls_dropout":
            raise ConfigError(f"{option}: a {config.model_type!r} model has no such dropout: leave it out")
        if value is not None:
            setattr(config, name, value)
    return config


def load_base(
    kind: str, name_or_path: str, config: PreTrainedConfig, *, revision: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Loads the pre-trained model with a classifier for the classes of the configuration.

    Returns:
        The model, and the names of the modules of its head.

    Raises:
        ConfigError: the folder or model does not exist or holds only pickled weights, its checkpoint lacks weights outside the
            head, or the architecture has no classifier for this kind of input.
    """
    verbosity = logging.get_verbosity()
    try:
        # Silences the report of new weights: the classifier is always new.
        logging.set_verbosity_error()
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_safetensors": True}
        model, loading = KINDS[kind].model.from_pretrained(name_or_path, config=config, revision=revision, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name_or_path}: cannot be loaded as a classifier ({one_line(error)}); "
            "only safetensors files are read, no pickles (pytorch_model.bin)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    children = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    classifier = [name for name, child in children.items() if next(child.parameters(), None) is not None]
    new_modules = {name.rpartition(".")[0] for name in loading["missing_keys"]}
    missing = sorted(name for name in new_modules if name.split(".")[0] not in classifier)
    # The checkpoints of some models hold no pooler: it starts at random and is trained with the classifier.
    poolers = [name for name in missing if "pooler" in name.split(".")]
    others = [name for name in missing if name not in poolers]
    if others:
        examples = ", ".join(others[:3])
        raise ConfigError(f"model {name_or_path}: the checkpoint has no weights for {len(others)} modules, e.g. {examples}")
    return model, [*classifier, *poolers]


def load_for_training(
    kind: str,
    settings: ClassifierSettings,
    processor,
    config: PreTrainedConfig,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
) -> Classifier:
    """Loads the model and applies the method; all random numbers depend on the seed only.

    Args:
        kind: key in `KINDS`.
        settings: the model and the method.
        processor: what `load_processor` returned.
        config: what `load_config` returned.
        seed: seed of the new classifier and of the method.
        compute_dtype: dtype of the frozen weights.

    Raises:
        ConfigError: the model cannot be loaded, or the method cannot be applied to the target layers.
    """
    set_seed(seed)
    model, head = load_base(kind, settings.model_name_or_path, config, revision=settings.revision, dtype=torch.float32)
    all_parameters = settings.method == "full" and settings.target_modules is None
    targets = None if all_parameters else target_pattern(config.model_type, settings.target_modules)
    if targets is not None:
        check_outside_head(model, targets, head)
    # Seeded again: the initialisation of the method must not depend on how many random numbers the head used.
    set_seed(seed)
    method = make_method(settings, {LONE_COMPONENT: targets})
    also_trained = {f"{LONE_COMPONENT}.{name}" for module in head for name in _tensors_of(model, module)}
    method.plan({LONE_COMPONENT: model}, compute_dtype, also_trained=also_trained)
    description = method.prepare(LONE_COMPONENT, model)
    for module in head:
        for tensor in _tensors_of(model, module).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
    if compute_dtype != torch.float32:
        method.cast_frozen(model, compute_dtype)
    return Classifier(kind, model, processor, head, settings, method, description)
