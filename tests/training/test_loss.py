"""The loss against its definition: min-SNR with and without prior preservation, noise offset, one sample at a time."""

import pytest
import torch
from torch import nn

from cersa_diffusion.training import DreamBoothConfig
from cersa_diffusion.training.base import load_base
from cersa_diffusion.training.loss import DreamBoothLoss

GAMMA, PRIOR_WEIGHT = 2.0, 0.3
PRIOR = {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "classes", "prior_loss_weight": PRIOR_WEIGHT}


class Zero(nn.Module):
    """Predicts no noise at all: the error that is left is the noise itself."""

    dtype = torch.float32

    def forward(self, latents, timesteps, states, return_dict):
        return (torch.zeros_like(latents),)


def loss_of(settings: dict, folder, **changes) -> tuple[DreamBoothLoss, dict[str, nn.Module]]:
    base = load_base(str(folder))
    models = {"unet": base.unet.requires_grad_(False), "text_encoder": base.text_encoder}
    config = DreamBoothConfig(**settings | {"pretrained_model_name_or_path": str(folder)} | changes)
    return DreamBoothLoss(config, base, torch.device("cpu")), models


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prior", [False, True])
def test_min_snr_weights_every_sample(family, count, prior, small_base, small_settings):
    """sd1 predicts the noise, sd2 the velocity; a batch of one with prior preservation is where others broadcast."""
    loss, models = loss_of(small_settings, small_base(family), snr_gamma=GAMMA, **(PRIOR if prior else {}))
    prompts = [loss.config.instance_prompt] + ["a cat"] * prior
    batch = {"pixels": pictures(count * len(prompts)), "samples": torch.arange(5, 5 + count)}
    errors, timesteps = loss.squared_errors(batch["pixels"], batch["samples"].tolist(), prompts, models)
    schedule = load_base(str(small_base(family))).scheduler.config
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps, dtype=torch.float64)
    weighted = []
    for error, timestep in zip(errors.tolist(), timesteps.tolist(), strict=True):
        signal = float((1 - betas[: timestep + 1]).prod())
        snr = signal / (1 - signal)
        weighted.append(error * min(snr, GAMMA) / (snr + 1 if family == "sd2" else snr))
    expected = sum(weighted[:count]) / count
    if prior:
        expected += PRIOR_WEIGHT * sum(weighted[count:]) / count
    assert loss(batch, models).item() == pytest.approx(expected, rel=1e-4)


def test_a_sample_has_the_same_error_whatever_it_is_batched_with(small_base, small_settings):
    loss, models = loss_of(small_settings, small_base("sd1"), noise_offset=0.1)
    pixels, samples = pictures(3), [4, 9, 2]
    together, timesteps = loss.squared_errors(pixels, samples, ["a sks cat"], models)
    for row, sample in enumerate(samples):
        alone, timestep = loss.squared_errors(pixels[row : row + 1], [sample], ["a sks cat"], models)
        assert timestep == timesteps[row] and torch.allclose(alone[0], together[row], rtol=1e-4)


def test_noise_offset_shifts_whole_channels_and_leaves_the_rest(small_base, small_settings):
    samples, prompts, models = list(range(128)), ["a sks cat"], {"unet": Zero()}
    pixels = pictures(1).expand(128, 3, 16, 16)
    plain, plain_timesteps = loss_of(small_settings, small_base("sd1"))[0].squared_errors(pixels, samples, prompts, models)
    loss = loss_of(small_settings, small_base("sd1"), noise_offset=3.0)[0]
    shifted, timesteps = loss.squared_errors(pixels, samples, prompts, models)
    assert torch.equal(plain_timesteps, timesteps)
    # Noise of variance 1, and with the offset 1 + 3^2: the spread of the mean over 128 x 4 channels is 9 sqrt(2 / 512) = .56.
    assert float(plain.mean()) == pytest.approx(1, abs=0.05) and float(shifted.mean()) == pytest.approx(10, abs=2)


def test_no_gradients_where_none_were_asked_for(small_base, small_settings):
    loss, models = loss_of(small_settings, small_base("sd1"))
    with torch.no_grad():
        assert not loss.squared_errors(pictures(1), [0], ["a sks cat"], models)[0].requires_grad
    assert loss.squared_errors(pictures(1), [0], ["a sks cat"], models)[0].requires_grad
    frozen = {name: model for name, model in models.items() if name == "unet"}
    assert not loss.squared_errors(pictures(1), [0], ["a sks cat"], frozen)[0].requires_grad
