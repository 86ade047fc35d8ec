"""LoRA on the models of a pipeline, with functions of peft only, and the LoRA files.

The methods of diffusers and transformers (`add_adapter`, `load_adapter`) call the same functions, but refuse versions of peft
that their release does not know. The files have the format of `pipe.save_lora_weights`, including the settings, and
`pipe.load_lora_weights` reads them.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import delete_adapter_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.files import atomic_write, safetensors_bytes
from cersa_diffusion.text import one_line

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
_SETTINGS = "lora_adapter_metadata"


def add_lora(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> None:
    """Adds an untrained LoRA to a model of diffusers or transformers, in place, and activates it."""
    inject_adapter_in_model(config, model, adapter_name)
    _mark_as_adapted(model)


def _mark_as_adapted(model: nn.Module) -> None:
    # Both libraries read this when they unload a LoRA, save a model or enable gradient checkpointing.
    model._hf_peft_config_loaded = True


def save_lora(path: Path, weights: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Mapping]) -> None:
    """Writes the LoRA of the models of a pipeline into one file.

    The tensors have peft's names: with the older names of diffusers, its loader ignores all attention layers without a warning
    if other linear layers have a LoRA, too.

    Args:
        path: the file, in an existing folder.
        weights: component -> name in the model -> tensor.
        settings: component -> `LoraConfig.to_dict()`; they preserve a lora_alpha that is not the rank.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"{component}.{name}": tensor for component, named in weights.items() for name, tensor in named.items()}
    metadata = {f"{component}.{name}": value for component, named in settings.items() for name, value in named.items()}
    # peft keeps the names of the layers in a set, which JSON cannot represent.
    text = json.dumps(metadata, indent=2, sort_keys=True, default=sorted)
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors_bytes(tensors, {"format": "pt", _SETTINGS: text}))


def load_lora(pipeline: DiffusionPipeline, path: Path, adapter_name: str | None = None) -> None:
    """Loads a LoRA file into a pipeline and activates it; the methods of diffusers can then unload, weight and fuse it.

    Files with peft's names and settings, which `save_lora` and `export_lora` write, are loaded with peft. Files of other programs
    are loaded by diffusers.

    Args:
        pipeline: changed in place, without offloading hooks. If the file does not fit, the outputs of the pipeline do not change.
        path: the file.
        adapter_name: a new name; default: the first unused name of default_0, default_1, ...

    Raises:
        ConfigError: the file does not exist, the name is in use, or diffusers cannot load the file of another program.
        AdapterFormatError: the file is damaged.
        BaseMismatchError: the file has tensors that do not fit this pipeline, or lacks tensors.
    """
    weights, settings = _read(path)
    taken = {name for names in pipeline.get_list_adapters().values() for name in names}
    name = adapter_name or next(name for name in (f"default_{i}" for i in range(len(taken) + 1)) if name not in taken)
    if name in taken:
        raise ConfigError(f"{path}: the pipeline already has a LoRA named {name!r}, choose another adapter_name")
    if settings is None:
        _load_by_diffusers(pipeline, path, name)
        return
    models = {component: pipeline.components.get(component) for component in weights}
    absent = [key for component, model in models.items() if not isinstance(model, nn.Module) for key in weights[component]]
    if absent:
        raise BaseMismatchError(f"{path}: this {type(pipeline).__name__} has no models for {_first_names(absent)}")
    configs = {component: _config(path, component, settings) for component in models}
    try:
        for component, model in models.items():
            _load_into(model, component, configs[component], weights[component], name)
    except ValueError as error:
        for model in models.values():
            delete_adapter_layers(model, name)
        raise BaseMismatchError(f"{path} does not fit this {type(pipeline).__name__}: {one_line(error, 500)}") from error


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict] | None]:
    """The tensors and the settings of a file by component; the settings are None if the file is not in peft's format."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, expected a LoRA")
    weights, settings = defaultdict(dict), defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_SETTINGS, "null"))
            keys = list(file.keys())
            if metadata is None or not any(".lora_A." in key for key in keys):
                return {}, None
            for key in keys:
                weights[key.partition(".")[0]][key] = file.get_tensor(key)
        for key, value in metadata.items():
            component, _, name = key.partition(".")
            settings[component][name] = value
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise AdapterFormatError(f"{path} is not a readable LoRA ({error}): download or train it again") from error
    return weights, dict(settings)


def _config(path: Path, component: str, settings: dict[str, dict]) -> LoraConfig:
    try:
        return LoraConfig.from_peft_type(**settings[component] | {"inference_mode": True})
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterFormatError(f"{path} has no readable LoRA settings for {component} ({error}): train it again") from error


def _load_into(model: nn.Module, component: str, config: LoraConfig, weights: dict[str, Tensor], adapter_name: str) -> None:
    state = {_name_in_model(model, key.removeprefix(f"{component}.")): tensor for key, tensor in weights.items()}
    _mark_as_adapted(model)
    try:
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True, state_dict=state)
        result = set_peft_model_state_dict(model, state, adapter_name, low_cpu_mem_usage=True)
    except RuntimeError as error:
        # The shapes of tensors differ.
        raise BaseMismatchError(str(error)) from error
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{adapter_name}." in key]
    if result.unexpected_keys:
        raise BaseMismatchError(f"{component} has no layers for {_first_names(result.unexpected_keys)}")
    if missing:
        raise BaseMismatchError(f"the file lacks {_first_names(missing)} for {component}")


def _name_in_model(model: nn.Module, key: str) -> str:
    """The name that peft expects for a tensor of this model."""
    layer, _, kind = key.rpartition(".lora_")
    if not hasattr(model, "text_model"):
        # Newer versions of transformers do not have this prefix in some text encoders.
        layer = layer.removeprefix("text_model.")
    # Files have this ending for the loader of transformers (see DoraMethod).
    kind = kind.replace("magnitude_vector.weight", "magnitude_vector")
    return f"{layer}.lora_{kind}"


def _load_by_diffusers(pipeline: DiffusionPipeline, path: Path, adapter_name: str) -> None:
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path}: diffusers cannot load this LoRA ({one_line(error)})") from error


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
