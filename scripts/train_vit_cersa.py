#!/usr/bin/env python
"""Image classification with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning of a vision transformer.

Start it with python, or for several processes with `accelerate launch`. docs/classification.md shows examples.
"""

from cersa_diffusion.classification.command import run_command
from cersa_diffusion.classification.settings import ImageData

if __name__ == "__main__":
    run_command(ImageData, ("vit-base", "vit-large"), __doc__)
