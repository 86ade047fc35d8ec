"""The pre-trained model with a classifier on top, and making a method's parameters the trained ones."""

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
    """What is classified: which class of transformers reads the model, and which one prepares its inputs."""

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
        kind: key of `KINDS`.
        model: the model, changed by the method.
        processor: its image processor or tokenizer.
        head: names of the modules that every method trains: the classifier, and what the checkpoint has no weights for.
        settings: what is trained.
        method: what was done to it.
        description: what the method did.
    """

    kind: str
    model: PreTrainedModel
    processor: object
    head: list[str]
    settings: ClassifierSettings
    method: Method
    description: str


def _tensors(model: nn.Module, module: str) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in model.get_submodule(module).state_dict(keep_vars=True).items()}


def load_processor(kind: str, settings: ClassifierSettings):
    """The image processor or tokenizer of the pre-trained model.

    Raises:
        ConfigError: no such folder or model, or none for this kind of input.
    """
    path = settings.model_name_or_path
    if not os.path.isdir(path) and not is_hub_id(path, owner=False):
        raise ConfigError(f"model {path}: {NEITHER}")
    try:
        return KINDS[kind].processor.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path}: no {kind} processor can be loaded ({one_line(error)})") from error


def load_config(settings: ClassifierSettings, label_names: list[str] | None) -> PreTrainedConfig:
    """The configuration of the model for these classes, with the dropouts of the settings.

    Raises:
        ConfigError: it cannot be loaded, or the architecture has no such dropout.
    """
    path = settings.model_name_or_path
    labels = {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    try:
        config = AutoConfig.from_pretrained(path, revision=settings.revision, **labels)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: its configuration cannot be loaded ({one_line(error)})") from error
    # DeBERTa reads a name that its configuration only has where it was set.
    of_classifier = "cls_dropout" if config.model_type in ("deberta", "deberta-v2") else "classifier_dropout"
    for option, name in {"attention_dropout": "attention_probs_dropout_prob", "classifier_dropout": of_classifier}.items():
        value = getattr(settings, option)
        if value is not None and not hasattr(config, name) and name != "cls_dropout":
            raise ConfigError(f"{option}: a {config.model_type!r} model has none: leave it out")
        if value is not None:
            setattr(config, name, value)
    return config


def load_base(
    kind: str, name_or_path: str, config: PreTrainedConfig, *, revision: str | None, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """The pre-trained model with a classifier for the classes of the configuration.

    Returns:
        The model, and the names of the modules of its head.

    Raises:
        ConfigError: no such folder or model, only pickled weights in it, or the architecture has no classifier for this kind of
            input.
    """
    verbosity = logging.get_verbosity()
    try:
        # Silences the report of weights that are new: a classifier always is.
        logging.set_verbosity_error()
        model, loading = KINDS[kind].model.from_pretrained(
            name_or_path,
            config=config,
            revision=revision,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name_or_path}: cannot be loaded as a classifier ({one_line(error)}); "
            "only safetensors files are read, no pickles (pytorch_model.bin)"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    own = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
    new = {name.rpartition(".")[0] for name in loading["missing_keys"]}
    # Pre-training saves no pooler for some models: it starts at random, like the classifier it belongs to.
    poolers = sorted(name for name in new if "pooler" in name.split(".") and name.split(".")[0] not in own)
    lacking = sorted(name for name in new if name.split(".")[0] not in own and name not in poolers)
    if lacking:
        some = ", ".join(lacking[:3])
        raise ConfigError(f"model {name_or_path}: the checkpoint has no weights for {len(lacking)} modules, e.g. {some}")
    return model, [*own, *poolers]


def load_for_training(
    kind: str,
    settings: ClassifierSettings,
    processor,
    config: PreTrainedConfig,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
) -> Classifier:
    """Loads the model and applies the method; what is drawn at random depends on the seed alone.

    Args:
        kind: key of `KINDS`.
        settings: the model and the method.
        processor: what `load_processor` returned.
        config: what `load_config` returned.
        seed: of the new classifier, and of what the method draws.
        compute_dtype: what frozen weights are moved to.

    Raises:
        ConfigError: the model cannot be loaded, or the method not be applied to the target layers.
    """
    set_seed(seed)
    path = settings.model_name_or_path
    model, head = load_base(kind, path, config, revision=settings.revision, dtype=torch.float32)
    everything = settings.method == "full" and settings.target_modules is None
    targets = None if everything else target_pattern(config.model_type, settings.target_modules)
    if targets is not None:
        check_outside_head(model, targets, head)
    # Again: how much the head drew differs by architecture, and no method's start should depend on it.
    set_seed(seed)
    method = make_method(settings, {LONE_COMPONENT: targets})
    also_trained = {f"{LONE_COMPONENT}.{name}" for module in head for name in _tensors(model, module)}
    method.plan({LONE_COMPONENT: model}, compute_dtype, also_trained=also_trained)
    description = method.prepare(LONE_COMPONENT, model)
    for module in head:
        for tensor in _tensors(model, module).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
    if compute_dtype != torch.float32:
        method.cast_frozen(model, compute_dtype)
    return Classifier(kind, model, processor, head, settings, method, description)
