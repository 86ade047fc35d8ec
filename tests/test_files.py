"""Writing files: their bytes depend on their content alone."""

import json

import torch
from safetensors import safe_open

from cersa_diffusion.files import safetensors_bytes


def test_the_same_content_is_the_same_bytes(tmp_path):
    """safetensors itself puts several entries of metadata in another order every time."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.float16)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({"name": "Grüße"}), "x": "", "y": "1"}
    written = {safetensors_bytes(tensors, metadata) for _ in range(10)}
    assert len(written) == 1
    path = tmp_path / "a.safetensors"
    path.write_bytes(*written)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {n: t.tolist() for n, t in tensors.items()}
        assert all(file.get_tensor(name).dtype == tensor.dtype for name, tensor in tensors.items())
