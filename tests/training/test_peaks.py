"""Peak memory by phase: what preparing takes is not counted in the steps."""

import sys

import pytest
import torch

from cersa_diffusion.training.run.peaks import DRAWING, PREPARING, TRAINING, PeakMemory

from ..conftest import DEVICE

MIB = 2**20


def touch(size: int) -> None:
    torch.ones(size * MIB // 4, device=DEVICE)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_each_phase_has_a_peak_of_its_own():
    peaks = PeakMemory(DEVICE)
    assert peaks.of(TRAINING) is None
    touch(400)
    peaks.enter(TRAINING)
    touch(100)
    training = peaks.of(TRAINING)
    assert peaks.of(PREPARING) - training > 200 * MIB
    with peaks.during(DRAWING):
        touch(300)
    touch(50)
    assert peaks.of(DRAWING) - peaks.of(TRAINING) > 100 * MIB
    assert abs(peaks.of(TRAINING) - training) < 50 * MIB and peaks.of(PREPARING) > peaks.of(DRAWING)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_a_phase_that_raises_ends():
    peaks = PeakMemory(DEVICE)
    with pytest.raises(ValueError), peaks.during(DRAWING):
        raise ValueError
    assert peaks.phase == PREPARING and peaks.of(DRAWING) > 0
