"""Reads the settings of a run from the command line, a TOML file and a preset."""

import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TypeVar

from transformers import HfArgumentParser

from cersa_diffusion.errors import CersaError
from cersa_diffusion.training.callbacks import TrainingStopped
from cersa_diffusion.training.dreambooth import train_dreambooth
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.training.settings.file import read_settings
from cersa_diffusion.training.settings.presets import PRESETS

Config = TypeVar("Config", bound=DreamBoothConfig)


def parse_settings(config_class: type[Config], arguments: Sequence[str] | None = None, description: str | None = None) -> Config:
    """Reads the settings; the command line overrides the file, and the file overrides the preset.

    Args:
        config_class: the dataclass whose fields are the options.
        arguments: the arguments of the command line; default: those of the process.
        description: the text for `--help`.

    Raises:
        ConfigError: settings that cannot work.
    """
    parser = HfArgumentParser(config_class, description=description)
    parser.add_argument("--config", metavar="FILE", help="Settings from a TOML file, such as the config.toml beside a result.")
    parser.add_argument("--preset", choices=list(PRESETS), help="Settings for a GPU with this much memory (docs/training.md).")
    for action in parser._actions:
        # The default of an option that is not given must not override the file or the preset.
        if action.dest != "help":
            action.default, action.required = SUPPRESS, False
    given = vars(parser.parse_args(arguments))
    from_file = read_settings(given.pop("config"), config_class) if "config" in given else {}
    settings = PRESETS.get(given.pop("preset", None), {}) | from_file | given
    missing = [field.name for field in fields(config_class) if field.default is MISSING and field.name not in settings]
    if missing:
        parser.error(f"the following arguments are required: {', '.join('--' + name for name in missing)}")
    return config_class(**settings)


def main(config_class: type[DreamBoothConfig], description: str) -> None:
    """Runs a training script: reads the settings, trains, and exits with a code that tells how the training ended.

    Args:
        config_class: the dataclass of the settings.
        description: the text for `--help`.
    """
    try:
        train_dreambooth(parse_settings(config_class, description=description))
    except (CersaError, TrainingStopped) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}; continue with --resume_from_checkpoint latest", file=sys.stderr)
        sys.exit(130)
