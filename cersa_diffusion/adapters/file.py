"""The adapter file: safetensors with, for each layer, numbers that do not depend on the choice of singular vectors.

A core in the coordinates of one SVD is useless in those of another solver, machine or base dtype. Therefore the file holds the
block of the weight change ``dW = U D Vh`` at r pivot rows and r pivot columns. Loading solves for the core in the coordinates of
the present base. docs/file-format.md describes the format.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from cersa_diffusion.errors import AdapterFormatError, ConfigError, NonFiniteError
from cersa_diffusion.files import atomic_write, public_sources
from cersa_diffusion.functional import Decomposition, float64
from cersa_diffusion.weights.checksum import NO_CHECKSUM, is_intact, write_checksum
from cersa_diffusion.weights.fingerprint import ENTRIES

DEFAULT_FILE_NAME = "pytorch_cersa_weights.safetensors"
HEADER_ENTRY = "cersa"
FORMAT_VERSION = 2
# The header of a thousand layers and their fingerprints takes less than one MiB.
HEADER_LIMIT = 8 * 2**20
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
# Component and module. Names are only compared with those of the model, but messages print them.
_LAYER_NAME = re.compile(r"(?=.{1,500}$)[\w-]+(\.[\w-]+)+", re.ASCII)
_PICKLE = "a pickle, which is not opened because it may run code: CERSA adapters are safetensors files"
# The bytes in front of the 64 digits of the checksum; the quotes are escaped because the header's JSON is a string in JSON.
_CHECKSUM_MARKER = b'{\\"checksum\\": \\"'


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an adapter file.

    Attributes:
        factors: the block divided by `scale`: one (r, r) tensor, or two of shapes (r, q) and (q, r) that are its factors.
        rows: (r,) int64 pivot rows of the weight change.
        columns: (r,) int64 pivot columns.
        scale: a power of two that prevents overflow and subnormal numbers in 16-bit storage.
        out_features: m.
        in_features: n.
        kept_rank: k.
        offset: the first component that is changed.
        residual_kept: whether the weight outside the kept components was kept.
        leading_singular_values: those of the base weight; with `entries`, its fingerprint.
        entries: `cersa_diffusion.weights.fingerprint.base_entries` of the base weight; empty if they were unknown.
        error: relative Frobenius error of the stored weight change (rounding and `save_energy`).
        bases: the kept singular triplets, U (m, k), s (k,), Vh (k, n), if the file is self-contained.
    """

    factors: tuple[Tensor, ...]
    rows: Tensor
    columns: Tensor
    scale: float
    out_features: int
    in_features: int
    kept_rank: int
    offset: int
    residual_kept: bool
    leading_singular_values: tuple[float, ...]
    entries: tuple[float, ...] = ()
    error: float = 0.0
    bases: Decomposition | None = None

    @property
    def core_rank(self) -> int:
        """r, the size of the block."""
        return self.rows.shape[0]

    def block(self) -> Tensor:
        """``dW[rows, columns]``: (r, r), float64."""
        left, *right = self.factors
        block = float64(left)
        return (block @ float64(right[0]) if right else block) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this layer in the file, by the last part of their key."""
        names = ("block",) if len(self.factors) == 1 else ("left", "right")
        indices = {"rows": self.rows.to(torch.int32), "cols": self.columns.to(torch.int32)}
        bases = self.bases._asdict() if self.bases else {}
        return dict(zip(names, self.factors, strict=True)) | indices | bases

    def facts(self) -> dict:
        """The description of this layer in the header of the file."""
        return {
            "m": self.out_features,
            "n": self.in_features,
            "k": self.kept_rank,
            "r": self.core_rank,
            "q": None if len(self.factors) == 1 else self.factors[0].shape[1],
            "o": self.offset,
            "residual": self.residual_kept,
            "bases": self.bases is not None,
            "scale": self.scale,
            "error": self.error,
            "s": list(self.leading_singular_values),
            "entries": list(self.entries),
        }


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file.

    Attributes:
        layers: "component.module" -> layer, with component `unet`, `transformer`, `text_encoder`, ... or `model`.
        config: method settings (`CersaConfig.to_dict`) by component.
        base_model: the base model in training, free-form ("name_or_path", "revision").
        training: facts about the training run, free-form (steps, learning rate, instance prompt, seed, versions).
        source: the origin of the content, for messages.
    """

    layers: dict[str, StoredLayer]
    config: dict
    base_model: dict
    training: dict
    source: str = "adapter"


def write_adapter_file(adapter: AdapterFile, path: str | os.PathLike) -> None:
    """Writes the file atomically: after an interrupted save or a power cut, the old file or the new one is there.

    Raises:
        NonFiniteError: a layer holds NaN or infinity; nothing is written.
        ConfigError: the values for the header are not plain JSON values, or too long; nothing is written.
    """
    for name, layer in adapter.layers.items():
        if not all(torch.isfinite(factor).all() for factor in layer.factors):
            raise NonFiniteError(f"layer {name}: the adapter holds NaN or infinity (training diverged?), nothing was written")
    tensors = {key: tensor.contiguous().cpu() for key, tensor in _tensors(adapter).items()}
    content = bytearray(save(tensors, metadata={HEADER_ENTRY: _header_text(adapter)}))
    write_checksum(content, _CHECKSUM_MARKER)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    return {f"{name}.{kind}": tensor for name, layer in adapter.layers.items() for kind, tensor in layer.tensors().items()}


def _header_text(adapter: AdapterFile) -> str:
    """The only metadata entry: safetensors writes several in random order, but equal adapters must give equal bytes."""
    header = {
        "format_version": FORMAT_VERSION,
        "layers": {name: layer.facts() for name, layer in adapter.layers.items()},
        "config": adapter.config,
        # A file that is passed on must not contain local paths of the base.
        "base_model": adapter.base_model | public_sources(adapter.base_model),
        "training": adapter.training,
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config, base_model and training must be plain finite JSON values: {error}") from error
    if len(text) > HEADER_LIMIT // 2:
        raise ConfigError(f"the header would be {len(text) / 2**20:.1f} MiB long: shorten config, base_model or training")
    return f'{{"checksum": "{NO_CHECKSUM}", {text[1:]}'


def read_adapter_file(path: str | os.PathLike) -> AdapterFile:
    """Reads a whole file and checks its structure, sizes, values, and the checksum over all bytes.

    Raises:
        AdapterFormatError: the file is missing, truncated, altered, inconsistent or not an adapter; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFormatError(f"{path}: no such file, expected a CERSA adapter (usually {DEFAULT_FILE_NAME})")
    try:
        return replace(_read(path), source=str(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{path}: not a readable safetensors file ({error}): copy or download it again") from error
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error


def to_state_dict(adapter: AdapterFile) -> dict[str, Tensor | str]:
    """The tensors of an adapter by key, and its header (JSON) under the name "cersa"."""
    return _tensors(adapter) | {HEADER_ENTRY: _header_text(adapter)}


def from_state_dict(state_dict: Mapping[str, Tensor | str]) -> AdapterFile:
    """The inverse of `to_state_dict`, with the checks of `read_adapter_file`; the mapping is not changed.

    Raises:
        AdapterFormatError: the mapping is not the state dict of an adapter, or is inconsistent.
    """
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    header_text = state_dict.get(HEADER_ENTRY)
    if not isinstance(header_text, str) or len(tensors) != len(state_dict) - 1:
        raise AdapterFormatError(
            f"state dict: expected tensors and a header under {HEADER_ENTRY!r}, as pipe.cersa_state_dict() returns them"
        )
    try:
        return replace(_parse(_parse_header(header_text), tensors), source="state dict")
    except AdapterFormatError as error:
        raise AdapterFormatError(f"state dict: {error}") from error


def _read(path: Path) -> AdapterFile:
    if path.suffix in PICKLE_SUFFIXES:
        raise AdapterFormatError(_PICKLE)
    with open(path, "rb") as file:
        size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            if prefix[:4] == b"PK\x03\x04" or prefix[:1] == b"\x80":
                raise AdapterFormatError(_PICKLE)
            raise AdapterFormatError("not a readable safetensors file, or only the beginning of one: copy or download it again")
        if length > HEADER_LIMIT:
            raise AdapterFormatError(f"its header has {length >> 20} MiB, expected at most {HEADER_LIMIT >> 20} for an adapter")
        outer = file.read(length)
        metadata = _strict_json(outer, "not a readable safetensors file: its header is not JSON").get("__metadata__")
        if not isinstance(metadata, dict) or not isinstance(metadata.get(HEADER_ENTRY), str):
            raise AdapterFormatError("not a CERSA adapter (LoRA files are loaded by pipe.load_lora_weights)")
        header = _parse_header(metadata[HEADER_ENTRY])
        # The whole file is read only now, so that another checkpoint of many gigabytes is never read.
        content = prefix + outer + file.read()
    if not is_intact(content, _CHECKSUM_MARKER, 8 + length):
        raise AdapterFormatError("its bytes do not match its checksum, it was damaged or altered: copy or download it again")
    try:
        tensors = load(content)
    except (KeyError, ValueError, TypeError) as error:  # an element type that torch does not know
        raise AdapterFormatError(f"not a readable safetensors file ({error!r})") from error
    return _parse(header, tensors)


def _strict_json(text: str | bytes, complaint: str) -> dict:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{complaint} ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{complaint} (not an object)")
    return value


def _parse_header(text: str) -> dict:
    header = _strict_json(text, "the header is damaged: it is not JSON")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterFormatError(f"format version {version!r}, this release reads {FORMAT_VERSION}: update cersa-diffusion")
    return header


def _parse(header: dict, tensors: dict[str, Tensor]) -> AdapterFile:
    entries = {name: header.get(name) for name in ("layers", "config", "base_model", "training")}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise AdapterFormatError(f"header entry {name!r} is missing or not a JSON object")
    descriptions = entries.pop("layers")
    tensor_names = {name: _tensor_names(name, description) for name, description in descriptions.items()}
    expected = {f"{name}.{tensor_name}" for name in descriptions for tensor_name in tensor_names[name]}
    if not descriptions or expected != set(tensors):
        raise AdapterFormatError(
            f"tensors do not fit the header: missing {sorted(expected - set(tensors))[:3]}, "
            f"unexpected {sorted(set(tensors) - expected)[:3]}"
        )
    layers = {}
    for name, description in descriptions.items():
        layer_tensors = {tensor_name: tensors[f"{name}.{tensor_name}"] for tensor_name in tensor_names[name]}
        layers[name] = _parse_layer(name, description, layer_tensors)
    return AdapterFile(layers, **entries)


def _tensor_names(name: str, description: object) -> list[str]:
    if not isinstance(description, dict) or not _LAYER_NAME.fullmatch(name):
        raise AdapterFormatError(f"layer {name[:100]!a}: not a layer name, or damaged description in the header")
    block = ["block"] if description.get("q") is None else ["left", "right"]
    return [*block, "rows", "cols", *(["U", "s", "Vh"] if description.get("bases") is True else [])]


def _parse_layer(name: str, description: dict, tensors: dict[str, Tensor]) -> StoredLayer:
    damaged = f"layer {name}: damaged description in the header"
    try:
        m, n, k, r, o = (description[key] for key in "mnkro")
        q, scale, error, residual = (description[key] for key in ("q", "scale", "error", "residual"))
        leading, entries, has_bases = description["s"], description["entries"], description.get("bases")
    except KeyError as cause:
        raise AdapterFormatError(damaged) from cause
    if not isinstance(leading, list) or not isinstance(entries, list):
        raise AdapterFormatError(damaged)
    numbers = [scale, error, *leading, *entries]
    integers = [m, n, k, r, o, *([] if q is None else [q])]
    if not all(type(value) is int for value in integers) or not all(type(value) in (int, float) for value in numbers):
        raise AdapterFormatError(damaged)
    if type(residual) is not bool or type(has_bases) is not bool or not leading or len(entries) not in (0, ENTRIES):
        raise AdapterFormatError(damaged)
    if not (1 <= r <= k - o <= k <= min(m, n)) or (q is not None and not 1 <= q <= r):
        raise AdapterFormatError(f"{damaged}: ranks outside 1 <= r <= k - o, k <= min(m, n), 1 <= q <= r")
    shapes = {"block": (r, r), "left": (r, q), "right": (q, r), "rows": (r,), "cols": (r,), "U": (m, k), "s": (k,), "Vh": (k, n)}
    for kind, tensor in tensors.items():
        dtypes = (torch.int32,) if kind in ("rows", "cols") else (torch.float16, torch.bfloat16, torch.float32)
        if tensor.shape != shapes[kind] or tensor.dtype not in dtypes:
            actual = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise AdapterFormatError(f"layer {name}: {kind} is {actual}, expected {shapes[kind]} in one of {dtypes}")
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError(f"layer {name}: NaN or infinity in {kind}")
    if not all(-1e300 < value < 1e300 for value in numbers) or scale <= 0 or min(error, *leading) < 0:
        raise AdapterFormatError(f"layer {name}: numbers out of range in the header")
    for kind, size in (("rows", m), ("cols", n)):
        indices = tensors[kind]
        if indices.min() < 0 or indices.max() >= size or indices.unique().numel() != r:
            raise AdapterFormatError(f"layer {name}: {kind} are not {r} different indices below {size}")
    return StoredLayer(
        factors=tuple(tensors[kind] for kind in ("block", "left", "right") if kind in tensors),
        rows=tensors["rows"].long(),
        columns=tensors["cols"].long(),
        scale=float(scale),
        out_features=m,
        in_features=n,
        kept_rank=k,
        offset=o,
        residual_kept=residual,
        leading_singular_values=tuple(map(float, leading)),
        entries=tuple(map(float, entries)),
        error=float(error),
        bases=Decomposition(tensors["U"], tensors["s"], tensors["Vh"]) if has_bases else None,
    )
