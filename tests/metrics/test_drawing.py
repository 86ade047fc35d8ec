"""A pipeline with adapters draws in the dtype that is asked for."""

import numpy as np
import pytest
import torch

from cersa_diffusion.metrics.drawing import draw, open_pipeline

from ..conftest import DEVICE
from ..pipelines_small import PROMPT, pipeline

# A picture in bfloat16 differs from that in float32 by rounding only: mean difference of grey levels, measured 0.5.
MOST_DIFFERENT = 3.0


@pytest.mark.parametrize("adapted", [False, True])
def test_16_bits_change_pictures_by_rounding_only(adapter_file, tmp_path, adapted):
    pipeline("sd1").save_pretrained(tmp_path / "base")
    adapters = [str(adapter_file("sd1"))] if adapted else []
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = open_pipeline(str(tmp_path / "base"), adapters, DEVICE, dtype)
        assert pipe.unet.dtype == dtype and pipe.vae.dtype == torch.float32
        drawn[dtype] = [np.asarray(sample.picture, dtype=float) for sample in draw(pipe, [PROMPT], [0, 1], steps=2)]
    differences = [np.abs(first - second).mean() for first, second in zip(*drawn.values(), strict=True)]
    assert 0 < max(differences) < MOST_DIFFERENT
