"""Compressed checkpoints: model folders that hold U, s and Vh instead of dense weights, and loading them.

docs/compressed-checkpoints.md describes the folder; `cersa_diffusion.compressed.write` writes it.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from cersa_diffusion.errors import AdapterFormatError, ConfigError
from cersa_diffusion.files import NEITHER, is_hub_id
from cersa_diffusion.functional import Decomposition
from cersa_diffusion.layers.kinds import can_be_factored
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import replace_module
from cersa_diffusion.private_names import CONVERSION_MAPPING, PREFIX_CHANGE, RENAME_SOURCE_KEY, WEIGHT_RENAMING
from cersa_diffusion.text import one_line

WEIGHTS_NAME = "cersa_model.safetensors"
DESCRIPTION_NAME = "cersa_compression.json"
PIPELINE_INDEX = "model_index.json"
FORMAT_VERSION = 1
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class FactoredLayer:
    """What the description says of one layer.

    Args:
        m: outputs.
        n: inputs.
        k: kept rank.
        energy: share of the squared singular values that is kept.
        s: leading singular values, and
        entries: some entries of the dense weight: together the fingerprint by which adapters know their base.
    """

    m: int
    n: int
    k: int
    energy: float
    s: tuple[float, ...]
    entries: tuple[float, ...]

    @classmethod
    def parse(cls, facts: dict) -> "FactoredLayer":
        """From JSON; raises what the conversions raise."""
        m, n, k = (int(facts[name]) for name in "mnk")
        if not 1 <= k <= min(m, n):
            raise ValueError(f"k = {k}")
        return cls(m, n, k, float(facts["energy"]), *(tuple(map(float, facts[name])) for name in ("s", "entries")))


def load_compressed(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    **pipeline_kwargs,
):
    """Loads what `cersa_diffusion.compressed.write` wrote, without a decomposition and without dense weights.

    Factors stay memory-mapped where they are stored in the dtype that is asked for and the model stays on the CPU.

    Args:
        name_or_path: a compressed pipeline or model folder, or a model id on the hub.
        dtype: compute dtype; singular values stay float32.
        device: where the model goes; default: the CPU.
        revision: of a model on the hub.
        pipeline_kwargs: passed to `diffusers.DiffusionPipeline.from_pretrained`.

    Returns:
        The pipeline, or the model, in eval mode, with `CersaLinear` layers and no adapters yet. Adapters of the same base and
        energy share load on top; `cersa_diffusion.add_adapter` adds one to train.

    Raises:
        ConfigError: no such folder or model, or not a compressed one.
        AdapterFormatError: the folder is damaged, or a newer release wrote it.
    """
    folder = local_folder(name_or_path, revision)
    if (folder / DESCRIPTION_NAME).is_file():
        model = _load_model(folder, *model_class(folder), dtype)
        return model.to(device) if device is not None else model
    if not (folder / PIPELINE_INDEX).is_file():
        raise ConfigError(f"{folder}: neither {DESCRIPTION_NAME} nor {PIPELINE_INDEX} in it, expected a folder by cersa.compress")
    index = read_index(folder)
    compressed = [name for name in index if (folder / name / DESCRIPTION_NAME).is_file()]
    if not compressed:
        raise ConfigError(f"{folder}: no component is compressed: load it with DiffusionPipeline.from_pretrained")
    components = {name: _load_model(folder / name, *pipeline_entry(index, name, folder), dtype) for name in compressed}
    # Imported here: a model of transformers alone needs no diffusers.
    from diffusers import DiffusionPipeline

    variant = read_description(folder / compressed[0])[1].get("variant")
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, **components, **pipeline_kwargs}
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(folder), **options)
    except OSError as error:
        reason = one_line(error)
        raise ConfigError(f"{folder}: cannot be loaded from safetensors ({reason}); pickles are not read") from error
    return pipeline.to(device) if device is not None else pipeline


def model_class(folder: Path) -> tuple[str, str]:
    """Library and class name of a model folder.

    Raises:
        ConfigError: not a diffusers or transformers model.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    if config.get("architectures"):
        return "transformers", config["architectures"][0]
    raise ConfigError(f"{folder}: neither {PIPELINE_INDEX} nor a config.json that names a class, expected a pipeline or a model")


def pipeline_entry(index: dict, component: str, folder: Path) -> tuple[str, str]:
    """Library and class name of a component of a pipeline.

    Raises:
        ConfigError: there is no such component, or its class is not of diffusers or transformers.
    """
    entry = index.get(component)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in _LIBRARIES:
        models = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] in _LIBRARIES]
        raise ConfigError(f"{folder}: no component {component!r} of diffusers or transformers, it has {models}")
    return entry[0], entry[1]


def find_class(folder: Path, library: str, class_name: str) -> type[nn.Module]:
    """The class of models that a model folder names.

    Raises:
        ConfigError: the installed library has no such class, or it is not one of models.
    """
    module = import_module(library)
    cls = getattr(module, str(class_name), None)
    base = module.ModelMixin if library == "diffusers" else module.PreTrainedModel
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise ConfigError(
            f"{folder}: {library} {module.__version__} has no class of models {class_name!r} (a {base.__name__}): install the "
            "release it needs"
        )
    return cls


def skeleton(folder: Path, library: str, class_name: str) -> nn.Module:
    """The model of a folder with its parameters on the meta device and its buffers in place.

    Raises:
        ConfigError: the installed library has no such class, or cannot build it from the configuration.
    """
    # Imported here: only the library that is needed, and accelerate takes its time.
    from accelerate import init_empty_weights

    cls = find_class(folder, library, class_name)
    try:
        with init_empty_weights():
            if library == "diffusers":
                model = cls.from_config(cls.load_config(str(folder)))
                model.register_to_config(_name_or_path=str(folder))
            else:
                model = cls(cls.config_class.from_pretrained(str(folder)))
        if library == "transformers":
            model.tie_weights()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder}: its config.json does not make a {class_name} ({error})") from error
    return model.eval()


def stored_name(name: str, model: nn.Module, stored: Iterable[str]) -> str | None:
    """What a layer or tensor of a model is called in a checkpoint, or None when it is not there; or the other way round.

    Checkpoints of CLIP text models and of models with a head carry a prefix more or less, by release of transformers, which also
    renames modules of some architectures (a ViT's, for one) while it loads them.
    """
    found = _with_a_prefix(name, model, stored)
    if found is None and hasattr(model, "base_model_prefix"):
        found = next((own for other in _renamed(name, model) if (own := _with_a_prefix(other, model, stored))), None)
    return found


def _with_a_prefix(name: str, model: nn.Module, stored: Iterable[str]) -> str | None:
    prefixes = {"text_model.", f"{getattr(model, 'base_model_prefix', '') or 'text_model'}."}
    candidates = [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]
    return next((candidate for candidate in candidates if candidate in stored), None)


def _renamed(name: str, model: nn.Module) -> tuple[str, str]:
    """A name in files as transformers has it in the model, and a name in the model as it has it in files."""
    rename_source_key, prefix_change, weight_renaming = RENAME_SOURCE_KEY.get(), PREFIX_CHANGE.get(), WEIGHT_RENAMING.get()
    changes = [own for own in CONVERSION_MAPPING.get()(model, add_legacy=False) if not isinstance(own, prefix_change)]
    renamings = [own for own in changes if isinstance(own, weight_renaming)]
    back = [own.reverse_transform() for own in reversed(renamings)]
    return rename_source_key(name, renamings, [])[0], rename_source_key(name, back, [], reverse=True)[0]


def read_index(folder: Path) -> dict:
    """The `model_index.json` of a pipeline folder.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return dict(json.loads((folder / PIPELINE_INDEX).read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / PIPELINE_INDEX}: not the index of a pipeline: copy or download it again") from error


def write_description(folder: Path, layers: dict[str, FactoredLayer], config: dict, source: dict) -> None:
    """Writes what `read_description` reads.

    Args:
        folder: the compressed model.
        layers: by name in the checkpoint.
        config: settings (`CersaConfig.to_dict`).
        source: the dense checkpoint ("name_or_path", "revision", "variant").
    """
    facts = {name: asdict(layer) for name, layer in layers.items()}
    description = {"format_version": FORMAT_VERSION, "config": config, "source": source, "layers": facts}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n")


def read_description(folder: Path) -> tuple[dict[str, FactoredLayer], dict]:
    """What a compressed model says of its layers, and of the checkpoint that it was made from.

    Raises:
        AdapterFormatError: damaged, or of another version.
    """
    path = folder / DESCRIPTION_NAME
    try:
        description = json.loads(path.read_text())
        version, source = description["format_version"], dict(description["source"])
        layers = {name: FactoredLayer.parse(facts) for name, facts in description["layers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFormatError(f"{path}: damaged, it describes no compressed model: copy or download it again") from error
    if version != FORMAT_VERSION:
        expected = f"this release reads {FORMAT_VERSION}: update cersa-diffusion"
        raise AdapterFormatError(f"{path}: format version {version!r}, {expected}")
    return layers, source


def _load_model(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    layers, _ = read_description(folder)
    model = skeleton(folder, library, class_name)
    modules = dict(model.named_modules())
    factored = {}
    for stored, facts in layers.items():
        name = stored_name(stored, model, modules)
        linear = modules.get(name)
        if not can_be_factored(linear) or (linear.out_features, linear.in_features) != (facts.m, facts.n):
            raise AdapterFormatError(f"{folder}: layer {stored} ({facts.m} x {facts.n}) is no linear layer of {class_name}")
        with torch.device("meta"):
            shape = Decomposition(torch.empty(facts.m, facts.k), torch.empty(facts.k), torch.empty(facts.k, facts.n))
        layer = CersaLinear(shape, facts.k, linear.bias, dtype)
        layer.base_entries, layer.is_base = facts.entries, True
        replace_module(model, name, layer)
        factored[f"{name}.s"] = facts
    try:
        state = _read_state(folder / WEIGHTS_NAME, model, set(factored), dtype)
        for name, facts in factored.items():
            if tuple(state[name][: len(facts.s)].tolist()) != facts.s:
                what = f"layer {name.removesuffix('.s')} and its description differ"
                raise AdapterFormatError(f"{folder}: {what}: these are files of two checkpoints, compress it again")
        model.load_state_dict(state, strict=False, assign=True)
    except (safetensors.SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise AdapterFormatError(f"{folder / WEIGHTS_NAME}: damaged or of another model ({error}): compress it again") from error
    if library == "transformers":
        model.tie_weights()
    missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if missing:
        raise AdapterFormatError(f"{folder / WEIGHTS_NAME}: lacks {len(missing)} tensors, e.g. {missing[:3]}: compress it again")
    return model


def _read_state(path: Path, model: nn.Module, singular_values: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model under the model's names; without copies where nothing is to be converted."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    state = {}
    with safetensors.safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for name in model.state_dict():
            key = stored_name(name, model, stored)
            if key is None:
                continue
            tensor = file.get_tensor(key)
            if name in singular_values or any(part in name.split(".") for part in kept):
                tensor = tensor.float()
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            state[name] = tensor
    return state


def local_folder(name_or_path: str | os.PathLike, revision: str | None) -> Path:
    """A folder as it is, or the snapshot of a model on the hub.

    Raises:
        ConfigError: no such folder, and not to be had from the hub.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not is_hub_id(str(name_or_path)):
        raise ConfigError(f"{name_or_path}: {NEITHER}")
    # Imported here: only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_path), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name_or_path}: no such folder, and not to be had from the hub ({reason})") from error
