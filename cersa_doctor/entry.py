"""The entry point of the `cersa` command: `cersa doctor` runs without importing the packages that it examines."""

import argparse
import sys

from cersa_doctor.command import HELP, add_arguments, run


def main() -> None:
    """Entry point of the `cersa` command."""
    if sys.argv[1:2] == ["doctor"]:
        parser = argparse.ArgumentParser(prog="cersa doctor", description=HELP)
        add_arguments(parser)
        sys.exit(run(parser.parse_args(sys.argv[2:])))
    # Imported here: it imports torch, transformers and diffusers, one of which may be broken.
    from cersa_diffusion.cli.command import main as other_commands

    other_commands()
