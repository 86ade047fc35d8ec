"""safetensors files written and read tensor by tensor, so that a checkpoint need not fit into memory."""

import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from torch import Tensor

from cersa_diffusion.errors import ConfigError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFileWriter:
    """Writes a safetensors file whose tensors come one at a time and need not be known beforehand.

    The library's own writer wants all tensors at once. Here they go to a temporary file per item size, which `finish` joins
    behind the header, widest first, so that every tensor is aligned.

    Args:
        path: the file; appears with `finish`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._bodies: dict[int, BinaryIO] = {}
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor.

        Raises:
            ConfigError: a dtype that is not written.
        """
        if tensor.dtype not in DTYPES:
            raise ConfigError(f"tensor {name} has dtype {tensor.dtype}, expected one of {[str(dtype) for dtype in DTYPES]}")
        size = tensor.element_size()
        if size not in self._bodies:
            self._bodies[size] = open(self._body_path(size), "wb")
        body = self._bodies[size]
        self._entries[name] = (DTYPES[tensor.dtype], list(tensor.shape), size, body.tell())
        body.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Writes the file and removes the temporary ones."""
        starts, end = {}, 0
        for size in sorted(self._bodies, reverse=True):
            starts[size], end = end, end + self._bodies[size].tell()
            self._bodies[size].close()
        header: dict = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape, size, position) in sorted(self._entries.items(), key=lambda entry: (-entry[1][2], entry[1][3])):
            start, count = starts[size] + position, size
            for extent in shape:
                count *= extent
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(self.path, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for size in starts:
                with open(self._body_path(size), "rb") as body:
                    shutil.copyfileobj(body, file, 2**20)
        self.close()

    def close(self) -> None:
        """Removes the temporary files; without `finish` nothing is left."""
        for size, body in self._bodies.items():
            body.close()
            self._body_path(size).unlink(missing_ok=True)
        self._bodies = {}

    def _body_path(self, size: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{size}.tmp")


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, memory-mapped; the mapping ends with the tensor."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def tensor_places(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Where the tensors of a diffusers or transformers model folder are.

    Args:
        folder: a model folder, with one safetensors file or with several and an index.
        variant: of the file names ("fp16").

    Returns:
        Tensor name -> file.

    Raises:
        ConfigError: no safetensors weights, or an index that does not fit its files; the message says what to do.
    """
    infix = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
        if single.is_file():
            return dict.fromkeys(_names(single), single)
        if index.is_file():
            return _from_index(index)
    found = sorted(path.name for path in folder.iterdir())
    raise ConfigError(
        f"{folder}: no weights in safetensors{f' of variant {variant!r}' if variant else ''}, it holds {found}: "
        "save the model with save_pretrained(..., safe_serialization=True), or name the right variant"
    )


def _from_index(index: Path) -> dict[str, Path]:
    try:
        places = {name: index.with_name(Path(file).name) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not the index of a sharded checkpoint: copy or download it again") from error
    present = {name for path in set(places.values()) for name in _names(path)}
    missing = sorted(set(places) - present)
    if missing:
        raise ConfigError(f"{index}: {len(missing)} tensors are in none of its files, e.g. {missing[:3]}: download it again")
    return places


def _names(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file ({error}): copy or download it again") from error
