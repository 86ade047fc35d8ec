"""From the cores of a model to an adapter file, and from an adapter file into any model of the same base."""

import math
import os
from collections.abc import Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from cersa_diffusion.adapter_file import AdapterFile, StoredLayer, read_adapter_file, write_adapter_file
from cersa_diffusion.cache import DecompositionCache, leading_factors
from cersa_diffusion.cores import MatrixCore
from cersa_diffusion.errors import AdapterFormatError, BaseMismatchError, ConfigError
from cersa_diffusion.functional import block_to_core, core_to_block, pivot_rows
from cersa_diffusion.inject import cersa_layers, check_layers, replace_module, replacement
from cersa_diffusion.linear import CersaLinear

# How many singular values of the base weight a file keeps to recognise it, and how far they may be off, relative to the
# largest. Measured on the embedded base: .0002 at most when it is loaded as bfloat16, nothing as float16.
FINGERPRINT_LENGTH = 8
FINGERPRINT_TOLERANCE = 0.002
LONE_COMPONENT = "model"


def save_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float16,
    config: dict | None = None,
    base_model: dict | None = None,
    training: dict | None = None,
) -> None:
    """Saves the cores of one adapter as pivot blocks of the weight change.

    Args:
        model: an injected model, or the components of a pipeline by name ({"unet": ..., "text_encoder": ...}).
        path: file to write.
        adapter_name: which cores.
        dtype: storage dtype of the blocks.
        config: method settings for the header, by component.
        base_model: what the model was loaded from, for the header.
        training: facts of the training run, for the header.

    Raises:
        ConfigError: the model has no such adapter.
        NonFiniteError: a core holds NaN or infinity; nothing is written.
    """
    layers = {}
    for component, module in components_of(model).items():
        for name, layer in cersa_layers(module).items():
            if adapter_name in layer.cores:
                layers[f"{component}.{_canonical_name(module, name)}"] = _store(layer, adapter_name, dtype)
    if not layers:
        raise ConfigError(f"no CERSA layer has an adapter {adapter_name!r}: inject or load it first")
    write_adapter_file(AdapterFile(layers, config or {}, base_model or {}, training or {}), path)


def load_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    source: str | os.PathLike | AdapterFile,
    *,
    adapter_name: str = "default",
    strength: float = 1.0,
    keep_base: bool = True,
    show_progress: bool = True,
) -> None:
    """Loads an adapter into a model: layers that are still dense are decomposed first.

    All or nothing: everything is read, checked and computed before the first layer is replaced.

    Args:
        model: a model of the base that the adapter was trained on, or the components of a pipeline by name.
        source: a file, or its content.
        adapter_name: name for the cores, not yet used in this model.
        strength: factor of the adapter; 0 gives the truncated base.
        keep_base: keep the replaced weights in CPU memory, so that `restore_base` can put them back.
        show_progress: show a bar while layers are decomposed.

    Raises:
        AdapterFormatError: the file cannot be read.
        BaseMismatchError: the model lacks layers of the file, has other shapes or other weights.
        ConfigError: the adapter name is taken, or the model holds cores of other ranks.
        NonFiniteError: NaN or infinity in the file or in a weight of the model.
    """
    adapter = source if isinstance(source, AdapterFile) else read_adapter_file(source)
    where = "adapter" if isinstance(source, AdapterFile) else str(source)
    components = components_of(model)
    targets = _resolve(adapter, components, where)
    for component, layers in targets.items():
        dense = {name: module for name, (module, _) in layers.items() if isinstance(module, nn.Linear)}
        check_layers(components[component], dense)
        for name, (module, stored) in layers.items():
            if isinstance(module, CersaLinear):
                _check_room(f"{component}.{name}", module, stored, adapter_name)

    prepared, distances, cache = [], {}, DecompositionCache.default()
    work = [(component, name, *pair) for component, layers in targets.items() for name, pair in layers.items()]
    for component, name, module, stored in tqdm(work, desc="loading adapter", unit="layer", disable=not show_progress):
        if isinstance(module, CersaLinear):
            layer, singular_values = module, module.s
        else:
            factors = leading_factors(module.weight, lambda s, stored=stored: stored.kept_rank, cache)
            layer = replacement(module, factors, stored.kept_rank, keep_residual=stored.residual_kept, keep_base=keep_base)
            singular_values = factors.s
        distances[f"{component}.{name}"] = _fingerprint_distance(singular_values, stored)
        prepared.append((component, name, layer, stored))
    _check_fingerprints(distances, adapter, where)
    if cache:
        cache.trim()

    cores = [_solve(f"{component}.{name}", layer, stored, where) for component, name, layer, stored in prepared]
    for (component, name, layer, stored), core in zip(prepared, cores, strict=True):
        layer.add_core(adapter_name, MatrixCore(stored.core_rank, stored.offset, core).requires_grad_(False), strength)
        if components[component].get_submodule(name) is not layer:
            replace_module(components[component], name, layer)


def components_of(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The components of a model by name; a lone model is a component itself."""
    return {LONE_COMPONENT: model} if isinstance(model, nn.Module) else dict(model)


def _canonical_name(model: nn.Module, name: str) -> str:
    # transformers 5 made CLIPTextModel flat; files keep the prefix of all other versions and of CLIPTextModelWithProjection.
    if type(model).__name__ == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _store(layer: CersaLinear, adapter_name: str, dtype: torch.dtype) -> StoredLayer:
    core = layer.cores[adapter_name]
    U, Vh = _changed_bases(layer, core.offset, core.rank)
    rows, columns = pivot_rows(U), pivot_rows(Vh.T)
    block = core_to_block(core.dense(), U, Vh, rows, columns)
    largest = float(block.abs().max())
    scale = 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0
    return StoredLayer(
        block=(block / scale).to(dtype),
        rows=rows,
        columns=columns,
        scale=scale,
        out_features=layer.out_features,
        in_features=layer.in_features,
        kept_rank=layer.kept_rank,
        offset=core.offset,
        residual_kept=layer.residual is not None,
        leading_singular_values=tuple(layer.s[:FINGERPRINT_LENGTH].tolist()),
    )


def _changed_bases(layer: CersaLinear, offset: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    region = slice(offset, offset + rank)
    return layer.U[:, region], layer.Vh[region]


def _resolve(
    adapter: AdapterFile, components: dict[str, nn.Module], where: str
) -> dict[str, dict[str, tuple[nn.Module, StoredLayer]]]:
    """Finds the module of every stored layer: component -> module name -> (module, layer)."""
    targets: dict[str, dict[str, tuple[nn.Module, StoredLayer]]] = {}
    problems = []
    lone = set(components) == {LONE_COMPONENT} and len({key.partition(".")[0] for key in adapter.layers}) == 1
    for key, stored in adapter.layers.items():
        component, _, module_name = key.partition(".")
        component = LONE_COMPONENT if lone else component
        if component not in components:
            raise BaseMismatchError(f"{where}: it has a component {component!r}, this model has {sorted(components)}")
        modules = dict(components[component].named_modules())
        names = (module_name, module_name.removeprefix("text_model."), f"text_model.{module_name}")
        name = next((name for name in names if name in modules), None)
        if name is None or not isinstance(modules[name], nn.Linear | CersaLinear):
            found = "no such layer" if name is None else f"it is a {type(modules[name]).__module__}, unload other adapters first"
            problems.append(f"{key} ({found})")
            continue
        module = modules[name]
        if (module.out_features, module.in_features) != (stored.out_features, stored.in_features):
            found, expected = (module.out_features, module.in_features), (stored.out_features, stored.in_features)
            problems.append(f"{key} (the model has {found}, the adapter {expected})")
            continue
        targets.setdefault(component, {})[name] = (module, stored)
    if problems:
        raise BaseMismatchError(
            f"{where}: {len(problems)} of {len(adapter.layers)} layers do not fit this model, e.g. {', '.join(problems[:3])}: "
            f"load it into its own base{_base_name(adapter)}"
        )
    return targets


def _base_name(adapter: AdapterFile) -> str:
    name = adapter.base_model.get("name_or_path")
    return f" ({name})" if name else ""


def _check_room(name: str, layer: CersaLinear, stored: StoredLayer, adapter_name: str) -> None:
    if adapter_name in layer.cores:
        raise ConfigError(f"adapter {adapter_name!r} is already loaded: choose another adapter_name or unload it")
    if layer.kept_rank != stored.kept_rank or (layer.residual is not None) != stored.residual_kept:
        raise ConfigError(
            f"layer {name} keeps {layer.kept_rank} components, the adapter was trained with {stored.kept_rank} (or with the "
            "residual kept in one and dropped in the other): unload the loaded adapter first"
        )


def _fingerprint_distance(singular_values: torch.Tensor, stored: StoredLayer) -> float:
    expected = torch.tensor(stored.leading_singular_values, dtype=torch.float64)
    if len(expected) > len(singular_values):
        return math.inf
    found = singular_values[: len(expected)].double().cpu()
    return float((found - expected).abs().max() / expected.max().clamp_min(torch.finfo(torch.float64).tiny))


def _check_fingerprints(distances: dict[str, float], adapter: AdapterFile, where: str) -> None:
    wrong = {name: distance for name, distance in distances.items() if distance > FINGERPRINT_TOLERANCE}
    if wrong:
        worst = sorted(wrong, key=wrong.get, reverse=True)[:3]
        listing = ", ".join(f"{name} ({wrong[name]:.1%})" for name in worst)
        raise BaseMismatchError(
            f"{where}: trained on another base model{_base_name(adapter)}: the leading singular values of {len(wrong)} of "
            f"{len(distances)} layers differ from this model's, worst {listing}"
        )


def _solve(name: str, layer: CersaLinear, stored: StoredLayer, where: str) -> torch.Tensor:
    block = stored.block.double() * stored.scale
    try:
        core = block_to_core(block, *_changed_bases(layer, stored.offset, stored.core_rank), stored.rows, stored.columns)
    except torch.linalg.LinAlgError as error:
        raise AdapterFormatError(f"{where}: layer {name}: its pivot rows or columns are dependent in this base") from error
    if not torch.isfinite(core).all():
        raise AdapterFormatError(f"{where}: layer {name}: its pivot rows or columns are dependent in this base")
    return core
