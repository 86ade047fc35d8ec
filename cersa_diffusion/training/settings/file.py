"""The settings of a run as a TOML file, which is written beside every result and can replace the command line."""

import tomllib
from dataclasses import asdict
from pathlib import Path

import tomli_w

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.files import atomic_write
from cersa_diffusion.training.settings.checks import check_names
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.training.settings.presets import PRESETS

SETTINGS_FILE = "config.toml"


def read_settings(path: str | Path, config_class: type[DreamBoothConfig] = DreamBoothConfig) -> dict:
    """Reads the settings in a TOML file, including those of a preset if the file has the key `preset`.

    Args:
        path: the file.
        config_class: the dataclass of the settings.

    Raises:
        ConfigError: the file does not exist, is not TOML, or contains a name that is not a setting.
    """
    try:
        settings = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read as TOML ({error})") from error
    preset = settings.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"config {path}: preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    try:
        check_names(config_class, list(settings))
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from error
    return PRESETS.get(preset, {}) | settings


def settings_text(config: DreamBoothConfig) -> str:
    """All settings as TOML for `--config`, without the token and without those that are None."""
    return tomli_w.dumps({name: value for name, value in asdict(config).items() if value is not None and name != "hub_token"})


def write_settings(config: DreamBoothConfig, path: Path) -> None:
    """Writes the `settings_text` of a run to a file."""
    with atomic_write(path) as temporary:
        temporary.write_text(settings_text(config))
