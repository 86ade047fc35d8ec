#!/usr/bin/env python
"""DreamBooth for Stable Diffusion 1.x and 2.x, with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning of the same layers.

Start it with `accelerate launch`.
"""

from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.command_line import main

if __name__ == "__main__":
    main(DreamBoothConfig, __doc__)
