"""Exports an adapter as a LoRA file, for programs without CERSA.

The change of a layer is a product of thin matrices, ``U D Vh``. With the singular value decomposition ``D = P S Q^T`` of the
small core, ``lora_B = U P sqrt(S)`` and ``lora_A = sqrt(S) Q^T Vh`` give it exactly, and their leading columns give the best
approximation of a lower rank. A LoRA cannot express that CERSA drops the rest of the weight: the file is exact on the truncated
base, but is used on the original base. The export measures the difference.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cersa_diffusion.adapters.file import AdapterFile, read_adapter_file
from cersa_diffusion.adapters.load import load_adapter
from cersa_diffusion.errors import ConfigError, NonFiniteError
from cersa_diffusion.families.names import KOHYA_PREFIXES, is_text_encoder
from cersa_diffusion.files import atomic_write, safetensors_bytes
from cersa_diffusion.functional import float64
from cersa_diffusion.inject import restore_base
from cersa_diffusion.interop.lora_difference import OutputDifference, captured_inputs, output_differences
from cersa_diffusion.layers.linear import CersaLinear
from cersa_diffusion.layers.model import cersa_layers, components_of
from cersa_diffusion.memory.plan import layer_kind
from cersa_diffusion.pipelines.methods import pipeline_components
from cersa_diffusion.pipelines.open import base_pipeline

Format = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraLayer:
    """One exported layer: "component.module", the rank of its core, and the energy of its change in the file and in total."""

    name: str
    core_rank: int
    energy: float
    total_energy: float


@dataclass(frozen=True)
class LoraExport:
    """The result of an export; ``str()`` is a table.

    Attributes:
        path, size_bytes: the file and its size.
        format: key convention.
        rank: rank of all layers.
        layers: the exported layers.
        differences: component -> relative difference of its output to that of the CERSA model; empty if not measured.
    """

    path: Path
    format: Format
    rank: int
    size_bytes: int
    layers: list[LoraLayer]
    differences: dict[str, OutputDifference]

    @property
    def energy(self) -> float:
        """Share of the squared energy of all weight changes that is in the file."""
        return _share(self.layers)

    def energy_by_kind(self) -> dict[str, float]:
        """The same share for every kind of layer ("unet to_q")."""
        layers_by_kind = defaultdict(list)
        for layer in self.layers:
            layers_by_kind[f"{layer.name.partition('.')[0]} {layer_kind(layer.name)}"].append(layer)
        return {kind: _share(layers) for kind, layers in sorted(layers_by_kind.items())}

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.layers)} layers, rank {self.rank}, {self.size_bytes / 2**20:.1f} MiB ({self.format})"]
        lines.append(f"energy of the weight changes kept: {self.energy:.2%}")
        lines += [f"  {kind}: {energy:.2%}" for kind, energy in self.energy_by_kind().items()]
        for component, difference in self.differences.items():
            lines.append(f"{component}, relative difference of its output to that of the CERSA model: {difference}")
        if not self.differences:
            lines.append("output differences: not measured (no pipeline and no inputs were given)")
        return "\n".join(lines)


def export_lora(
    model_or_file,
    path: str | os.PathLike,
    *,
    rank: int = 64,
    format: Format = "diffusers",
    dtype: torch.dtype = torch.float16,
    base=None,
    inputs: Mapping[str, tuple[tuple, dict]] | None = None,
    prompt: str = "a photo",
) -> LoraExport:
    """Writes the active adapters of a model, or an adapter file, as a LoRA.

    Args:
        model_or_file: a pipeline, an injected model, its components by name, or an adapter file (path or content).
        path: safetensors file to write.
        rank: rank of all layers, because loaders scale mixed ranks incorrectly: a change of a higher rank is truncated, one of a
            lower rank is padded with zeros.
        format: "diffusers" (PEFT keys and metadata) or "kohya" (ComfyUI, Forge, A1111, InvokeAI; UNet pipelines only).
        dtype: dtype of the tensors in the file.
        base: for an adapter file: its base, as a pipeline, a model, components, or the folder or hub id of a pipeline. The base
            is not changed. The base that the file names is not loaded.
        inputs: component -> (arguments, keyword arguments) of the forward pass in which the outputs are compared; default: the
            first inputs of the components when the pipeline draws `prompt`.
        prompt: see `inputs`.

    Returns:
        The energy that was kept, and the output differences on the original base (where the file will be used) and the
        truncated base.

    Raises:
        ConfigError: no adapter is active, `rank` is below 1, or the format has no keys for a component; nothing is written.
        NonFiniteError: the change holds NaN or infinity; nothing is written.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1")
    if format not in ("diffusers", "kohya"):
        raise ConfigError(f"format is {format!r}, expected 'diffusers' or 'kohya'")
    if not isinstance(model_or_file, str | os.PathLike | AdapterFile):
        return _export(model_or_file, _components(model_or_file), Path(path), rank, format, dtype, inputs, prompt)
    adapter = model_or_file if isinstance(model_or_file, AdapterFile) else read_adapter_file(model_or_file)
    source = base_pipeline(adapter, base) if base is None or isinstance(base, str | os.PathLike) else base
    components = _components(source)
    if any(cersa_layers(model) for model in components.values()):
        raise ConfigError("base has an adapter already: export that adapter, or pass a base without adapters")
    load_adapter(components, adapter, adapter_name="export", show_progress=False)
    try:
        return _export(source, components, Path(path), rank, format, dtype, inputs, prompt)
    finally:
        for model in components.values():
            restore_base(model)


def _export(source, components, path: Path, rank: int, format: Format, dtype, inputs, prompt: str) -> LoraExport:
    layers, factors = [], {}
    for component, model in components.items():
        for name, layer in cersa_layers(model).items():
            if layer.active_core()[0] is not None:
                key = f"{component}.{name}"
                described, factors[key] = _lora_factors(key, layer, rank, dtype)
                layers.append(described)
    if not layers:
        raise ConfigError("no active CERSA adapter to export: load one, or enable it")
    if inputs is None and hasattr(source, "components"):
        inputs = captured_inputs(source, components, prompt)
    differences = output_differences(components, factors, inputs or {})
    file_of_format = {"diffusers": _diffusers_file, "kohya": _kohya_file}[format]
    content = safetensors_bytes(*file_of_format(components, factors, rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return LoraExport(path, format, rank, len(content), layers, differences)


def _lora_factors(key: str, layer: CersaLinear, rank: int, dtype: torch.dtype) -> tuple[LoraLayer, tuple[Tensor, Tensor]]:
    core, offset = layer.active_core()
    core = float64(torch.diag(core) if core.ndim == 1 else core)
    if not torch.isfinite(core).all():
        raise NonFiniteError(f"layer {key}: the change holds NaN or infinity (training diverged?), nothing was written")
    region = slice(offset, offset + len(core))
    P, S, Q = torch.linalg.svd(core)
    kept = min(rank, len(S))
    up = (float64(layer.U[:, region]) @ P[:, :kept]) * S[:kept].sqrt()
    down = S[:kept, None].sqrt() * (Q[:kept] @ float64(layer.Vh[region]))
    up, down = nn.functional.pad(up, (0, rank - kept)), nn.functional.pad(down, (0, 0, 0, rank - kept))
    energy = S.square()
    return LoraLayer(key, len(S), float(energy[:kept].sum()), float(energy.sum())), (up.to(dtype), down.to(dtype))


def _share(layers: list[LoraLayer]) -> float:
    total = sum(layer.total_energy for layer in layers)
    return sum(layer.energy for layer in layers) / total if total else 1.0


def _diffusers_file(components, factors, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Imported here: peft is slow to import, and only this format needs it.
    from peft import LoraConfig

    tensors, settings = {}, {}
    for key, (up, down) in factors.items():
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    for component in components:
        names = sorted(key.partition(".")[2] for key in factors if key.partition(".")[0] == component)
        if names:
            for name, value in LoraConfig(r=rank, lora_alpha=rank, target_modules=names).to_dict().items():
                settings[f"{component}.{name}"] = sorted(value) if isinstance(value, set) else value
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}


def _kohya_file(components, factors, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    prefixes = dict(KOHYA_PREFIXES)
    if "text_encoder_2" in components:
        prefixes["text_encoder"] = "lora_te1"
    tensors = {}
    for key, (up, down) in factors.items():
        component, _, name = key.partition(".")
        if component not in prefixes:
            raise ConfigError(
                f"format='kohya' has no keys for {component!r}, only for {sorted(prefixes)}: use format='diffusers'"
            )
        if is_text_encoder(component) and not name.startswith("text_model."):
            name = f"text_model.{name}"
        stem = f"{prefixes[component]}_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=down.dtype)
    return tensors, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}


def _components(source) -> dict[str, nn.Module]:
    return pipeline_components(source) if hasattr(source, "components") else components_of(source)
