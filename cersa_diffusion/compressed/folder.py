"""Compressed checkpoints: model folders that hold U, s and Vh instead of dense weights, and how they are loaded.

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
# Names in a CERSA layer that the file calls otherwise.
_NAMES_IN_FILE = {"up.weight": "U", "down.weight": "Vh", "up.bias": "bias"}
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class FactoredLayer:
    """The entry of one layer in the description.

    Args:
        m, n: outputs and inputs.
        k: kept rank.
        energy: share of the squared singular values that is kept.
        s, entries: leading singular values and some entries of the dense weight; adapters recognise their base by them.
    """

    m: int
    n: int
    k: int
    energy: float
    s: tuple[float, ...]
    entries: tuple[float, ...]

    @classmethod
    def parse(cls, entry: dict) -> "FactoredLayer":
        """The layer of an entry in JSON; errors of the conversions are not caught."""
        m, n, k = (int(entry[name]) for name in "mnk")
        if not 1 <= k <= min(m, n):
            raise ValueError(f"k = {k}")
        return cls(m, n, k, float(entry["energy"]), *(tuple(map(float, entry[name])) for name in ("s", "entries")))


def load_compressed(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    **pipeline_kwargs,
):
    """Loads a checkpoint that `cersa_diffusion.compressed.write` wrote, without a decomposition and without dense weights.

    Factors stay memory-mapped if they are stored in the requested dtype and the model stays on the CPU.

    Args:
        name_or_path: a compressed pipeline or model folder, or a model id on the hub.
        dtype: compute dtype; singular values stay float32.
        device: device of the model; default: the CPU.
        revision: revision of a model on the hub.
        pipeline_kwargs: passed to `diffusers.DiffusionPipeline.from_pretrained`.

    Returns:
        The pipeline or the model in eval mode, with `CersaLinear` layers and without adapters. Adapters of the same base and
        energy share can be loaded into it; `cersa_diffusion.add_adapter` adds an adapter for training.

    Raises:
        ConfigError: the folder or model does not exist or is not compressed.
        AdapterFormatError: the folder is damaged, or a newer release wrote it.
    """
    folder = local_folder(name_or_path, revision)
    if (folder / DESCRIPTION_NAME).is_file():
        model = _load_model(folder, *model_class(folder), dtype)
        return model.to(device) if device is not None else model
    if not (folder / PIPELINE_INDEX).is_file():
        raise ConfigError(f"{folder} holds no {DESCRIPTION_NAME} and no {PIPELINE_INDEX}, expected a folder that compress wrote")
    index = read_index(folder)
    compressed = [name for name in index if (folder / name / DESCRIPTION_NAME).is_file()]
    if not compressed:
        raise ConfigError(f"{folder}: no component is compressed: load it with DiffusionPipeline.from_pretrained")
    components = {name: _load_model(folder / name, *pipeline_entry(index, name, folder), dtype) for name in compressed}
    # Imported here: a single model of transformers does not need diffusers.
    from diffusers import DiffusionPipeline

    variant = read_description(folder / compressed[0])[1].get("variant")
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, **components, **pipeline_kwargs}
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(folder), **options)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be loaded from safetensors ({one_line(error)}); pickles are not read") from error
    return pipeline.to(device) if device is not None else pipeline


def model_class(folder: Path) -> tuple[str, str]:
    """Library and class name of the model in a folder.

    Raises:
        ConfigError: the folder holds no diffusers or transformers model.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    if config.get("architectures"):
        return "transformers", config["architectures"][0]
    raise ConfigError(f"{folder} holds no {PIPELINE_INDEX} and no config.json with a class, expected a pipeline or a model")


def pipeline_entry(index: dict, component: str, folder: Path) -> tuple[str, str]:
    """Library and class name of a component of a pipeline.

    Raises:
        ConfigError: the component does not exist, or its class is not from diffusers or transformers.
    """
    entry = index.get(component)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in _LIBRARIES:
        models = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] in _LIBRARIES]
        raise ConfigError(f"{folder} has no component {component!r} from diffusers or transformers, it has {models}")
    return entry[0], entry[1]


def find_class(folder: Path, library: str, class_name: str) -> type[nn.Module]:
    """The model class that a model folder names.

    Raises:
        ConfigError: the installed library has no such class, or it is not a model class.
    """
    module = import_module(library)
    cls = getattr(module, str(class_name), None)
    base = module.ModelMixin if library == "diffusers" else module.PreTrainedModel
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise ConfigError(
            f"{folder}: {library} {module.__version__} has no model class {class_name!r} (a subclass of {base.__name__}): "
            f"install a release of {library} that has it"
        )
    return cls


def skeleton(folder: Path, library: str, class_name: str) -> nn.Module:
    """The model of a folder, with parameters on the meta device and buffers on the CPU.

    Raises:
        ConfigError: the installed library has no such class, or cannot build it from the configuration.
    """
    # Imported here: accelerate is slow to import.
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
        raise ConfigError(f"{folder}: no {class_name} can be built from its config.json ({error})") from error
    return model.eval()


def stored_name(name: str, model: nn.Module, stored: Iterable[str]) -> str | None:
    """Translates the name of a layer or tensor in a model to its name in a checkpoint, or the reverse; None if it is not there.

    The names in checkpoints of CLIP text models and of models with a head may lack a prefix or have an additional one, depending
    on the release of transformers. transformers also renames modules of some architectures (e.g. ViT) when it loads them.
    """
    key = _with_or_without_prefix(name, model, stored)
    if key is None and hasattr(model, "base_model_prefix"):
        keys = (_with_or_without_prefix(renamed, model, stored) for renamed in _renamed(name, model))
        key = next(filter(None, keys), None)
    return key


def _with_or_without_prefix(name: str, model: nn.Module, stored: Iterable[str]) -> str | None:
    prefixes = {"text_model.", f"{getattr(model, 'base_model_prefix', '') or 'text_model'}."}
    candidates = [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]
    return next((candidate for candidate in candidates if candidate in stored), None)


def _renamed(name: str, model: nn.Module) -> tuple[str, str]:
    """The name in the model of a name in files, and the name in files of a name in the model, according to transformers."""
    rename_source_key, prefix_change, weight_renaming = RENAME_SOURCE_KEY.get(), PREFIX_CHANGE.get(), WEIGHT_RENAMING.get()
    conversions = CONVERSION_MAPPING.get()(model, add_legacy=False)
    renamings = [item for item in conversions if isinstance(item, weight_renaming) and not isinstance(item, prefix_change)]
    back = [renaming.reverse_transform() for renaming in reversed(renamings)]
    return rename_source_key(name, renamings, [])[0], rename_source_key(name, back, [], reverse=True)[0]


def read_index(folder: Path) -> dict:
    """Reads the `model_index.json` of a pipeline folder.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return dict(json.loads((folder / PIPELINE_INDEX).read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / PIPELINE_INDEX} is not the index of a pipeline: copy or download it again") from error


def write_description(folder: Path, layers: dict[str, FactoredLayer], config: dict, source: dict) -> None:
    """Writes the description that `read_description` reads.

    Args:
        folder: the compressed model.
        layers: name in the checkpoint -> entry.
        config: settings (`CersaConfig.to_dict`).
        source: the dense checkpoint ("name_or_path", "revision", "variant").
    """
    entries = {name: asdict(layer) for name, layer in layers.items()}
    description = {"format_version": FORMAT_VERSION, "config": config, "source": source, "layers": entries}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n")


def read_description(folder: Path) -> tuple[dict[str, FactoredLayer], dict]:
    """The description of a compressed model: its layers, and the checkpoint that it was made from.

    Raises:
        AdapterFormatError: the description is damaged or has another version.
    """
    path = folder / DESCRIPTION_NAME
    try:
        description = json.loads(path.read_text())
        version, source = description["format_version"], dict(description["source"])
        layers = {name: FactoredLayer.parse(entry) for name, entry in description["layers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is damaged, it describes no compressed model: copy or download it again") from error
    if version != FORMAT_VERSION:
        raise AdapterFormatError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}: update cersa-diffusion"
        )
    return layers, source


def _load_model(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    layers, _ = read_description(folder)
    model = skeleton(folder, library, class_name)
    modules = dict(model.named_modules())
    factored = {}
    for stored, entry in layers.items():
        name = stored_name(stored, model, modules)
        linear = modules.get(name)
        if not can_be_factored(linear) or (linear.out_features, linear.in_features) != (entry.m, entry.n):
            raise AdapterFormatError(f"{folder}: layer {stored} ({entry.m} x {entry.n}) is not a linear layer of {class_name}")
        with torch.device("meta"):
            empty = Decomposition(torch.empty(entry.m, entry.k), torch.empty(entry.k), torch.empty(entry.k, entry.n))
        layer = CersaLinear(empty, entry.k, linear.bias, dtype)
        layer.base_entries, layer.is_base = entry.entries, True
        replace_module(model, name, layer)
        factored[name] = entry
    try:
        state = _read_state(folder / WEIGHTS_NAME, model, set(factored), dtype)
        for name, entry in factored.items():
            if tuple(state[f"{name}.s"][: len(entry.s)].tolist()) != entry.s:
                raise AdapterFormatError(
                    f"{folder}: layer {name} does not match its description, the files are from two different checkpoints: "
                    "compress it again"
                )
        model.load_state_dict(state, strict=False, assign=True)
    except (safetensors.SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise AdapterFormatError(
            f"{folder / WEIGHTS_NAME} is damaged or belongs to another model ({error}): compress it again"
        ) from error
    if library == "transformers":
        model.tie_weights()
    missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if missing:
        raise AdapterFormatError(f"{folder / WEIGHTS_NAME} lacks {len(missing)} tensors, e.g. {missing[:3]}: compress it again")
    return model


def _read_state(path: Path, model: nn.Module, factored: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by their names in the model; a tensor is copied only if its dtype changes.

    Args:
        path: the file.
        model: the model, with CERSA layers.
        factored: the names of these layers.
        dtype: dtype of all tensors but singular values.
    """
    in_file = {f"{layer}.{name}": f"{layer}.{other}" for layer in factored for name, other in _NAMES_IN_FILE.items()}
    singular_values = {f"{layer}.s" for layer in factored}
    float32_modules = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    state = {}
    with safetensors.safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for name in model.state_dict():
            key = stored_name(in_file.get(name, name), model, stored)
            if key is None:
                continue
            tensor = file.get_tensor(key)
            if name in singular_values or any(part in name.split(".") for part in float32_modules):
                tensor = tensor.float()
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            state[name] = tensor
    return state


def local_folder(name_or_path: str | os.PathLike, revision: str | None, *, pipeline_options: dict | None = None) -> Path:
    """The path of a local folder, or of the downloaded snapshot of a model on the hub.

    With `pipeline_options`, those of `DiffusionPipeline.download`, the snapshot has only the files that this pipeline needs.

    Raises:
        ConfigError: there is no such folder, and the model was not found on the hub.
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
        if pipeline_options is None:
            return Path(snapshot_download(str(name_or_path), revision=revision))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(str(name_or_path), revision=revision, **pipeline_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what = "" if pipeline_options is None else " as a pipeline"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name_or_path}: no such folder, and it was not found on the hub{what} ({reason})") from error
