"""The pipeline that an adapter file belongs to."""

import os

import torch

from cersa_diffusion.adapter_file import AdapterFile
from cersa_diffusion.errors import ConfigError


def base_pipeline(adapter: AdapterFile, base: str | os.PathLike | None, dtype: torch.dtype = torch.float32):
    """Loads the base of an adapter, from safetensors only.

    What a file says about its base is shown, never followed: whoever wrote the file could have this machine open any folder and
    download any repository.

    Args:
        adapter: the file's content.
        base: folder or hub id of a pipeline.
        dtype: of the weights.

    Raises:
        ConfigError: no base is given (the message says what the file names), or it cannot be loaded.
    """
    # Imported here: the core of the package works without diffusers.
    from diffusers import DiffusionPipeline

    if base is None:
        named = adapter.base_model.get("name_or_path")
        hint = f"it names {str(named)[:200]!a}" if named else "it names none"
        raise ConfigError(f"{adapter.source}: say which base pipeline to load (base, or --base): {hint}")
    try:
        return DiffusionPipeline.from_pretrained(base, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"base {base}: cannot be loaded as a pipeline from safetensors ({reason}); pickles are not read: pass another base"
        ) from error
