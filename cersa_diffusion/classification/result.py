"""The result of a run: the adapter and the classifier, in the format that the method's users have a loader for."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from cersa_diffusion.classification.model import KINDS, Classifier, load_base
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import staged_folder
from cersa_diffusion.methods.base import Origin
from cersa_diffusion.methods.table import METHODS

DESCRIPTION_FILE = "cersa_classifier.json"


def save_classifier(classifier: Classifier, folder: Path, training: dict) -> Path:
    """Writes the result of a method, with the configuration and the processor, so that `load_classifier` opens it.

    CERSA, SVFit, SVFT: an adapter file and the weights of the head. LoRA, PiSSA, DoRA: a folder of peft, the head in it. Full
    fine-tuning: a model folder.

    Args:
        classifier: a prepared model.
        folder: where to; made if need be.
        training: facts of the training run, for the adapter file's header.

    Returns:
        The file with the trained weights.

    Raises:
        NonFiniteError: a core holds NaN or infinity; nothing is written.
        OSError: the disk is full; nothing is left half-written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder) as staging:
        return folder / _write_result(classifier, staging, training).relative_to(staging)


def _write_result(classifier: Classifier, folder: Path, training: dict) -> Path:
    settings, model = classifier.settings, classifier.model
    origin = Origin(settings.model_name_or_path, settings.revision)
    path = classifier.method.save_model(model, folder, classifier.head, origin, training)
    model.config.save_pretrained(folder)
    classifier.processor.save_pretrained(folder)
    description = {"kind": classifier.kind, "method": settings.method, "base_model": origin.to_dict()}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
    return path


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
    if METHODS[method].needs_base:
        model, _ = load_base(kind, base["name_or_path"], config, revision=base["revision"], dtype=dtype)
    else:
        model = KINDS[kind].model.from_pretrained(folder, config=config, dtype=dtype)
    return METHODS[method].open_model(model, folder).eval(), processor
