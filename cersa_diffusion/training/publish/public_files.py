"""The public form of a run's files: without the folders of the machine that it ran on."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

from cersa_diffusion.files import public_name, public_sources
from cersa_diffusion.training.run.result import TrainResult
from cersa_diffusion.training.settings.config import DreamBoothConfig

# Settings that may name a folder.
PATH_SETTINGS = (
    "pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "dataset_name", "output_dir", "logging_dir",
    "resume_from_checkpoint",
)  # fmt: skip
# Suffixes of the files in a saved pipeline.
PIPELINE_SUFFIXES = {".json", ".model", ".safetensors", ".txt"}


def public_settings(config: DreamBoothConfig) -> DreamBoothConfig:
    """A copy of the settings with `public_name` of every path."""
    # Not dataclasses.replace: it would check the settings, but the folders of these names need not exist.
    public = copy.copy(config)
    for name in PATH_SETTINGS:
        value = getattr(config, name)
        setattr(public, name, value and public_name(value))
    return public


def public_result(result: TrainResult) -> str:
    """The result as JSON, with paths relative to its folder."""
    paths = {"output_dir": ".", "weights_path": _relative_weights_path(result).as_posix()}
    return json.dumps(asdict(result) | paths, indent=2) + "\n"


def public_weights(result: TrainResult) -> dict[str, Path | bytes]:
    """The files of the trained weights: name in the folder of the run -> the file, or new content if the file names a folder."""
    path = Path(result.weights_path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in PIPELINE_SUFFIXES]
        return {file.relative_to(result.output_dir).as_posix(): _public_content(file) for file in files}
    # The file of an adapter or a LoRA names no folders.
    return {_relative_weights_path(result).as_posix(): path}


def _relative_weights_path(result: TrainResult) -> Path:
    return Path(result.weights_path).relative_to(result.output_dir)


def _public_content(file: Path) -> Path | bytes:
    """The file, or the settings of a model without the folder that the model was loaded from."""
    if file.suffix != ".json":
        return file
    settings = json.loads(file.read_text())
    sources = public_sources(settings)
    return (json.dumps(settings | sources, indent=2) + "\n").encode() if sources else file
