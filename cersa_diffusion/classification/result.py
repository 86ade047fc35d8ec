"""Saves and opens the result of a run: the adapter and the classifier, in the usual file format of the method."""

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
    """Writes the trained weights, the configuration and the processor, so that `load_classifier` can open them.

    CERSA, SVFit, SVFT: an adapter file and the weights of the head. LoRA, PiSSA, DoRA: a folder of peft that includes the head.
    Full fine-tuning: a model folder.

    Args:
        classifier: a prepared model.
        folder: the folder to write to; it is created if it does not exist.
        training: facts about the training run, for the header of the adapter file.

    Returns:
        The file with the trained weights.

    Raises:
        NonFiniteError: a core holds NaN or infinity; nothing is written.
        OSError: the disk is full; no partial files remain.
    """
    settings, model = classifier.settings, classifier.model
    origin = Origin(settings.model_name_or_path, settings.revision)
    description = {"kind": classifier.kind, "method": settings.method, "base_model": origin.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    with staged_folder(folder) as staging:
        path = classifier.method.save_model(model, staging, classifier.head, origin, training)
        model.config.save_pretrained(staging)
        classifier.processor.save_pretrained(staging)
        (staging / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
        return folder / path.relative_to(staging)


def load_classifier(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel | PeftModel, object]:
    """Opens the result of a run with the loader of its method.

    Args:
        folder: the folder `result` of the run.
        dtype: dtype of the frozen weights.

    Returns:
        The model in eval mode, and its image processor or tokenizer.

    Raises:
        ConfigError: the folder is not the result of a run, or the base model was not found.
        AdapterFormatError: the adapter file is damaged.
        BaseMismatchError: the base model is not the one that was trained.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text())
        kind, method, base = description["kind"], description["method"], description["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a result of a classification run ({DESCRIPTION_FILE} is missing or damaged)") from error
    processor = KINDS[kind].processor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    if METHODS[method].needs_base:
        model, _ = load_base(kind, base["name_or_path"], config, revision=base["revision"], dtype=dtype)
    else:
        model = KINDS[kind].model.from_pretrained(folder, config=config, dtype=dtype)
    return METHODS[method].open_model(model, folder).eval(), processor
