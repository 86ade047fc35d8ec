"""`load_cersa_weights` and `unload_cersa_weights` on every diffusers pipeline."""

import os
from pathlib import Path

from torch import nn

from cersa_diffusion.adapter import load_adapter
from cersa_diffusion.adapter_file import DEFAULT_FILE_NAME
from cersa_diffusion.errors import AdapterFormatError, ConfigError
from cersa_diffusion.inject import cersa_layers, restore_base

COMPONENT_NAMES = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def pipeline_components(pipeline) -> dict[str, nn.Module]:
    """The models of a diffusers pipeline that an adapter can change, by name.

    Raises:
        ConfigError: the pipeline has neither a `unet` nor a `transformer`.
    """
    found = {name: getattr(pipeline, name, None) for name in COMPONENT_NAMES}
    components = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not {"unet", "transformer"} & set(components):
        raise ConfigError(f"{type(pipeline).__name__} has neither a unet nor a transformer to adapt")
    return components


def load_cersa_weights(
    self,
    pretrained_model_name_or_path: str | os.PathLike,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    strength: float = 1.0,
    **hub_kwargs,
) -> None:
    """Loads a CERSA adapter into this pipeline; nothing is touched when the file does not fit.

    Args:
        pretrained_model_name_or_path: a file, a folder that holds one, or a model id on the hub.
        weight_name: file name inside the folder or repository; default `pytorch_cersa_weights.safetensors`.
        adapter_name: name for the adapter; default "default_0", "default_1", ...
        strength: factor of the adapter; 1 as trained, 0 the truncated base.
        hub_kwargs: passed to `huggingface_hub.hf_hub_download` (revision, token, cache_dir, ...).

    Raises:
        AdapterFormatError, BaseMismatchError, ConfigError, NonFiniteError: see `cersa_diffusion.load_adapter`.
    """
    path = find_adapter_file(pretrained_model_name_or_path, weight_name, **hub_kwargs)
    components = pipeline_components(self)
    loaded = {name for module in components.values() for layer in cersa_layers(module).values() for name in layer.cores}
    if adapter_name is None:
        adapter_name = next(name for name in (f"default_{i}" for i in range(len(loaded) + 1)) if name not in loaded)
    elif adapter_name in loaded:
        raise ConfigError(f"adapter {adapter_name!r} is already loaded: choose another adapter_name or unload it")
    show_progress = not self._progress_bar_config.get("disable", False) if hasattr(self, "_progress_bar_config") else True
    load_adapter(components, path, adapter_name=adapter_name, strength=strength, show_progress=show_progress)


def unload_cersa_weights(self) -> None:
    """Removes all CERSA adapters and puts the base weights back bit for bit.

    Raises:
        ConfigError: a base weight was not kept (the model was injected for training); the pipeline is left as it is.
    """
    for module in pipeline_components(self).values():
        restore_base(module)


def find_adapter_file(name_or_path: str | os.PathLike, weight_name: str | None = None, **hub_kwargs) -> Path:
    """Turns a file, a folder or a hub id into the path of an adapter file.

    Raises:
        AdapterFormatError: there is no such file, or the hub does not have it.
    """
    path, file_name = Path(name_or_path), weight_name or DEFAULT_FILE_NAME
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file_name).is_file():
            found = sorted(p.name for p in path.glob("*.safetensors"))
            raise AdapterFormatError(f"{path}: no {file_name} in this folder; it holds {found}: pass weight_name=")
        return path / file_name
    if str(name_or_path).count("/") != 1 or path.suffix:
        raise AdapterFormatError(f"{name_or_path}: no such file or folder, and not the form of a hub id (owner/name)")
    # Imported here: only hub ids need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name_or_path), file_name, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterFormatError(f"{name_or_path}: no such file or folder, and not to be had from the hub ({reason})") from error


def attach(pipeline_class: type) -> None:
    """Gives the methods of this module to a pipeline class (a subclass would break saving and reloading)."""
    pipeline_class.load_cersa_weights = load_cersa_weights
    pipeline_class.unload_cersa_weights = unload_cersa_weights
