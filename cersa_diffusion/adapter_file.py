"""The adapter file: safetensors that hold, per layer, what no choice of singular vectors can change.

A core stored in the coordinates of one SVD is garbage in those of another solver, machine or base dtype. So the file holds the
block of the weight change ``dW = U D Vh`` at r pivot rows and r pivot columns, from which the core is solved for in the
coordinates of whatever base it meets. docs/file-format.md describes it for other readers.
"""

import json
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from cersa_diffusion.errors import AdapterFormatError, NonFiniteError

DEFAULT_FILE_NAME = "pytorch_cersa_weights.safetensors"
HEADER_ENTRY = "cersa"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an adapter file.

    `block` times `scale` is ``dW[rows, columns]``; the scale is a power of two that keeps 16-bit storage away from
    subnormal numbers. The change lies in the components from `offset` on. `leading_singular_values` are the fingerprint of
    the base weight.
    """

    block: Tensor
    rows: Tensor
    columns: Tensor
    scale: float
    out_features: int
    in_features: int
    kept_rank: int
    offset: int
    residual_kept: bool
    leading_singular_values: tuple[float, ...]

    @property
    def core_rank(self) -> int:
        """r, the size of the block."""
        return self.block.shape[0]

    def facts(self) -> dict:
        """What the file's header says about this layer."""
        return {
            "m": self.out_features,
            "n": self.in_features,
            "k": self.kept_rank,
            "r": self.core_rank,
            "o": self.offset,
            "residual": self.residual_kept,
            "scale": self.scale,
            "s": list(self.leading_singular_values),
        }


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        layers: "component.module" -> layer, with component `unet`, `transformer`, `text_encoder`, ... or `model`.
        config: method settings (`CersaConfig.to_dict`) by component.
        base_model: what the adapter was trained on, free-form ("name_or_path", "revision").
        training: facts of the training run, free-form (steps, learning rate, instance prompt, seed, versions).
    """

    layers: dict[str, StoredLayer]
    config: dict
    base_model: dict
    training: dict


def write_adapter_file(adapter: AdapterFile, path: str | os.PathLike) -> None:
    """Writes the file under a temporary name and renames it, so that an interrupted save leaves the old file.

    Raises:
        NonFiniteError: NaN or infinity in a layer; nothing is written.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        if not torch.isfinite(layer.block).all():
            raise NonFiniteError(f"layer {name}: the adapter holds NaN or infinity (training diverged?), nothing was written")
        tensors[f"{name}.block"] = layer.block.contiguous().cpu()
        tensors[f"{name}.rows"] = layer.rows.to(torch.int32).contiguous().cpu()
        tensors[f"{name}.cols"] = layer.columns.to(torch.int32).contiguous().cpu()
    header = {
        "format_version": FORMAT_VERSION,
        "layers": {name: layer.facts() for name, layer in adapter.layers.items()},
        "config": adapter.config,
        "base_model": adapter.base_model,
        "training": adapter.training,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # One metadata entry: safetensors writes several in random order, and the same adapter should be the same bytes.
        content = save(tensors, metadata={HEADER_ENTRY: json.dumps(header, sort_keys=True)})
        # Plain open() follows the umask; safetensors' own save_file would make the file private.
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter_file(path: str | os.PathLike) -> AdapterFile:
    """Reads and checks a whole file.

    Raises:
        AdapterFormatError: missing, truncated, foreign or inconsistent; the message names the file and what is wrong.
        NonFiniteError: NaN or infinity in a layer.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFormatError(f"{path}: no such file, expected a CERSA adapter (usually {DEFAULT_FILE_NAME})")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: not a readable safetensors file ({error}): copy or download it again") from error
    try:
        return _parse(metadata, tensors)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from error
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error


def _parse(metadata: dict[str, str], tensors: dict[str, Tensor]) -> AdapterFile:
    if HEADER_ENTRY not in metadata:
        raise AdapterFormatError("not a CERSA adapter (LoRA files are loaded by pipe.load_lora_weights)")
    try:
        header = json.loads(metadata[HEADER_ENTRY])
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("the header is damaged: it is not JSON") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        found = header.get("format_version") if isinstance(header, dict) else None
        raise AdapterFormatError(f"format version {found!r}, this release reads {FORMAT_VERSION}: update cersa-diffusion")
    parts = {name: header.get(name) for name in ("layers", "config", "base_model", "training")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise AdapterFormatError(f"header entry {name!r} is missing or no JSON object")
    facts = parts.pop("layers")
    expected = {f"{name}.{kind}" for name in facts for kind in ("block", "rows", "cols")}
    if not facts or expected != set(tensors):
        raise AdapterFormatError(
            f"tensors do not fit the header: missing {sorted(expected - set(tensors))[:3]}, "
            f"unexpected {sorted(set(tensors) - expected)[:3]}"
        )
    layers = {
        name: _parse_layer(name, facts[name], *(tensors[f"{name}.{kind}"] for kind in ("block", "rows", "cols")))
        for name in facts
    }
    return AdapterFile(layers, **parts)


def _parse_layer(name: str, facts: object, block: Tensor, rows: Tensor, columns: Tensor) -> StoredLayer:
    try:
        m, n, k, r, o = (facts[key] for key in "mnkro")
        scale, residual, leading = facts["scale"], facts["residual"], tuple(facts["s"])
    except (KeyError, TypeError) as error:
        raise AdapterFormatError(f"layer {name}: damaged description in the header") from error
    numbers = [scale, *leading]
    well_formed = all(type(value) is int for value in (m, n, k, r, o)) and all(type(value) in (int, float) for value in numbers)
    if not well_formed or type(residual) is not bool or not leading or not (1 <= r <= k - o <= k <= min(m, n)):
        raise AdapterFormatError(
            f"layer {name}: damaged description in the header, or ranks outside 1 <= r <= k - o, k <= min(m, n)"
        )
    if block.shape != (r, r) or rows.shape != (r,) or columns.shape != (r,):
        raise AdapterFormatError(
            f"layer {name}: block {tuple(block.shape)}, rows {tuple(rows.shape)}, cols {tuple(columns.shape)}, expected rank {r}"
        )
    if not block.is_floating_point() or rows.dtype != torch.int32 or columns.dtype != torch.int32:
        raise AdapterFormatError(f"layer {name}: expected a floating block and int32 indices, found {block.dtype}, {rows.dtype}")
    for kind, indices, size in (("rows", rows, m), ("cols", columns, n)):
        if indices.min() < 0 or indices.max() >= size or indices.unique().numel() != r:
            raise AdapterFormatError(f"layer {name}: {kind} are not {r} different indices below {size}")
    if not torch.isfinite(block).all() or not all(math.isfinite(value) for value in numbers):
        raise NonFiniteError(f"layer {name}: NaN or infinity in the adapter")
    return StoredLayer(block, rows.long(), columns.long(), float(scale), m, n, k, o, residual, leading)
