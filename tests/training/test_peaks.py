"""Peak memory by phase: what preparing takes is not counted in the steps, and each run says how far its plan was off."""

import dataclasses
import sys

import pytest
import torch

from cersa_diffusion.training import DreamBoothConfig, train_dreambooth
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


def test_a_run_says_how_far_its_plan_was_off(small_settings):
    config = DreamBoothConfig(**small_settings)
    result = train_dreambooth(config, callbacks=[])
    planned = result.planned_preparing_bytes, result.planned_peak_bytes
    assert min(planned) > 0 and result.planned_peak_bytes > result.weight_bytes + result.optimizer_bytes
    measured = dataclasses.replace(result, peak_memory_bytes=2000 * MIB, planned_peak_bytes=2100 * MIB)
    assert "steps 2000 MiB (planned 2100, +5%)" in measured.summary(config)
    too_low = dataclasses.replace(measured, planned_peak_bytes=1700 * MIB)
    assert "steps 2000 MiB (planned 1700, -15%: please report it)" in too_low.summary(config)
