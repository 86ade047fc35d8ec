"""Writing adapter files that no saver would write, with a checksum that fits, as docs/file-format.md describes it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save

MARKER = rb"{\"checksum\": \""


def with_checksum(content: bytes) -> bytes:
    """The file with the digest of its bytes, the 64 digits themselves counted as zeros."""
    place = content.index(MARKER) + len(MARKER)
    zeroed = content[:place] + b"0" * 64 + content[place + 64 :]
    return zeroed[:place] + hashlib.sha256(zeroed).hexdigest().encode() + zeroed[place + 64 :]


def header_text(header: dict) -> str:
    return json.dumps({"checksum": "0" * 64} | {name: value for name, value in header.items() if name != "checksum"})


def damage(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Changes header and tensors of a file in place, and makes the checksum right again."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["cersa"])
    tensors = load_file(path)
    change(header, tensors)
    path.write_bytes(with_checksum(save(tensors, metadata={"cersa": header_text(header)})))
