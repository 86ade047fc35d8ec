"""Writes and reads safetensors files tensor by tensor: a checkpoint may be larger than the memory."""

import json
import math
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
    """Writes a safetensors file one tensor at a time; the tensors need not be known in advance.

    The writer of safetensors takes all tensors at once. This class appends each tensor to a temporary file for its item size.
    `finish` writes the header and joins these files, the largest item size first, so that every tensor is aligned.

    Args:
        path: the file; `finish` creates it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._bodies: dict[int, BinaryIO] = {}
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor.

        Raises:
            ConfigError: the dtype is not supported.
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
            start = starts[size] + position
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size * math.prod(shape)]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(self.path, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for size in starts:
                with open(self._body_path(size), "rb") as body:
                    shutil.copyfileobj(body, file, 2**20)
        self.close()

    def close(self) -> None:
        """Removes the temporary files. Before `finish` no other file exists."""
        for size, body in self._bodies.items():
            body.close()
            self._body_path(size).unlink(missing_ok=True)
        self._bodies = {}

    def _body_path(self, size: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{size}.tmp")


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, memory-mapped as long as the tensor exists."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def tensor_places(folder: Path, variant: str | None = None) -> dict[str, Path]:
    """Finds the tensors of a diffusers or transformers model folder: tensor name -> file.

    Args:
        folder: a model folder, with one safetensors file, or with several and an index.
        variant: variant in the file names ("fp16").

    Raises:
        ConfigError: there are no safetensors weights, or the index does not match its files.
    """
    infix = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}{infix}.safetensors", folder / f"{stem}.safetensors.index{infix}.json"
        if single.is_file():
            return dict.fromkeys(_tensor_names(single), single)
        if index.is_file():
            return _from_index(index)
    files = sorted(path.name for path in folder.iterdir())
    raise ConfigError(
        f"{folder} has no safetensors weights{f' of variant {variant!r}' if variant else ''}, it holds {files}: "
        "save the model with save_pretrained(..., safe_serialization=True), or set the right variant"
    )


def _from_index(index: Path) -> dict[str, Path]:
    try:
        files = {name: index.with_name(Path(file).name) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not the index of a sharded checkpoint: copy or download it again") from error
    present = {name for path in set(files.values()) for name in _tensor_names(path)}
    missing = sorted(set(files) - present)
    if missing:
        raise ConfigError(f"{index}: {len(missing)} tensors are in none of its files, e.g. {missing[:3]}: download it again")
    return files


def _tensor_names(path: Path) -> list[str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error}): copy or download it again") from error
