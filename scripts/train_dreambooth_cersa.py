#!/usr/bin/env python
"""DreamBooth with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning, all on the same layers, for Stable Diffusion 1.x and 2.x.

Start it with `accelerate launch`.
"""

from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.command_line import main

if __name__ == "__main__":
    main(DreamBoothConfig, __doc__)
