"""The `cersa` command: plans the memory of a training run, compresses checkpoints, and inspects and exports adapter files."""

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
    for add in (add_plan, add_compress, add_adapter_commands, add_analyse, add_doctor, add_cache):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CersaError as error:
        sys.exit(f"error: {error}")
