"""The `cersa` command; each of its commands has its own file."""

from cersa_diffusion.cli.command import main

__all__ = ["main"]
