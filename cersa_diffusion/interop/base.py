"""The pipeline that an adapter file belongs to."""

import os

import torch

from cersa_diffusion.adapter_file import AdapterFile
from cersa_diffusion.errors import ConfigError


def base_pipeline(adapter: AdapterFile, base: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32):
    """Loads the base of an adapter.

    Args:
        adapter: the file's content.
        base: folder or hub id of a pipeline; default: what the file names.
        dtype: of the weights.

    Raises:
        ConfigError: no base is named, or it cannot be loaded.
    """
    # Imported here: the core of the package works without diffusers.
    from diffusers import DiffusionPipeline

    name = adapter.base_model.get("name_or_path") if base is None else base
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ConfigError(f"{adapter.source} does not name its base: say which pipeline to load (base)")
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"base {name}: cannot be loaded as a pipeline ({reason}): pass another base") from error
