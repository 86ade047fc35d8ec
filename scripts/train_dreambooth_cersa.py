#!/usr/bin/env python
"""DreamBooth with CERSA, LoRA, PiSSA, DoRA, SVFit, SVFT or full fine-tuning, all on the same layers.

Start it with `accelerate launch`.
"""

import sys

from transformers import HfArgumentParser

from cersa_diffusion.errors import CersaError
from cersa_diffusion.training import DreamBoothConfig, train_dreambooth


def main() -> None:
    parser = HfArgumentParser(DreamBoothConfig, description=__doc__)
    try:
        (config,) = parser.parse_args_into_dataclasses()
        train_dreambooth(config)
    except CersaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}; go on with --resume_from_checkpoint latest", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
