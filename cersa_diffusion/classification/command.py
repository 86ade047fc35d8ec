"""The command line of the classification scripts."""

import argparse
import sys

from transformers import HfArgumentParser

from cersa_diffusion.classification.presets import preset, preset_names
from cersa_diffusion.classification.run import train_classifier
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData
from cersa_diffusion.errors import CersaError, ConfigError


def run_command(data_class: type[ImageData] | type[TextData], models: tuple[str, ...], description: str) -> None:
    """Parses the command line, trains, and says what went wrong in one line.

    Args:
        data_class: the settings of the examples.
        models: whose presets of the paper are offered.
        description: what `--help` says at the top.
    """
    try:
        train_classifier(*parse_command(data_class, models, description))
    except CersaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; go on from the last checkpoint with --resume_from_checkpoint latest", file=sys.stderr)
        sys.exit(130)


def parse_command(
    data_class: type[ImageData] | type[TextData], models: tuple[str, ...], description: str, options: list[str] | None = None
) -> tuple:
    """The arguments of `train_classifier` that a command line comes to.

    Args:
        data_class, models, description: as `run_command`.
        options: the command line; None: that of the process.

    Raises:
        ConfigError: a value that cannot be used.
    """
    parser = HfArgumentParser(
        (ClassifierSettings, data_class, RunArguments),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(preset_names(models))
    parser.add_argument("--preset", help=f"Hyper-parameters of the paper, which other options override: {names}.")
    # Its values become defaults, so it is looked for before the rest is read.
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset")
    name, label = early.parse_known_args(options)[0].preset, None
    if name is not None:
        values, table = preset(name, models)
        label = f"{name} ({table})"
        parser.set_defaults(**values)
    settings, data, arguments, _, unknown = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    if unknown:
        raise ConfigError(f"unknown options: {' '.join(unknown)}: --help lists all of them")
    return settings, data, arguments, label
