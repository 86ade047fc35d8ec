"""Loads the base pipeline of a training or of an adapter."""

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
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Loads a text-to-image pipeline that can be trained, without its safety checker.

    Args:
        name_or_path: a folder or a model id on the hub.
        family: the expected family; None: any.
        dtype: dtype of all models; or component -> dtype, and "default" -> that of all others.
        revision: revision on the hub.
        variant: variant of the weight files.

    Raises:
        ConfigError: the folder or model does not exist, or is not a text-to-image pipeline of this family.
    """
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ConfigError(f"base {name_or_path} holds no model_index.json, expected a diffusers pipeline")
    if not os.path.isdir(name_or_path) and not is_hub_id(name_or_path):
        raise ConfigError(f"base {name_or_path}: {NEITHER}")
    verbosity = diffusers_logging.get_verbosity()
    try:
        # Hides the warning about the safety checker, and the traceback of the loader: the error below holds its message.
        diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
        stored_family = _stored_family(name_or_path, family, revision)
        pipeline = stored_family.pipeline_class.from_pretrained(
            name_or_path, dtype=dtype, revision=revision, variant=variant, use_safetensors=True, **stored_family.loading
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(name_or_path, error, "a text-to-image pipeline") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
    problem = stored_family.check(pipeline)
    if problem:
        raise ConfigError(f"base {name_or_path}: {problem}")
    return pipeline


def _stored_family(name_or_path: str, expected: Family | None, revision: str | None) -> Family:
    class_name = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
    family = family_of(class_name)
    if family is None:
        raise ConfigError(f"base {name_or_path} is a {class_name}, expected text-to-image Stable Diffusion 1.x or 2.x, or SDXL")
    if expected not in (None, family):
        raise ConfigError(f"base {name_or_path} is a {class_name}, train it with scripts/{family.script}")
    return family


def _unreadable(base: str | os.PathLike, error: Exception, what: str) -> ConfigError:
    return ConfigError(
        f"base {base} cannot be loaded as {what} from safetensors ({one_line(error)}); pickles are not read: choose another base"
    )


def base_pipeline(adapter: AdapterFile, base: str | os.PathLike | None, dtype: torch.dtype = torch.float32):
    """Loads the base of an adapter, from safetensors only.

    The base that the adapter file names is shown in an error, but never loaded: the author of the file could otherwise make this
    machine open any folder and download any repository.

    Args:
        adapter: the content of the adapter file.
        base: folder or hub id of a pipeline.
        dtype: dtype of the weights.

    Raises:
        ConfigError: no base is given (the message names the base in the file), or it cannot be loaded.
    """
    if base is None:
        name = adapter.base_model.get("name_or_path")
        hint = f"the file names {str(name)[:200]!a}" if name else "the file names none"
        raise ConfigError(f"{adapter.source}: choose the base pipeline to load (base, or --base): {hint}")
    try:
        return DiffusionPipeline.from_pretrained(base, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _unreadable(base, error, "a pipeline") from error
