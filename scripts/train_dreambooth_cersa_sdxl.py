#!/usr/bin/env python
"""DreamBooth for SDXL, with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning of the same layers.

Start it with `accelerate launch`.
"""

from cersa_diffusion.training import DreamBoothXLConfig
from cersa_diffusion.training.command_line import main

if __name__ == "__main__":
    main(DreamBoothXLConfig, __doc__)
