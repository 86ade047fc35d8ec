"""Loading the base pipeline, and sampling class pictures from it."""

import os

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from cersa_diffusion.adapters.file import AdapterFile
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.families.base import Family
from cersa_diffusion.families.table import family_of
from cersa_diffusion.files import NEITHER, is_hub_id
from cersa_diffusion.text import one_line


def load_base(
    name_or_path: str,
    *,
    family: Family | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """A text-to-image pipeline of a family that can be trained, from a folder or the hub, without its safety checker.

    Args:
        name_or_path: a folder or a model id.
        family: the only one that is accepted; None: any.
        dtype: of all its models.
        revision: on the hub.
        variant: of the weight files.

    Raises:
        ConfigError: no such folder or model, or not a text-to-image pipeline of this family.
    """
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ConfigError(f"base {name_or_path}: no model_index.json in this folder, expected a diffusers pipeline")
    if not os.path.isdir(name_or_path) and not is_hub_id(name_or_path):
        raise ConfigError(f"base {name_or_path}: {NEITHER}")
    verbosity = diffusers_logging.get_verbosity()
    try:
        # Silences the reminder about the safety checker, and the loader's traceback where the error below says it in a line.
        diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
        found = _found_family(name_or_path, family, revision)
        pipeline = found.pipeline_class.from_pretrained(
            name_or_path, dtype=dtype, revision=revision, variant=variant, use_safetensors=True, **found.loading
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = one_line(error)
        raise ConfigError(
            f"base {name_or_path}: cannot be loaded as a text-to-image pipeline from safetensors ({reason}); pickles are not read"
        ) from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    problem = found.check(pipeline)
    if problem:
        raise ConfigError(f"base {name_or_path}: {problem}")
    return pipeline


def _found_family(name_or_path: str, wanted: Family | None, revision: str | None) -> Family:
    class_name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
    found = family_of(class_name)
    if found is None:
        raise ConfigError(f"base {name_or_path}: a {class_name}, expected Stable Diffusion 1.x or 2.x, or SDXL, text to image")
    if wanted not in (None, found):
        raise ConfigError(f"base {name_or_path}: a {class_name}, which scripts/{found.script} trains")
    return found


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
        reason = one_line(error)
        raise ConfigError(
            f"base {base}: cannot be loaded as a pipeline from safetensors ({reason}); pickles are not read: pass another base"
        ) from error
