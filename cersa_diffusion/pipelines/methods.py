"""The `*_cersa_*` methods of every diffusers pipeline, with the same keyword arguments as its LoRA methods."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cersa_diffusion.adapters import compose as composition
from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME, AdapterFile, from_state_dict, read_adapter_file, to_state_dict
from cersa_diffusion.adapters.fuse import Form, check_form, check_fusable, fuse, refuse_lora_on_fused, unfuse
from cersa_diffusion.adapters.hotswap import hotswap_adapter
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.adapters.save import save_adapter
from cersa_diffusion.adapters.strengths import Strength
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.families.names import DENOISERS, TEXT_ENCODERS
from cersa_diffusion.inject import restore_base
from cersa_diffusion.layers.model import all_or_nothing, cersa_layers
from cersa_diffusion.pipelines.hub import find_adapter_file
from cersa_diffusion.pipelines.offload import without_offloading


def pipeline_components(pipeline) -> dict[str, nn.Module]:
    """The models of a diffusers pipeline that an adapter can change: name -> model.

    Raises:
        ConfigError: the pipeline has neither a `unet` nor a `transformer`.
    """
    modules = {name: getattr(pipeline, name, None) for name in (*DENOISERS, *TEXT_ENCODERS)}
    # torch.compile() wraps a model; adapters use the names of the model inside the wrapper.
    modules = {name: getattr(module, "_orig_mod", module) for name, module in modules.items()}
    components = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    if not set(DENOISERS) & set(components):
        raise ConfigError(f"{type(pipeline).__name__} has neither a unet nor a transformer that CERSA can adapt")
    return components


def load_cersa_weights(
    self,
    pretrained_model_name_or_path_or_dict: str | os.PathLike | dict,
    weight_name: str | None = None,
    adapter_name: str | None = None,
    strength: float = 1.0,
    *,
    hotswap: bool = False,
    allow_base_mismatch: bool = False,
    **hub_kwargs,
) -> None:
    """Loads a CERSA adapter into this pipeline; if it does not fit, the pipeline is not changed.

    Adapters that are already loaded stay active, and the changes of all adapters add up. See `set_cersa_adapters`.

    Args:
        pretrained_model_name_or_path_or_dict: a file, a folder that holds one, a model id on the hub, or the result of
            `cersa_state_dict` (it is not changed).
        weight_name: file name in the folder or repository; default `pytorch_cersa_weights.safetensors`, or the only
            safetensors file of a folder that has no file of that name.
        adapter_name: name of the adapter; default "default_0", "default_1", ...
        strength: factor of the adapter: 1 is the trained adapter, 0 the truncated base.
        hotswap: replace the weights of the loaded adapter `adapter_name` without new layers: a compiled model is not compiled
            again. The layers and ranks must fit into those of the loaded adapter.
        allow_base_mismatch: load with a warning if the adapter was trained on another base.
        hub_kwargs: `subfolder`, and arguments of `huggingface_hub.hf_hub_download` (revision, token, cache_dir, ...).

    Raises:
        AdapterFormatError, BaseMismatchError, ConfigError, NonFiniteError: see `cersa_diffusion.load_adapter`.
    """
    adapter = _read(pretrained_model_name_or_path_or_dict, weight_name, hub_kwargs)
    components = pipeline_components(self)
    _refuse_other_layers(components, adapter)
    adapter_name = _name_to_load(components, adapter_name, hotswap)
    settings = {
        "strength": strength,
        "show_progress": not getattr(self, "_progress_bar_config", {}).get("disable", False),
        "allow_base_mismatch": allow_base_mismatch,
    }
    with without_offloading(self), all_or_nothing(*components.values()):
        if hotswap:
            hotswap_adapter(components, adapter, adapter_name, **settings)
        else:
            load_adapter(components, adapter, adapter_name=adapter_name, **settings)
        for model in components.values():
            # The new layers of a disabled model are disabled, too.
            if not all(layer.enabled for layer in cersa_layers(model).values()):
                composition.disable_adapters(model)


def cersa_state_dict(
    pretrained_model_name_or_path_or_dict: str | os.PathLike | dict, weight_name: str | None = None, **hub_kwargs
) -> dict[str, torch.Tensor | str]:
    """Reads an adapter without loading it; the arguments are those of `load_cersa_weights`.

    Returns:
        Name -> tensor, and the header of the file (JSON) under the name "cersa".

    Raises:
        AdapterFormatError: the file cannot be found or read.
        NonFiniteError: the file holds NaN or infinity.
    """
    return to_state_dict(_read(pretrained_model_name_or_path_or_dict, weight_name, hub_kwargs))


def save_cersa_weights(
    self,
    save_directory: str | os.PathLike,
    adapter_name: str | None = None,
    weight_name: str | None = None,
    *,
    is_main_process: bool = True,
    dtype: torch.dtype = torch.float16,
    save_energy: float | None = None,
    save_bases: bool = False,
) -> None:
    """Saves one adapter of this pipeline as a file that `load_cersa_weights` reads.

    The header of a loaded adapter keeps its entries about settings, base and training.

    Args:
        save_directory: folder for the file; it is created if it does not exist.
        adapter_name: may be left out if there is only one adapter.
        weight_name: name of the file; default `pytorch_cersa_weights.safetensors`.
        is_main_process: whether to write; the other processes of a distributed run pass False.
        dtype, save_energy, save_bases: see `save_adapter`.

    Raises:
        ConfigError: the adapter does not exist, there are several adapters and no name is given, `save_directory` is a file, or
            a setting is out of range.
        NonFiniteError: the adapter holds NaN or infinity; nothing is written.
    """
    components = pipeline_components(self)
    names = _adapter_names(components)
    if adapter_name is None and len(names) != 1:
        raise ConfigError(f"the pipeline has the adapters {names}: choose with adapter_name= which one to save")
    adapter_name = adapter_name or names[0]
    _check_known(components, [adapter_name])
    if Path(save_directory).is_file():
        raise ConfigError(f"{save_directory} is a file: pass a directory, and the name of the file as weight_name=")
    if not is_main_process:
        return
    cores = (layer.cores for model in components.values() for layer in cersa_layers(model).values())
    header = next(core[adapter_name].facts for core in cores if adapter_name in core)
    source = getattr(getattr(self, "config", None), "_name_or_path", None)
    header = header or {"base_model": {"name_or_path": source} if source else {}}
    path = Path(save_directory) / (weight_name or DEFAULT_FILE_NAME)
    options = {"dtype": dtype, "save_energy": save_energy, "save_bases": save_bases}
    save_adapter(components, path, adapter_name=adapter_name, **options, **header)


def unload_cersa_weights(self) -> None:
    """Removes all CERSA adapters, also fused ones, and restores the base weights bit for bit.

    Raises:
        ConfigError: a base weight was not kept (the model was injected for training), or a LoRA was loaded on a fused layer;
            the pipeline is not changed.
    """
    components = pipeline_components(self)
    for model in components.values():
        refuse_lora_on_fused(model)
    with without_offloading(self), all_or_nothing(*components.values()):
        for model in components.values():
            restore_base(model)


def fuse_cersa(
    self,
    components: str | Sequence[str] | None = None,
    cersa_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: str | Sequence[str] | None = None,
    *,
    form: Form = "dense",
) -> None:
    """Replaces the CERSA layers by layers that compute faster; `unfuse_cersa` reverses this bit for bit.

    Args:
        components: names of the models in the pipeline; default: all models with CERSA layers.
        cersa_scale: factor of all adapters, in addition to their strengths.
        safe_fusing: refuse weights that hold NaN or infinity.
        adapter_names: the adapters to fuse; default: all active ones.
        form: "dense" for dense weights, which other libraries treat as plain layers; "factors" for two thin factors, of which
            one holds the change.

    Raises:
        ConfigError: a component has no CERSA layers or is already fused, an adapter is unknown or not active, or there is no
            such form.
        NonFiniteError: with `safe_fusing`, a weight would hold NaN or infinity. In both cases nothing is fused.
    """
    check_form(form)
    models = _chosen_models(self, components)
    if not models:
        raise ConfigError("no component has CERSA layers to fuse: load an adapter first")
    names_to_fuse = {component: list(composition.active_adapters(model)) for component, model in models.items()}
    if adapter_names is not None:
        names = _as_list(adapter_names)
        _check_known(models, names)
        present = {component: composition.adapter_names(model) for component, model in models.items()}
        names_to_fuse = {component: [name for name in names if name in present[component]] for component in models}
    elif not any(names_to_fuse.values()):
        raise ConfigError("no adapter is active: call enable_cersa() or set_cersa_adapters() first")
    for component, model in models.items():
        check_fusable(model, names_to_fuse[component])
    with without_offloading(self), all_or_nothing(*models.values()):
        for component, model in models.items():
            fuse(model, names_to_fuse[component], form=form, scale=cersa_scale, safe=safe_fusing)


def unfuse_cersa(self, components: str | Sequence[str] | None = None) -> None:
    """Reverses `fuse_cersa` bit for bit; models that are not fused stay as they are.

    Args:
        components: names of the models in the pipeline; default: all models with CERSA layers.

    Raises:
        ConfigError: a component is unknown, or a LoRA was loaded on a fused layer; nothing is changed.
    """
    models = _chosen_models(self, components)
    with without_offloading(self), all_or_nothing(*models.values()):
        for model in models.values():
            unfuse(model)


def set_cersa_adapters(
    self, adapter_names: str | Sequence[str], adapter_weights: Strength | Sequence[Strength | None] | None = None
) -> None:
    """Activates these adapters with these strengths, and deactivates all others.

    Args:
        adapter_names: one or several adapters.
        adapter_weights: one strength for all adapters, or a list with one strength for each; default 1. A strength is a number
            or a mapping by component, whose values are numbers or, for a UNet, mappings by block:
            {'text_encoder': 0.5, 'unet': {"down": 1, "mid": 0.3, "up": {"block_0": 0.6, "block_1": [0, 0.5, 1]}}}.
            Entries that are missing in a mapping are 1; a component that the pipeline lacks is ignored with a warning.

    Raises:
        ConfigError: an adapter or block is unknown, the numbers of weights and names differ, or layers are fused; nothing is
            changed.
    """
    components, names = pipeline_components(self), _as_list(adapter_names)
    weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(weights)} weights: pass one weight for all, or one for each")
    _check_known(components, names)
    present = {component: composition.adapter_names(model) for component, model in components.items()}
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, Mapping):
            adapted = [component for component in components if name in present[component]]
            ignored = [component for component in weight if component not in adapted]
            if ignored:
                text = f"strengths for {ignored} are ignored: adapter {name!r} only changes {adapted} of this pipeline"
                warnings.warn(text, stacklevel=2)
    with all_or_nothing(*components.values()):
        for component, model in components.items():
            weighted = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in present[component]]
            strengths = [weight.get(component) if isinstance(weight, Mapping) else weight for _, weight in weighted]
            composition.set_adapters(model, [name for name, _ in weighted], strengths)


def enable_cersa(self) -> None:
    """Reverses `disable_cersa`. Raises ConfigError and changes nothing if layers are fused."""
    _on_all(self, composition.enable_adapters)


def disable_cersa(self) -> None:
    """Removes all CERSA adapters from the forward pass, which then uses the truncated base; their strengths are kept.

    Raises ConfigError and changes nothing if layers are fused.
    """
    _on_all(self, composition.disable_adapters)


def delete_cersa_adapters(self, adapter_names: str | Sequence[str]) -> None:
    """Removes one or several adapters. Layers without another adapter get their base weight back if it was kept.

    Raises:
        ConfigError: an adapter is unknown, or layers are fused; nothing is changed.
    """
    components, names = pipeline_components(self), _as_list(adapter_names)
    _check_known(components, names)
    with without_offloading(self), all_or_nothing(*components.values()):
        for model in components.values():
            present = composition.adapter_names(model)
            composition.delete_adapters(model, [name for name in names if name in present])
            unused = [name for name, layer in cersa_layers(model).items() if not layer.cores and layer.base_kept]
            restore_base(model, unused)


def get_active_cersa_adapters(self) -> list[str]:
    """Names of the adapters in the forward pass; empty while adapters are disabled."""
    models = pipeline_components(self).values()
    return list(dict.fromkeys(name for model in models for name in composition.active_adapters(model)))


def get_list_cersa_adapters(self) -> dict[str, list[str]]:
    """Component -> names of its adapters, for all components with adapters."""
    names_by_component = {component: composition.adapter_names(model) for component, model in pipeline_components(self).items()}
    return {component: names for component, names in names_by_component.items() if names}


def attach(pipeline_class: type) -> None:
    """Adds the methods of this module to a pipeline class (a subclass would break saving and reloading)."""
    methods = [load_cersa_weights, save_cersa_weights, unload_cersa_weights, fuse_cersa, unfuse_cersa, set_cersa_adapters]
    methods += [enable_cersa, disable_cersa, delete_cersa_adapters, get_active_cersa_adapters, get_list_cersa_adapters]
    for method in methods:
        setattr(pipeline_class, method.__name__, method)
    pipeline_class.cersa_state_dict = staticmethod(cersa_state_dict)


def _read(source: str | os.PathLike | dict, weight_name: str | None, hub_kwargs: dict) -> AdapterFile:
    if isinstance(source, dict):
        return from_state_dict(source)
    return read_adapter_file(find_adapter_file(source, weight_name, **hub_kwargs))


def _refuse_other_layers(components: dict[str, nn.Module], adapter: AdapterFile) -> None:
    """Raises ConfigError if the adapter changes fused layers or layers with a LoRA."""
    # Imported here: peft is slow to import, and only pipelines have LoRA layers.
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = {key.replace(".text_model.", ".") for key in adapter.layers}
    for component, model in components.items():
        if any(key.startswith(f"{component}.") for key in wanted):
            composition.refuse_fused(model)
        for name, module in model.named_modules():
            key = f"{component}.{name}".replace(".text_model.", ".")
            if isinstance(module, BaseTunerLayer) and key in wanted:
                raise ConfigError(
                    f"layer {component}.{name} has a LoRA: unload the LoRA (unload_lora_weights()), load the CERSA adapter, "
                    "fuse it (fuse_cersa()), then load the LoRA again"
                )


def _name_to_load(components: dict[str, nn.Module], adapter_name: str | None, hotswap: bool) -> str:
    loaded = _adapter_names(components)
    if hotswap and adapter_name not in loaded:
        raise ConfigError(f"hotswap needs the adapter_name of a loaded adapter, found {adapter_name!r}, loaded: {loaded}")
    if adapter_name is None:
        return next(name for name in (f"default_{i}" for i in range(len(loaded) + 1)) if name not in loaded)
    if adapter_name in loaded and not hotswap:
        raise ConfigError(f"adapter {adapter_name!r} is already loaded: choose another adapter_name, set hotswap, or unload it")
    return adapter_name


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _adapter_names(components: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(name for model in components.values() for name in composition.adapter_names(model)))


def _check_known(components: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    known = _adapter_names(components)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"this pipeline has no adapter {', '.join(map(repr, unknown))}, it has {known}")


def _chosen_models(pipeline, components: str | Sequence[str] | None) -> dict[str, nn.Module]:
    models = pipeline_components(pipeline)
    if components is None:
        return {name: model for name, model in models.items() if cersa_layers(model)}
    names = _as_list(components)
    for name in names:
        if name not in models:
            raise ConfigError(f"{type(pipeline).__name__} has no component {name!r} to adapt, expected one of {list(models)}")
    return {name: models[name] for name in names}


def _on_all(pipeline, change) -> None:
    components = pipeline_components(pipeline)
    with all_or_nothing(*components.values()):
        for model in components.values():
            change(model)
