"""Files of a run as they may be published: without the folders of the machine that it ran on."""

import copy
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file, save

from cersa_diffusion.adapter_file import read_adapter_file, write_adapter_file
from cersa_diffusion.methods import CERSA_METHODS
from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.result import TrainResult

# Settings that may name a folder.
PATH_SETTINGS = (
    "pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "dataset_name", "output_dir", "logging_dir",
    "resume_from_checkpoint",
)  # fmt: skip
# Kinds of files in a saved pipeline.
PIPELINE_SUFFIXES = {".json", ".model", ".safetensors", ".txt"}


def is_local(name: str) -> bool:
    """Whether this is a path, and no id on the hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


def public_name(name: str) -> str:
    """An id on the hub as it is, of a path its last part."""
    return Path(name).absolute().name if is_local(name) else name


def public_settings(config: DreamBoothConfig) -> DreamBoothConfig:
    """The settings with `public_name` in place of every path.

    Args:
        config: the settings of the run; they are not changed.
    """
    # Not dataclasses.replace: it would check the settings, and these folders need not be here.
    public = copy.copy(config)
    for name in PATH_SETTINGS:
        value = getattr(config, name)
        setattr(public, name, value and public_name(value))
    return public


def public_result(result: TrainResult) -> str:
    """The result as JSON, with paths that start from its own folder.

    Args:
        result: of the run.
    """
    paths = {"output_dir": ".", "weights_path": _inside(result).as_posix()}
    return json.dumps(asdict(result) | paths, indent=2) + "\n"


def public_weights(result: TrainResult) -> dict[str, Path | bytes]:
    """The files of the trained weights: name in the folder of the run -> the file, or its content where it names a folder.

    Args:
        result: of the run.
    """
    path = Path(result.weights_path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in PIPELINE_SUFFIXES]
        return {file.relative_to(result.output_dir).as_posix(): _without_source(file) for file in files}
    return {_inside(result).as_posix(): _public_cersa(path) if result.method in CERSA_METHODS else _public_lora(path)}


def _inside(result: TrainResult) -> Path:
    return Path(result.weights_path).relative_to(result.output_dir)


def _without_source(file: Path) -> Path | bytes:
    """The file, or the content of a model's settings without the folder that the model was loaded from."""
    if file.suffix != ".json":
        return file
    settings = json.loads(file.read_text())
    sources = _public_sources(settings)
    return (json.dumps(settings | sources, indent=2) + "\n").encode() if sources else file


def _public_sources(settings: dict) -> dict[str, str]:
    """The settings that say what a model was loaded from, with `public_name`."""
    return {key: public_name(value) for key, value in settings.items() if key.endswith("name_or_path") and value}


def _public_cersa(path: Path) -> Path | bytes:
    """The file, or its content with the folder's name in place of the path of its base."""
    adapter = read_adapter_file(path)
    base = adapter.base_model.get("name_or_path")
    if not base or not is_local(base):
        return path
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / path.name
        write_adapter_file(replace(adapter, base_model=adapter.base_model | {"name_or_path": public_name(base)}), copied)
        return copied.read_bytes()


def _public_lora(path: Path) -> Path | bytes:
    """The file, or its content with the base's name in place of the path that peft notes for text encoders."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    settings = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    sources = _public_sources(settings)
    if not sources:
        return path
    text = json.dumps(settings | sources, indent=2, sort_keys=True)
    return save(load_file(path), metadata | {LORA_ADAPTER_METADATA_KEY: text})
