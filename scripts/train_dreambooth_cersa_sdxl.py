#!/usr/bin/env python
"""DreamBooth with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning, all on the same layers, for SDXL.

Start it with `accelerate launch`.
"""

from cersa_diffusion.training import DreamBoothXLConfig
from cersa_diffusion.training.command_line import main

if __name__ == "__main__":
    main(DreamBoothXLConfig, __doc__)
