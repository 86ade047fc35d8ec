"""Names of models and data as they may leave the machine: without the folders that they lie in."""

import os
from pathlib import Path


def is_local(name: str) -> bool:
    """Whether this is a path, and no id on the hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


def public_name(name: str) -> str:
    """An id on the hub as it is, of a path its last part."""
    return Path(name).absolute().name if is_local(name) else name


def public_sources(settings: dict) -> dict[str, str]:
    """The settings that say what a model was loaded from ("name_or_path", "model_name_or_path", ...), with `public_name`."""
    named = {key: value for key, value in settings.items() if key.endswith("name_or_path") and isinstance(value, str)}
    return {key: public_name(value) for key, value in named.items() if value}
