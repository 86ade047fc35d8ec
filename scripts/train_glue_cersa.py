#!/usr/bin/env python
"""Sentence classification (GLUE or your own data) with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning.

Start it with python, or for several processes with `accelerate launch`. docs/classification.md shows examples.
"""

from cersa_diffusion.classification.command import run_command
from cersa_diffusion.classification.settings import TextData

if __name__ == "__main__":
    run_command(TextData, ("deberta-v3-base",), __doc__)
