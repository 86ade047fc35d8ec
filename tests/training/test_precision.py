"""Mixed precision: the gradients are those of float32 within rounding, with gradient checkpointing and without."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.checkpoints.folder import trained_weights
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.data.dataset import DreamBoothDataset, collate
from cersa_diffusion.training.run.loop import DreamBoothRun

# Small gradients must not underflow in float16; the trainer's loss scaler does the same.
LOSS_SCALE = 1024.0
# Relative error of a gradient; measured 0.062 and 0.0095, eight times the spacing of numbers in each dtype is 0.063 and 0.0078.
LIMITS = {"bf16": 0.12, "fp16": 0.02}


def gradients(settings: dict, precision: str, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Trained parameter -> gradient of one batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = DreamBoothConfig(**settings, alpha=0.9, mixed_precision=precision, gradient_checkpointing=checkpointing)
    base = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(mixed_precision=precision), read_examples(config))
    data = DreamBoothDataset(run.instance, [], config, first=0, last=2, samples_per_step=2)
    for model in run.components.values():
        model.train()
    with run.accelerator.autocast():
        loss = run.loss(collate([data[0], data[1]]), run.components)
    (loss * LOSS_SCALE).backward()
    return {name: parameter.grad.float() / LOSS_SCALE for name, parameter in trained_weights(run.components).items()}


@pytest.fixture
def expected(small_settings) -> dict[str, torch.Tensor]:
    return gradients(small_settings, "no", False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_agree_with_float32(small_settings, expected, precision, checkpointing):
    computed = gradients(small_settings, precision, checkpointing)
    assert computed.keys() == expected.keys()
    assert {name.partition(".")[0] for name in computed} == {"unet", "text_encoder"}
    errors = {name: float((computed[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items()}
    assert max(errors.values()) <= LIMITS[precision], max(errors, key=errors.get)


def test_checkpointing_changes_no_bit_of_a_gradient(small_settings, expected):
    computed = gradients(small_settings, "no", True)
    assert all(torch.equal(computed[name], gradient) for name, gradient in expected.items())
