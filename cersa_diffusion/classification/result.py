"""The result of a run: the adapter and the classifier, in the format that the method's users have a loader for."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.adapters.save import save_adapter
from cersa_diffusion.classification.model import KINDS, Classifier, load_base
from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.files import staged_folder
from cersa_diffusion.methods.settings import CERSA_METHODS, LORA_METHODS

DESCRIPTION_FILE = "cersa_classifier.json"
HEAD_FILE = "head.safetensors"
LORA_FILE = "adapter_model.safetensors"


def save_classifier(classifier: Classifier, folder: Path, facts: dict) -> Path:
    """Writes the result of a method, with the configuration and the processor, so that `load_classifier` opens it.

    CERSA, SVFit, SVFT: an adapter file and the weights of the head. LoRA, PiSSA, DoRA: a folder of peft, the head in it. Full
    fine-tuning: a model folder.

    Args:
        classifier: a prepared model.
        folder: where to; made if need be.
        facts: of the training run, for the adapter file's header.

    Returns:
        The file with the trained weights.

    Raises:
        NonFiniteError: a core holds NaN or infinity; nothing is written.
        OSError: the disk is full; nothing is left half-written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder) as staging:
        return folder / _write_result(classifier, staging, facts).relative_to(staging)


def _write_result(classifier: Classifier, folder: Path, facts: dict) -> Path:
    settings, model = classifier.settings, classifier.model
    base = {"name_or_path": settings.model_name_or_path, "revision": settings.revision}
    if settings.method in CERSA_METHODS:
        path = folder / DEFAULT_FILE_NAME
        config = {"model": classifier.adaptation.config.to_dict()}
        save_adapter(model, path, config=config, base_model=base, training=facts)
        _write(folder / HEAD_FILE, classifier.head_state())
    elif settings.method in LORA_METHODS:
        path = _save_lora(classifier, folder)
    else:
        model.save_pretrained(folder)
        path = folder / "model.safetensors"
    model.config.save_pretrained(folder)
    classifier.processor.save_pretrained(folder)
    description = {"kind": classifier.kind, "method": settings.method, "base_model": base}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return path


def _save_lora(classifier: Classifier, folder: Path) -> Path:
    """As peft's own save_pretrained does for a PeftModel; the base's own change by PiSSA is folded into the adapter."""
    model, adaptation = classifier.model, classifier.adaptation
    own = adaptation.saved_settings()
    config = replace(model.peft_config["default"], **own, modules_to_save=classifier.head, inference_mode=True)
    config.base_model_name_or_path = classifier.settings.model_name_or_path
    config.revision = classifier.settings.revision
    config.save_pretrained(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adaptation.weights(model).items()}
    state = {f"base_model.model.{name}": tensor for name, tensor in (weights | classifier.head_state()).items()}
    _write(folder / LORA_FILE, state)
    return folder / LORA_FILE


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # safetensors' own save_file makes files that only their owner can read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def load_classifier(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel | PeftModel, object]:
    """Opens the result of a run, each method's by its own loader.

    Args:
        folder: `result` in the folder of the run.
        dtype: of the frozen weights.

    Returns:
        The model in eval mode, and its image processor or tokenizer.

    Raises:
        ConfigError: not such a folder, or the base model is not to be had.
        AdapterFormatError: the adapter file is damaged.
        BaseMismatchError: the base model is not the one of the training.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text())
        kind, method, base = description["kind"], description["method"], description["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: no result of a classification run ({DESCRIPTION_FILE} is missing or damaged)") from error
    processor = KINDS[kind].processor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    if method == "full":
        return KINDS[kind].model.from_pretrained(folder, config=config, dtype=dtype).eval(), processor
    model, _ = load_base(kind, base["name_or_path"], config, revision=base["revision"], dtype=dtype)
    if method in LORA_METHODS:
        return _load_lora(model, folder).eval(), processor
    load_adapter(model, folder / DEFAULT_FILE_NAME, keep_base=False)
    load_head(model, folder / HEAD_FILE)
    return model.eval(), processor


def _load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    path = folder / LORA_FILE
    try:
        stored = load_file(path)
        adapted = PeftModel.from_pretrained(model, folder)
    except (OSError, SafetensorError) as error:
        raise AdapterFormatError(f"{path}: not a readable LoRA ({error}): train it again") from error
    except (RuntimeError, KeyError) as error:
        raise BaseMismatchError(f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:500]}") from error
    # peft only warns of layers that the file says nothing about, and passes over those that the model does not have. Without the
    # option it would look for the base's configuration, on the hub if need be.
    different = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() ^ stored.keys())
    if different:
        raise BaseMismatchError(f"{path}: {different[0]} is in the file or in {type(model).__name__}, expected in both")
    return adapted


def load_head(model: PreTrainedModel, path: str | Path) -> None:
    """Puts the saved weights of a classifier in a model of the same classes.

    Args:
        model: changed in place, in the dtype that it has.
        path: `head.safetensors` of a result.

    Raises:
        ConfigError: no such file, or the model's classifier is another one; the model is left as it is.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file, expected the weights of a classifier")
    head, own = load_file(path), model.state_dict()
    wrong = [name for name, tensor in head.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0]} of shape {tuple(head[wrong[0]].shape)} does not fit this model: load the base with as many "
            "labels as the classifier was trained for"
        )
    model.load_state_dict(head, strict=False)
