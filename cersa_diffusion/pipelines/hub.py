"""Finds an adapter file from a path, a folder, or a repository on the Hugging Face hub."""

import os
from pathlib import Path

from cersa_diffusion.adapters.file import DEFAULT_FILE_NAME
from cersa_diffusion.errors import AdapterFormatError
from cersa_diffusion.files import NEITHER, is_hub_id

# Arguments that `load_cersa_weights` passes to huggingface_hub.hf_hub_download.
HUB_ARGUMENTS = frozenset(
    {"revision", "token", "cache_dir", "force_download", "local_files_only", "user_agent", "endpoint", "etag_timeout"}
)


def find_adapter_file(
    name_or_path: str | os.PathLike, weight_name: str | None = None, *, subfolder: str | None = None, **hub_kwargs
) -> Path:
    """The path of an adapter file; a file on the hub is downloaded.

    Args:
        name_or_path: a file, a folder or a hub id.
        weight_name: file name in the folder or repository; default `DEFAULT_FILE_NAME`, or the only safetensors file of a
            folder that has no file of that name.
        subfolder: folder in the folder or repository.
        hub_kwargs: see `HUB_ARGUMENTS`.

    Raises:
        AdapterFormatError: the file does not exist.
        TypeError: an argument is not in `HUB_ARGUMENTS`.
    """
    unknown = set(hub_kwargs) - HUB_ARGUMENTS
    if unknown:
        raise TypeError(f"unexpected keyword arguments {sorted(unknown)}: expected some of {sorted(HUB_ARGUMENTS)}")
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        return _find_in_folder(path / subfolder if subfolder else path, weight_name)
    if not is_hub_id(str(name_or_path)) or path.suffix == ".safetensors":
        raise AdapterFormatError(f"{name_or_path}: {NEITHER}")
    # Imported here: only hub ids need it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if subfolder:
        hub_kwargs["subfolder"] = subfolder
    try:
        return Path(hf_hub_download(str(name_or_path), weight_name or DEFAULT_FILE_NAME, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterFormatError(
            f"{name_or_path}: no such file or folder, and {weight_name or DEFAULT_FILE_NAME} was not found on the hub "
            f"({reason}): check the name, or pass weight_name="
        ) from error


def _find_in_folder(folder: Path, weight_name: str | None) -> Path:
    path = folder / (weight_name or DEFAULT_FILE_NAME)
    if path.is_file():
        return path
    files = sorted(folder.glob("*.safetensors"))
    if weight_name is None and len(files) == 1:
        return files[0]
    raise AdapterFormatError(f"{folder} holds no {path.name}, it holds {[file.name for file in files]}: pass weight_name=")
