"""LoRA on the models of a pipeline, through the functions of peft alone, and the files it is kept in.

The methods that diffusers and transformers have for this (`add_adapter`, `load_adapter`) end in the same functions, but refuse
versions of peft that their own release did not expect. The files are those of `pipe.save_lora_weights`, with the settings in
them, and `pipe.load_lora_weights` reads them.
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
    """Puts an untrained LoRA on a model and makes it the active one.

    Args:
        model: of diffusers or transformers; changed in place.
        config: rank and layers of the LoRA.
        adapter_name: its name.
    """
    inject_adapter_in_model(config, model, adapter_name)
    _mark(model)


def _mark(model: nn.Module) -> None:
    # Both libraries look at this when they unload a LoRA, save a model or switch on gradient checkpointing.
    model._hf_peft_config_loaded = True


def save_lora(path: Path, weights: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Mapping]) -> None:
    """Writes the LoRA of the models of a pipeline into one file.

    The names of the tensors are those of peft: from the names that diffusers had before, its loader drops every attention layer
    without a word once there is a LoRA on other linear layers, too.

    Args:
        path: the file; its folder exists.
        weights: component -> name in the model -> tensor.
        settings: component -> `LoraConfig.to_dict()`, without which a lora_alpha other than the rank would be lost.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"{component}.{name}": tensor for component, part in weights.items() for name, tensor in part.items()}
    noted = {f"{component}.{name}": value for component, part in settings.items() for name, value in part.items()}
    # peft keeps the names of the layers in a set.
    text = json.dumps(noted, indent=2, sort_keys=True, default=sorted)
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors_bytes(tensors, {"format": "pt", _SETTINGS: text}))


def load_lora(pipeline: DiffusionPipeline, path: Path, adapter_name: str | None = None) -> None:
    """Puts a LoRA file on a pipeline and makes it the active one; diffusers unloads, weights and fuses it like any other.

    Files with the names and settings of peft, which `save_lora` and `export_lora` write, go through peft; the loader of diffusers
    gets those of other programs.

    Args:
        pipeline: changed in place; its models have no offloading hooks. Where the file does not fit, it draws as before.
        path: the file.
        adapter_name: a new name; the first free one of default_0, default_1, ... when left out.

    Raises:
        ConfigError: no such file, the name is taken, or diffusers cannot load the file of another program.
        AdapterFormatError: the file is damaged.
        BaseMismatchError: the file holds tensors that this pipeline has no place for, or lacks some.
    """
    weights, settings = _read(path)
    taken = {name for names in pipeline.get_list_adapters().values() for name in names}
    name = adapter_name or next(name for name in (f"default_{i}" for i in range(len(taken) + 1)) if name not in taken)
    if name in taken:
        raise ConfigError(f"{path}: the pipeline has a LoRA named {name!r} already, expected another adapter_name")
    if settings is None:
        _load_by_diffusers(pipeline, path, name)
        return
    models = {component: pipeline.components.get(component) for component in weights}
    absent = [key for component, model in models.items() if not isinstance(model, nn.Module) for key in weights[component]]
    if absent:
        raise BaseMismatchError(f"{path}: this {type(pipeline).__name__} has no models for {_some(absent)}")
    configs = {component: _config(path, component, settings) for component in models}
    try:
        for component, model in models.items():
            _load_into(model, component, configs[component], weights[component], name)
    except ValueError as error:
        for model in models.values():
            delete_adapter_layers(model, name)
        reason = one_line(error, 500)
        raise BaseMismatchError(f"{path} does not fit this {type(pipeline).__name__}: {reason}") from error


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict] | None]:
    """The tensors and the settings of a file by component; None for the settings where the file is not one of peft."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, expected a LoRA")
    weights, settings = defaultdict(dict), defaultdict(dict)
    try:
        with safe_open(path, "pt") as file:
            noted = json.loads((file.metadata() or {}).get(_SETTINGS, "null"))
            keys = list(file.keys())
            if noted is None or not any(".lora_A." in key for key in keys):
                return {}, None
            for key in keys:
                weights[key.partition(".")[0]][key] = file.get_tensor(key)
        for key, value in noted.items():
            component, _, name = key.partition(".")
            settings[component][name] = value
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise AdapterFormatError(f"{path}: not a readable LoRA ({error}): download or train it again") from error
    return weights, dict(settings)


def _config(path: Path, component: str, settings: dict[str, dict]) -> LoraConfig:
    try:
        return LoraConfig.from_peft_type(**settings[component] | {"inference_mode": True})
    except (TypeError, ValueError, KeyError) as error:
        raise AdapterFormatError(f"{path}: no readable LoRA settings for {component} ({error}): train it again") from error


def _load_into(model: nn.Module, component: str, config: LoraConfig, weights: dict[str, Tensor], adapter_name: str) -> None:
    placed = {_name_in(model, key.removeprefix(f"{component}.")): tensor for key, tensor in weights.items()}
    _mark(model)
    try:
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True, state_dict=placed)
        result = set_peft_model_state_dict(model, placed, adapter_name, low_cpu_mem_usage=True)
    except RuntimeError as error:
        # Tensors of other shapes.
        raise BaseMismatchError(str(error)) from error
    lacking = [key for key in result.missing_keys if ".lora_" in key and f".{adapter_name}." in key]
    if result.unexpected_keys:
        raise BaseMismatchError(f"{component} has no place for {_some(result.unexpected_keys)}")
    if lacking:
        raise BaseMismatchError(f"the file has no {_some(lacking)} for {component}")


def _name_in(model: nn.Module, key: str) -> str:
    """The name that peft reads for this model's version of a layer."""
    layer, _, kind = key.rpartition(".lora_")
    if not hasattr(model, "text_model"):
        # transformers has dropped this prefix from some text encoders.
        layer = layer.removeprefix("text_model.")
    # Files have this ending for the loader of transformers, see DoraMethod.
    kind = kind.replace("magnitude_vector.weight", "magnitude_vector")
    return f"{layer}.lora_{kind}"


def _load_by_diffusers(pipeline: DiffusionPipeline, path: Path, adapter_name: str) -> None:
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: diffusers cannot load this LoRA ({reason})") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
