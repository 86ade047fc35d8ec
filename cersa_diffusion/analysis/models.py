"""Opens the inputs of an analysis: model and pipeline folders, adapters on their base, results of runs, and bare weights."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from transformers.utils import logging

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME, HEADER_ENTRY
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.compressed.folder import (
    DESCRIPTION_NAME,
    PIPELINE_INDEX,
    find_class,
    load_compressed,
    local_folder,
    model_class,
)
from cersa_diffusion.errors import BaseMismatchError, ConfigError, NonFiniteError
from cersa_diffusion.inject import merge
from cersa_diffusion.layers.fused import Fused
from cersa_diffusion.layers.kinds import can_be_factored, form_of, matrix_of
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import name_matches, named_layers
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, load_lora
from cersa_diffusion.text import one_line

RESULT_DESCRIPTION = "cersa_classifier.json"
PEFT_DESCRIPTION = "adapter_config.json"
Source = str | os.PathLike | nn.Module


@dataclass(frozen=True)
class Opened:
    """A model in memory.

    Attributes:
        components: component name -> model; a single model has the name "model".
        pipeline: the diffusers pipeline of the components, or None.
        unstored: layers of a single model that are random because its checkpoint has no weights for them.
    """

    components: dict[str, nn.Module]
    pipeline: object | None = None
    unstored: frozenset[str] = frozenset()


def open_model(source: Source) -> Opened:
    """Loads a model, in float32 and eval mode.

    Args:
        source: a model in memory; or the folder or hub id of a transformers or diffusers model, a Stable Diffusion or SDXL
            pipeline, a compressed checkpoint, or the `result` of a classification run, whose adapter is applied.

    Raises:
        ConfigError: the folder or model does not exist or cannot be loaded.
    """
    if isinstance(source, nn.Module):
        return Opened({"model": source})
    folder = local_folder(source, None)
    if (folder / DESCRIPTION_NAME).is_file():
        return Opened({"model": load_compressed(folder)})
    if (folder / RESULT_DESCRIPTION).is_file():
        # Imported here, as below, because the import is slow and only this kind of folder needs it.
        from cersa_diffusion.classification.result import load_classifier

        return Opened({"model": _merged(load_classifier(folder)[0])})
    if (folder / PIPELINE_INDEX).is_file():
        from cersa_diffusion.families.table import family_of
        from cersa_diffusion.pipelines.open import load_base

        pipeline = load_base(str(folder))
        components = family_of(type(pipeline).__name__).components(pipeline)
        return Opened({name: model.eval() for name, model in components.items()}, pipeline)
    return _load(folder)


def open_dense(source: Source, revision: str | None = None) -> dict[str, nn.Module]:
    """Loads the components of a model as `open_model` does, and merges CERSA cores into plain linear layers.

    Args:
        source: what `open_model` opens; a model in memory is changed in place.
        revision: revision of a model on the hub.

    Returns:
        Component name -> model; a single model has the name "model".

    Raises:
        ConfigError: as in `open_model`.
    """
    components = open_model(source if isinstance(source, nn.Module) else local_folder(source, revision)).components
    for model in components.values():
        merge(model)
    return components


def _load(folder: Path) -> Opened:
    library, class_name = model_class(folder)
    cls = find_class(folder, library, class_name)
    dtype = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
    verbosity = logging.get_verbosity()
    try:
        # Silences the report of weights that are not in the checkpoint: no analysis uses them.
        logging.set_verbosity_error()
        model, loading = cls.from_pretrained(str(folder), output_loading_info=True, use_safetensors=True, **dtype)
    except (OSError, ValueError) as error:
        reason = f"({one_line(error)}); pickles are not read"
        raise ConfigError(f"{folder}: cannot be loaded as {class_name} from safetensors {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    return Opened({"model": model.eval()}, unstored=frozenset(key.rpartition(".")[0] for key in loading["missing_keys"]))


def _merged(model: nn.Module) -> nn.Module:
    """Merges the adapters of a peft model into its weights; returns other models unchanged."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@dataclass(frozen=True)
class LayerPair:
    """A layer of two checkpoints.

    Attributes:
        name: name in the first checkpoint; "component.layer name" if it has several components.
        before: returns the (m, n) weight in the first checkpoint.
        after: returns the weight in the second checkpoint.
    """

    name: str
    before: Callable[[], Tensor]
    after: Callable[[], Tensor]


def open_pair(
    base: Source, tuned: Source, target_modules: str | list[str] = "all-linear", exclude_modules: str | list[str] | None = None
) -> list[LayerPair]:
    """Pairs the layers of two checkpoints, in the order of the first; a weight is computed when it is requested.

    Args:
        base: the first checkpoint: a model in memory, what `open_model` opens, or weights without a config.json (a safetensors
            file, or a folder of them), whose layers are all matrices named `*.weight`.
        tuned: the second checkpoint: as `base`, or an adapter of the first (CERSA; for a model peft; for a pipeline LoRA).
        target_modules: the layers to pair: "all-linear", a regular expression for whole names, or name endings.
        exclude_modules: layers to leave out.

    Raises:
        ConfigError: a checkpoint cannot be opened, or no layer of the first has such a name.
        BaseMismatchError: the second checkpoint lacks layers of the first, or has them in other shapes.
        NonFiniteError: a weight holds NaN or infinity.
    """
    first = _layers(base)
    chosen = {
        name: layer
        for name, layer in first.items()
        if (target_modules == "all-linear" or name_matches(_plain(name), target_modules) or name_matches(name, target_modules))
        and not (exclude_modules and name_matches(name, exclude_modules))
    }
    if not chosen:
        endings = sorted({name.rsplit(".", 1)[-1] for name in first})
        raise ConfigError(f"target_modules={target_modules!r} matches no layer of {_title(base)}: its layers end in {endings}")
    second = _layers(_adapted(base, tuned))
    partners = {name: _partner(name, second) for name in chosen}
    missing = [name for name, partner in partners.items() if partner is None]
    if missing:
        raise BaseMismatchError(
            f"{_title(tuned)} lacks {len(missing)} of the {len(chosen)} layers of {_title(base)}, e.g. {missing[:3]}: give two "
            "checkpoints of one architecture, or choose the layers that both have with target_modules or exclude_modules"
        )
    pairs = []
    for name, partner in partners.items():
        (shape, before), (tuned_shape, after) = chosen[name], second[partner]
        if shape != tuned_shape:
            raise BaseMismatchError(
                f"layer {name} has shape {shape} in {_title(base)} and {tuned_shape} in {_title(tuned)}: give two checkpoints of "
                "one architecture, or leave the layer out with exclude_modules"
            )
        pairs.append(LayerPair(name, before, after))
    for pair in pairs:
        for source, weight in ((base, pair.before), (tuned, pair.after)):
            if not torch.isfinite(weight()).all():
                raise NonFiniteError(f"layer {pair.name} of {_title(source)} holds NaN or infinity: this checkpoint is damaged")
    return pairs


# Layer name -> shape, and a function that returns the weight.
Layers = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _layers(source: Source | Opened) -> Layers:
    files = None if isinstance(source, nn.Module | Opened) else _bare_files(Path(source))
    if files is not None:
        return _bare_layers(files)
    opened = source if isinstance(source, Opened) else open_model(source)
    layers: Layers = {}
    for component, model in opened.components.items():
        prefix = f"{component}." if len(opened.components) > 1 else ""
        for name, module in named_layers(model).items():
            if name in opened.unstored:
                continue
            if isinstance(module, CersaLinear | Fused):
                layers[prefix + name] = (module.out_features, module.in_features), module.effective_weight
            elif can_be_factored(module):
                layers[prefix + name] = form_of(module).shape, lambda module=module: matrix_of(module).detach()
    return layers


def _bare_files(path: Path) -> list[Path] | None:
    """The safetensors files of a source that consists of weights only; None for other sources."""
    if path.is_file():
        return [path]
    if not path.is_dir() or any((path / name).is_file() for name in ("config.json", PIPELINE_INDEX, DESCRIPTION_NAME)):
        return None
    return sorted(path.glob("*.safetensors")) or None


def _bare_layers(files: list[Path]) -> Layers:
    layers: Layers = {}
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{path}: not a readable safetensors file ({error}): copy or download it again") from error
        for key, shape in shapes.items():
            if key.endswith(".weight") and len(shape) == 2:
                layers[key.removesuffix(".weight")] = shape, lambda path=path, key=key: _tensor(path, key)
    if not layers:
        raise ConfigError(f"{', '.join(map(str, files))}: there are no matrices named *.weight, expected the weights of a model")
    return layers


def _tensor(path: Path, key: str) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _adapted(base: Source, tuned: Source) -> Source | Opened:
    """The base with the adapter `tuned`; or `tuned` itself if it is a complete checkpoint."""
    if isinstance(tuned, nn.Module) or (Path(tuned) / RESULT_DESCRIPTION).is_file():
        return tuned
    path = Path(tuned)
    file = path / DEFAULT_FILE_NAME if (path / DEFAULT_FILE_NAME).is_file() else path
    if _is_cersa_adapter(file):
        opened = _open_copy(base, tuned)
        load_adapter(opened.components, file, keep_base=False)
        return opened
    if (path / PEFT_DESCRIPTION).is_file():
        return _with_peft(base, path)
    lora = path if path.name == LORA_FILE_NAME else path / LORA_FILE_NAME
    if lora.is_file():
        return _with_lora(base, lora)
    return tuned


def _with_peft(base: Source, adapter: Path) -> Opened:
    # Imported here because only these adapters need it.
    from peft import PeftModel

    components = _open_copy(base, adapter).components
    if list(components) != ["model"]:
        raise ConfigError(f"{adapter} is an adapter of peft, but {_title(base)} is a pipeline: give the model of the adapter")
    owner = _owner(components["model"], adapter, base)
    try:
        return Opened({"model": _merged(PeftModel.from_pretrained(owner, str(adapter)))})
    except (RuntimeError, ValueError) as error:
        raise BaseMismatchError(f"{adapter} does not fit {_title(base)}: {one_line(error)}") from error


def _with_lora(base: Source, adapter: Path) -> Opened:
    opened = _open_copy(base, adapter)
    if opened.pipeline is None:
        raise ConfigError(f"{adapter} is a LoRA of a pipeline, but {_title(base)} is not a pipeline: give the pipeline folder")
    load_lora(opened.pipeline, adapter)
    adapted = [name for name, model in opened.components.items() if getattr(model, "peft_config", None)]
    opened.pipeline.fuse_lora(components=adapted)
    opened.pipeline.unload_lora_weights()
    return opened


def _owner(model: nn.Module, adapter: Path, base: Source) -> nn.Module:
    """The model that has the layers of a peft adapter: this one, or the model without a head inside it.

    The check is needed because peft only warns if a layer is missing, and leaves the model unchanged.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{adapter}: adapter_model.safetensors is missing, expected the folder of a peft adapter")
    with safetensors.safe_open(path, framework="pt") as file:
        names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys() if ".lora_" in key}
    if not names:
        raise ConfigError(f"{adapter}: holds no LoRA weights, expected LoRA, PiSSA or DoRA")
    for candidate in (model, getattr(model, "base_model", model)):
        missing = sorted(names - {name for name, _ in candidate.named_modules()})
        if not missing:
            return candidate
    raise BaseMismatchError(
        f"{_title(base)} lacks {len(missing)} of the {len(names)} layers of {adapter}, e.g. {missing[:3]}: give the folder of "
        "the model, including its head, on which the adapter was trained"
    )


def _open_copy(base: Source, tuned: Source) -> Opened:
    if not isinstance(base, nn.Module) and _bare_files(Path(base)) is not None:
        raise ConfigError(f"{tuned} is an adapter, but {base} has no config.json: give the folder of the model of the adapter")
    return open_model(copy.deepcopy(base))


def _is_cersa_adapter(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return HEADER_ENTRY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return path.name == DEFAULT_FILE_NAME  # the loader then reports the fault


def _partner(name: str, layers: Layers) -> str | None:
    """The name of the same layer in another checkpoint, where it may have a longer or shorter prefix."""
    if name in layers:
        return name
    ending = f".{_plain(name)}"
    matches = [other for other in layers if f".{_plain(other)}".endswith(ending) or ending.endswith(f".{_plain(other)}")]
    return matches[0] if len(matches) == 1 else None


def _plain(name: str) -> str:
    # Whether the layers of CLIP's text models have this prefix depends on the version of transformers.
    return name.replace("text_model.", "")


def _title(source: Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def read_json(path: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        ConfigError: the file does not exist or is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
