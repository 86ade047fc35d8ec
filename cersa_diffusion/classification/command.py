"""The command line of the classification scripts."""

import argparse
import sys

from transformers import HfArgumentParser

from cersa_diffusion.classification.presets import preset, preset_names
from cersa_diffusion.classification.run import train_classifier
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData
from cersa_diffusion.errors import CersaError, ConfigError


def run_command(data_class: type[ImageData] | type[TextData], models: tuple[str, ...], description: str) -> None:
    """Parses the command line and trains; an error ends the process with one line.

    Args:
        data_class: the settings of the examples.
        models: the models whose presets from the paper are offered.
        description: the text at the top of `--help`.
    """
    try:
        train_classifier(*parse_command(data_class, models, description))
    except CersaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted: --resume_from_checkpoint latest continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse_command(
    data_class: type[ImageData] | type[TextData], models: tuple[str, ...], description: str, options: list[str] | None = None
) -> tuple:
    """Parses a command line into the arguments of `train_classifier`.

    Args:
        data_class, models, description: as in `run_command`.
        options: the command line; None: the one of the process.

    Raises:
        ConfigError: a value cannot be used.
    """
    classes = (ClassifierSettings, data_class, RunArguments)
    parser = HfArgumentParser(classes, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(preset_names(models))
    parser.add_argument("--preset", help=f"Hyper-parameters of the paper, which other options override: {names}.")
    # The values of the preset become defaults of the parser, so the preset is read before the other options.
    preset_parser = argparse.ArgumentParser(add_help=False)
    preset_parser.add_argument("--preset")
    name, label = preset_parser.parse_known_args(options)[0].preset, None
    if name is not None:
        values, table = preset(name, models)
        label = f"{name} ({table})"
        parser.set_defaults(**values)
    settings, data, arguments, _, unknown = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    if unknown:
        raise ConfigError(f"unknown options: {' '.join(unknown)}: --help lists all of them")
    return settings, data, arguments, label
