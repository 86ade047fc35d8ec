"""Adds `cersa doctor` to the commands; `cersa_doctor.entry` runs it without importing this package."""

import argparse
import sys

from cersa_doctor.command import HELP, add_arguments, run


def _doctor(arguments: argparse.Namespace) -> None:
    sys.exit(run(arguments))


def add_doctor(commands) -> None:
    """Adds the command."""
    doctor = commands.add_parser("doctor", help=HELP)
    add_arguments(doctor)
    doctor.set_defaults(run=_doctor)
