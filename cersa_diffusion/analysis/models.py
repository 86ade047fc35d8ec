"""Opening what an analysis looks at: model and pipeline folders, adapters on their base, results of runs, and bare weights."""

import copy
import json
import os
from collections.abc import Callable, Mapping
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
from cersa_diffusion.layers.kinds import can_be_factored, matrix_of
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import name_matches
from cersa_diffusion.methods.lora_files import LORA_FILE_NAME, load_lora
from cersa_diffusion.text import one_line

RESULT_DESCRIPTION = "cersa_classifier.json"
PEFT_DESCRIPTION = "adapter_config.json"
Source = str | os.PathLike | nn.Module


@dataclass(frozen=True)
class Opened:
    """A model in memory.

    Attributes:
        components: the models by name; a lone one is "model".
        pipeline: the diffusers pipeline they belong to, or None.
        unstored: layers of a lone model that its checkpoint has no weights for, and that are random therefore.
    """

    components: dict[str, nn.Module]
    pipeline: object | None = None
    unstored: frozenset[str] = frozenset()


def open_model(source: Source) -> Opened:
    """Loads a model, in float32 and eval mode.

    Args:
        source: a model in memory; or a folder or hub id of a transformers or diffusers model, of a Stable Diffusion or SDXL
            pipeline, of a compressed checkpoint, or of the `result` of a classification run, which opens adapted.

    Raises:
        ConfigError: no such folder or model, or one that cannot be loaded.
    """
    if isinstance(source, nn.Module):
        return Opened({"model": source})
    folder = local_folder(source, None)
    if (folder / DESCRIPTION_NAME).is_file():
        return Opened({"model": load_compressed(folder)})
    if (folder / RESULT_DESCRIPTION).is_file():
        # Imported here, as below: slow to import, and only this kind of folder needs it.
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
    """As `open_model`, with cores merged into plain linear layers: what an analysis of a model's own layers looks at.

    Args:
        source: what `open_model` opens; a model in memory is changed in place.
        revision: of a model on the hub.

    Returns:
        The models by name; a lone one is "model".

    Raises:
        ConfigError: as `open_model`.
    """
    components = open_model(source if isinstance(source, nn.Module) else local_folder(source, revision)).components
    for model in components.values():
        if any(isinstance(module, CersaLinear) for module in model.modules()):
            merge(model)
    return components


def _load(folder: Path) -> Opened:
    library, class_name = model_class(folder)
    cls = find_class(folder, library, class_name)
    dtype = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
    verbosity = logging.get_verbosity()
    try:
        # Silences the report of weights that the checkpoint lacks: no analysis looks at them.
        logging.set_verbosity_error()
        model, loading = cls.from_pretrained(str(folder), output_loading_info=True, use_safetensors=True, **dtype)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"{folder}: cannot be loaded as {class_name} from safetensors ({reason}); pickles are not read"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return Opened({"model": model.eval()}, unstored=frozenset(key.rpartition(".")[0] for key in loading["missing_keys"]))


def _merged(model: nn.Module) -> nn.Module:
    """A peft model as the plain one with its adapters in the weights; others as they are."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@dataclass(frozen=True)
class LayerPair:
    """A layer of two checkpoints.

    Attributes:
        name: in the first; "component.layer name" where it has several components.
        before: gives the (m, n) weight of the first.
        after: gives that of the second.
    """

    name: str
    before: Callable[[], Tensor]
    after: Callable[[], Tensor]


def open_pair(
    base: Source, tuned: Source, target_modules: str | list[str] = "all-linear", exclude_modules: str | list[str] | None = None
) -> list[LayerPair]:
    """The layers that two checkpoints have in common, in the order of the first; weights are made when they are asked for.

    Args:
        base: the first: a model in memory, what `open_model` opens, or weights without a config.json (a safetensors file, or a
            folder of them), whose layers are all matrices named `*.weight`.
        tuned: the second: likewise, or an adapter of the first (CERSA; peft's, for a model; a LoRA, for a pipeline).
        target_modules: which layers of the first: "all-linear", a regular expression for whole names, or name endings.
        exclude_modules: which of them not.

    Raises:
        ConfigError: a source that cannot be opened, or no layer of that name in the first.
        BaseMismatchError: the second lacks layers of the first, or has them in other shapes.
        NonFiniteError: NaN or infinity in a weight.
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
            f"{_title(tuned)} lacks {len(missing)} of the {len(chosen)} layers of {_title(base)}, e.g. {missing[:3]}: are these "
            "two of one architecture? Otherwise choose the layers they share with target_modules or exclude_modules"
        )
    pairs = [LayerPair(name, chosen[name][1], second[partner][1]) for name, partner in partners.items()]
    for name, partner in partners.items():
        shapes = [tuple(layers[key][0]) for layers, key in ((chosen, name), (second, partner))]
        if shapes[0] != shapes[1]:
            raise BaseMismatchError(
                f"layer {name} has shape {shapes[0]} in {_title(base)} and {shapes[1]} in {_title(tuned)}: these are not of one "
                "architecture, or the layer has to be left out with exclude_modules"
            )
    for pair in pairs:
        for source, weight in ((base, pair.before), (tuned, pair.after)):
            if not torch.isfinite(weight()).all():
                raise NonFiniteError(f"layer {pair.name} of {_title(source)} holds NaN or infinity: this checkpoint is damaged")
    return pairs


Layers = dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]


def _layers(source: Source | Opened) -> Layers:
    """Layer name -> shape, and a function that gives the weight."""
    files = None if isinstance(source, nn.Module | Opened) else _bare_files(Path(source))
    if files is not None:
        return _bare_layers(files)
    opened = source if isinstance(source, Opened) else open_model(source)
    layers: Layers = {}
    for component, model in opened.components.items():
        prefix = f"{component}." if len(opened.components) > 1 else ""
        for name, module in model.named_modules():
            if name in opened.unstored:
                continue
            if isinstance(module, CersaLinear):
                layers[prefix + name] = (module.out_features, module.in_features), module.effective_weight
            elif can_be_factored(module):
                layers[prefix + name] = tuple(matrix_of(module).shape), lambda own=module: matrix_of(own).detach()
    return layers


def _bare_files(path: Path) -> list[Path] | None:
    """The safetensors files of a source that is nothing but weights; None for every other."""
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
        raise ConfigError(f"{', '.join(map(str, files))}: no matrices named *.weight, expected the weights of a model")
    return layers


def _tensor(path: Path, key: str) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _adapted(base: Source, tuned: Source) -> Source | Opened:
    """The base with the adapter that `tuned` is; or `tuned` itself where it is a checkpoint of its own."""
    if isinstance(tuned, nn.Module):
        return tuned
    path = Path(tuned)
    file = path / DEFAULT_FILE_NAME if (path / DEFAULT_FILE_NAME).is_file() else path
    if (path / RESULT_DESCRIPTION).is_file():
        return tuned
    if _is_cersa_adapter(file):
        opened = _copy(base, tuned)
        load_adapter(opened.components, file, keep_base=False)
        return opened
    if (path / PEFT_DESCRIPTION).is_file():
        return _with_peft(base, path)
    lora = path if path.name == LORA_FILE_NAME else path / LORA_FILE_NAME
    if lora.is_file():
        return _with_lora(base, lora)
    return tuned


def _with_peft(base: Source, adapter: Path) -> Opened:
    # Imported here: only these adapters need it.
    from peft import PeftModel

    components = _copy(base, adapter).components
    if list(components) != ["model"]:
        raise ConfigError(f"{adapter} is an adapter of peft, and {_title(base)} is a pipeline: give the model it belongs to")
    owner = _owner(components["model"], adapter, base)
    try:
        return Opened({"model": _merged(PeftModel.from_pretrained(owner, str(adapter)))})
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise BaseMismatchError(f"{adapter} does not fit {_title(base)}: {reason}") from error


def _with_lora(base: Source, adapter: Path) -> Opened:
    opened = _copy(base, adapter)
    if opened.pipeline is None:
        raise ConfigError(f"{adapter} is a LoRA of a pipeline, and {_title(base)} is none: give the folder of the pipeline")
    load_lora(opened.pipeline, adapter)
    adapted = [name for name, model in opened.components.items() if getattr(model, "peft_config", None)]
    opened.pipeline.fuse_lora(components=adapted)
    opened.pipeline.unload_lora_weights()
    return opened


def _owner(model: nn.Module, adapter: Path, base: Source) -> nn.Module:
    """The model that the names of a peft adapter are those of: this one, or the one inside without its head.

    peft itself only warns of names that it does not find, and leaves the model as it is.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{adapter}: no adapter_model.safetensors in it, expected the folder of a peft adapter")
    with safetensors.safe_open(path, framework="pt") as file:
        names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in file.keys() if ".lora_" in key}
    if not names:
        raise ConfigError(f"{adapter}: no LoRA in it, expected LoRA, PiSSA or DoRA")
    for candidate in (model, getattr(model, "base_model", model)):
        missing = sorted(names - {name for name, _ in candidate.named_modules()})
        if not missing:
            return candidate
    raise BaseMismatchError(
        f"{_title(base)} lacks {len(missing)} of the {len(names)} layers of {adapter}, e.g. {missing[:3]}: give the folder of "
        "the very model, with its head, that the adapter was trained on"
    )


def _copy(base: Source, tuned: Source) -> Opened:
    if not isinstance(base, nn.Module) and _bare_files(Path(base)) is not None:
        raise ConfigError(f"{tuned} is an adapter, and {base} has no config.json: give the folder of the model it belongs to")
    return open_model(copy.deepcopy(base))


def _is_cersa_adapter(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return HEADER_ENTRY in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return path.name == DEFAULT_FILE_NAME  # the loader says what is wrong with it


def _partner(name: str, layers: Mapping[str, object]) -> str | None:
    """The same layer under the name that another checkpoint has for it: with a prefix more or less."""
    if name in layers:
        return name
    wanted = _plain(name)
    found = [
        other for other in layers if (own := _plain(other)) == wanted or own.endswith(f".{wanted}") or wanted.endswith(f".{own}")
    ]
    return found[0] if len(found) == 1 else None


def _plain(name: str) -> str:
    # transformers' releases differ in whether CLIP's text models carry it.
    return name.replace("text_model.", "")


def _title(source: Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        ConfigError: no such file, or damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
