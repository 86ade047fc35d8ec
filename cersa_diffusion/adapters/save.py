"""Saving the cores of a model as an adapter file."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from cersa_diffusion.adapters.file import AdapterFile, StoredLayer, write_adapter_file
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.functional import Decomposition, block_to_core, core_to_block, float64, low_rank_factors
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers, components_of
from cersa_diffusion.weights.fingerprint import SINGULAR_VALUES


def save_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float16,
    save_energy: float | None = None,
    save_bases: bool = False,
    config: dict | None = None,
    base_model: dict | None = None,
    training: dict | None = None,
) -> dict[str, float]:
    """Saves the cores of one adapter as pivot blocks of the weight change.

    Args:
        model: an injected model, or the components of a pipeline by name (``{name: model}``).
        path: the file to write.
        adapter_name: the name of the cores.
        dtype: storage dtype of the blocks: float16, bfloat16 or float32.
        save_energy: store only the leading part of every layer's change that holds this share of its squared energy, in (0, 1],
            if that makes the file smaller; default: all of it.
        save_bases: also store the kept singular vectors and values (float32, or float16 with a 16-bit dtype). The file is much
            larger, but needs no decomposition and gives the trained result on any variant of the base.
        config: method settings for the header, by component.
        base_model: the source of the model ("name_or_path", "revision") for the header; of a folder only its name is written.
        training: facts about the training run for the header.

    Returns:
        "component.module" -> relative Frobenius error of the layer's stored weight change.

    Raises:
        ConfigError: the model has no such adapter, or a setting is out of range; nothing is written.
        NonFiniteError: a core holds NaN or infinity; nothing is written.
    """
    options = {"adapter_name": adapter_name, "dtype": dtype, "save_energy": save_energy, "save_bases": save_bases}
    adapter = collect_adapter(model, **options, config=config, base_model=base_model, training=training)
    write_adapter_file(adapter, path)
    return {name: layer.error for name, layer in adapter.layers.items()}


def collect_adapter(
    model: nn.Module | Mapping[str, nn.Module],
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float16,
    save_energy: float | None = None,
    save_bases: bool = False,
    config: dict | None = None,
    base_model: dict | None = None,
    training: dict | None = None,
) -> AdapterFile:
    """The content of the file that `save_adapter` writes, with the same arguments and errors; `load_adapter` accepts it too."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"dtype is {dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    if save_energy is not None and not 0 < save_energy <= 1:
        raise ConfigError(f"save_energy is {save_energy}, expected a share in (0, 1] such as 0.99, or None to store everything")
    layers = {}
    for component, module in components_of(model).items():
        for name, layer in cersa_layers(module).items():
            if adapter_name in layer.cores:
                key = f"{component}.{_canonical_name(module, name)}"
                layers[key] = _store(key, layer, adapter_name, dtype, save_energy, save_bases)
    if not layers:
        raise ConfigError(f"no CERSA layer has an adapter {adapter_name!r}: inject or load it first")
    return AdapterFile(layers, config or {}, base_model or {}, training or {})


def _canonical_name(model: nn.Module, name: str) -> str:
    # transformers 5 removed a prefix from CLIPTextModel; files keep it, as all other versions and CLIPTextModelWithProjection do.
    if type(model).__name__ == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _store(
    key: str, layer: CersaLinear, adapter_name: str, dtype: torch.dtype, save_energy: float | None, save_bases: bool
) -> StoredLayer:
    core = layer.cores[adapter_name]
    change = float64(core.dense())
    if not torch.isfinite(change).all():
        raise NonFiniteError(f"layer {key}: the adapter holds NaN or infinity (training diverged?), nothing was written")
    # A loaded core keeps the rank that it was trained with, even if its present layer keeps more components.
    kept_rank = core.trained_kept_rank or layer.kept_rank
    if save_bases:
        kept_rank = min(kept_rank, layer.kept_rank)  # the layer does not have further components
    U, Vh = layer.U[:, core.region], layer.Vh[core.region]
    rows, columns = layer.pivots(core.rank, core.offset)
    factors = [core_to_block(change, U, Vh, rows, columns)]
    if save_energy is not None:
        left, right = low_rank_factors(change, save_energy)
        if 2 * left.shape[1] < core.rank:
            factors = [float64(U[rows.to(U.device)]) @ left, right @ float64(Vh[:, columns.to(Vh.device)])]
    scales = [_power_of_two(factor) for factor in factors]
    stored = StoredLayer(
        factors=tuple((factor / scale).to("cpu", dtype) for factor, scale in zip(factors, scales, strict=True)),
        rows=rows,
        columns=columns,
        scale=math.prod(scales),
        out_features=layer.out_features,
        in_features=layer.in_features,
        kept_rank=kept_rank,
        offset=core.offset,
        residual_kept=layer.residual is not None,
        leading_singular_values=tuple(layer.s[: min(SINGULAR_VALUES, kept_rank)].tolist()),
        entries=layer.base_entries,
        bases=_stored_bases(layer, kept_rank, dtype) if save_bases else None,
    )
    size = float(change.norm())
    if not size:
        return stored
    restored = block_to_core(stored.block(), U, Vh, rows, columns).to(change.device)
    return replace(stored, error=float((restored - change).norm()) / size)


def _power_of_two(tensor: torch.Tensor) -> float:
    largest = float(tensor.abs().max())
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def _stored_bases(layer: CersaLinear, kept_rank: int, dtype: torch.dtype) -> Decomposition:
    # Orthonormal columns need the digits of float16, and not the range of bfloat16.
    basis_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    U, s, Vh = layer.U[:, :kept_rank], layer.s[:kept_rank], layer.Vh[:kept_rank]
    return Decomposition(U.to("cpu", basis_dtype), s.to("cpu", torch.float32), Vh.to("cpu", basis_dtype))
