"""The command line of the classification scripts."""

import argparse
import sys

from transformers import HfArgumentParser

from cersa_diffusion.classification.presets import preset, preset_names
from cersa_diffusion.classification.run import train_classifier
from cersa_diffusion.classification.settings import ClassifierSettings, ImageData, RunArguments, TextData
from cersa_diffusion.errors import CersaError


def run_command(data_class: type[ImageData] | type[TextData], models: tuple[str, ...], description: str) -> None:
    """Parses the command line, trains, and says what went wrong in one line.

    Args:
        data_class: the settings of the examples.
        models: whose presets of the paper are offered.
        description: what `--help` says at the top.
    """
    try:
        train_classifier(*_parse(data_class, models, description))
    except CersaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; go on from the last checkpoint with --resume_from_checkpoint latest", file=sys.stderr)
        sys.exit(130)


def _parse(data_class: type, models: tuple[str, ...], description: str) -> tuple:
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
    name, label = early.parse_known_args()[0].preset, None
    if name is not None:
        values, table = preset(name, models)
        label = f"{name} ({table})"
        parser.set_defaults(**values)
    settings, data, arguments, _ = parser.parse_args_into_dataclasses()
    return settings, data, arguments, label
