"""The `cersa` command: plan the memory of a training run, factor checkpoints, look into adapter files, take them elsewhere."""

import argparse
import sys

from cersa_diffusion.cli.adapters import add_adapter_commands
from cersa_diffusion.cli.analyse import add_analyse
from cersa_diffusion.cli.cache import add_cache
from cersa_diffusion.cli.compress import add_compress
from cersa_diffusion.cli.doctor import add_doctor
from cersa_diffusion.cli.plan import add_plan
from cersa_diffusion.errors import CersaError


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `cersa` command."""
    parser = argparse.ArgumentParser(prog="cersa", description=__doc__)
    commands = parser.add_subparsers(required=True)
    add_plan(commands)
    add_compress(commands)
    add_adapter_commands(commands)
    add_analyse(commands)
    add_doctor(commands)
    add_cache(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CersaError as error:
        sys.exit(f"error: {error}")
