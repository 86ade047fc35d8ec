"""Exporting an adapter as a LoRA file, for programs that know no CERSA.

The change of a layer, ``U D Vh``, is a product of thin matrices already: with the singular value decomposition ``D = P S Q^T`` of
the small core, ``lora_B = U P sqrt(S)`` and ``lora_A = sqrt(S) Q^T Vh`` give it exactly, and their leading columns the best
approximation of a lower rank. What a LoRA cannot say is that CERSA drops the rest of the weight: exact on the truncated base, the
file is used on the original one. How much that matters is measured, not guessed.
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
from cersa_diffusion.pipelines.methods import pipeline_components
from cersa_diffusion.pipelines.open import base_pipeline

Format = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraLayer:
    """One exported layer: "component.module", the rank its change really has room for, and the share of energy in the file."""

    name: str
    core_rank: int
    energy: float
    total_energy: float


@dataclass(frozen=True)
class LoraExport:
    """What an export did; ``str()`` is a table.

    Attributes:
        path: the file.
        format: key convention.
        rank: the one rank of all layers.
        size_bytes: of the file.
        layers: the exported layers.
        differences: component -> relative difference of its output to that of the CERSA model; empty when nothing was measured.
    """

    path: Path
    format: Format
    rank: int
    size_bytes: int
    layers: list[LoraLayer]
    differences: dict[str, OutputDifference]

    @property
    def energy(self) -> float:
        """Share of the squared energy of all weight changes together that is in the file."""
        return _share(self.layers)

    def energy_by_kind(self) -> dict[str, float]:
        """The same for every kind of layer ("unet to_q")."""
        kinds = defaultdict(list)
        for layer in self.layers:
            parts = layer.name.split(".")
            kinds[f"{parts[0]} {'.'.join(parts[-2:]) if parts[-1].isdigit() else parts[-1]}"].append(layer)
        return {kind: _share(layers) for kind, layers in sorted(kinds.items())}

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.layers)} layers, rank {self.rank}, {self.size_bytes / 2**20:.1f} MiB ({self.format})"]
        lines.append(f"energy of the weight changes kept: {self.energy:.2%}")
        lines += [f"  {kind}: {energy:.2%}" for kind, energy in self.energy_by_kind().items()]
        for component, difference in self.differences.items():
            lines.append(f"{component}, relative difference of the output to the CERSA model's: {difference}")
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
        rank: of all layers alike (loaders mis-scale mixed ranks): changes of a higher rank are cut, those of a lower are padded
            with zeros.
        format: "diffusers" (PEFT keys and metadata) or "kohya" (ComfyUI, Forge, A1111, InvokeAI; UNet pipelines only).
        dtype: of the file.
        base: for a file: what to decompose, as a pipeline, a model, components, or the folder or hub id of a pipeline; it is
            left as it was. A file only says which one it is, and is not believed: name it.
        inputs: component -> (arguments, keyword arguments) of a forward pass, to measure output differences with; default: what
            the components are given when the pipeline draws `prompt`.
        prompt: see `inputs`.

    Returns:
        What was kept, and the measured output differences on the original base (how the file will be used) and the truncated one.

    Raises:
        ConfigError: no active adapter, a rank below 1, or a format that cannot say it; nothing is written.
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
        raise ConfigError("base carries an adapter already: export that, or give a base without")
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
    keys = _diffusers_file(components, factors, rank) if format == "diffusers" else _kohya_file(components, factors, rank)
    content = safetensors_bytes(*keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return LoraExport(path, format, rank, len(content), layers, differences)


def _lora_factors(key: str, layer: CersaLinear, rank: int, dtype: torch.dtype) -> tuple[LoraLayer, tuple[Tensor, Tensor]]:
    core, offset = layer.active_core()
    core = float64(torch.diag(core) if core.ndim == 1 else core)
    if not torch.isfinite(core).all():
        raise NonFiniteError(f"layer {key}: its change holds NaN or infinity (training diverged?), nothing was written")
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
    # Imported here: only this format needs it, and it is slow to import.
    from peft import LoraConfig

    tensors, facts = {}, {}
    for component in components:
        own = {key.partition(".")[2]: pair for key, pair in factors.items() if key.partition(".")[0] == component}
        for name, (up, down) in own.items():
            tensors |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
        if own:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(own)).to_dict()
            for name, value in config.items():
                facts[f"{component}.{name}"] = sorted(value) if isinstance(value, set) else value
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(facts, sort_keys=True)}


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
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    return tensors, facts


def _components(source) -> dict[str, nn.Module]:
    return pipeline_components(source) if hasattr(source, "components") else components_of(source)
