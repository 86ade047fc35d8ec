"""The `cersa` command, one file for each of its commands."""

from cersa_diffusion.cli.command import main

__all__ = ["main"]
