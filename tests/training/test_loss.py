"""The loss against its definition: min-SNR with and without prior preservation, noise offset, one sample at a time."""

import pytest
import torch
from torch import nn

from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training.run.loss import DreamBoothLoss
from cersa_diffusion.training.settings.config import DreamBoothConfig, DreamBoothXLConfig

from ..conftest import DEVICE
from ..pipelines_small import pipeline

GAMMA, PRIOR_WEIGHT = 2.0, 0.3
PRIOR = {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "classes", "prior_loss_weight": PRIOR_WEIGHT}


class Zero(nn.Module):
    """Predicts no noise at all: the error that is left is the noise itself."""

    dtype = torch.float32

    def forward(self, latents, timesteps, encoder_hidden_states, return_dict):
        return (torch.zeros_like(latents),)


def loss_of(settings: dict, folder, **changes) -> tuple[DreamBoothLoss, dict[str, nn.Module]]:
    base = load_base(str(folder)).to(DEVICE)
    models = {"unet": base.unet.requires_grad_(False), "text_encoder": base.text_encoder}
    config = DreamBoothConfig(**settings | {"pretrained_model_name_or_path": str(folder)} | changes)
    return DreamBoothLoss(config, base, DEVICE), models


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def batch_of(pixels: torch.Tensor, samples: list[int], prompts: list[str] | None = None) -> dict:
    """As `data.collate` makes it, of square pictures that were not cropped."""
    return {
        "pixels": pixels,
        "samples": samples,
        "prompts": prompts or ["a sks cat"] * len(pixels),
        "sizes": torch.tensor([[16, 16, 0, 0, 16, 16]] * len(pixels)),
    }


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prior", [False, True])
def test_min_snr_weights_every_sample(family, count, prior, small_base, small_settings):
    """sd1 predicts the noise, sd2 the velocity; a batch of one with prior preservation is where others broadcast."""
    loss, models = loss_of(small_settings, small_base(family), snr_gamma=GAMMA, **(PRIOR if prior else {}))
    prompts = ["a sks cat"] * count + ["a cat"] * count * prior
    batch = batch_of(pictures(len(prompts)), list(range(5, 5 + count)), prompts)
    errors, timesteps = loss.squared_errors(batch, models)
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
    pixels, samples, prompts = pictures(4), [4, 9, 2, 3], ["a sks cat", "a cat on a mat", "a sks cat", "a mat"]
    together, timesteps = loss.squared_errors(batch_of(pixels, samples, prompts), models)
    for row, sample in enumerate(samples):
        single = batch_of(pixels[row : row + 1], [sample], [prompts[row]])
        alone, timestep = loss.squared_errors(single, models)
        assert timestep == timesteps[row] and torch.allclose(alone[0], together[row], rtol=1e-4)


def test_every_picture_has_the_prompt_that_it_came_with(small_base, small_settings):
    loss, models = loss_of(small_settings, small_base("sd1"))
    pixels = pictures(1).expand(2, 3, 16, 16)
    (same, _), (other, _) = (
        loss.squared_errors(batch_of(pixels, [4, 4], ["a sks cat", prompt]), models) for prompt in ("a sks cat", "a mat")
    )
    assert torch.allclose(same[0], same[1], rtol=1e-5)
    assert torch.allclose(other[0], same[0], rtol=1e-5) and abs(other[1] - same[1]) > 1e-4 * same[1]


def test_prompts_that_pictures_share_have_the_gradients_of_prompts_encoded_apart(small_base, small_settings):
    loss, models = loss_of(small_settings, small_base("sd1"))
    pixels, samples, prompts = pictures(4), [4, 9, 2, 3], ["a sks cat", "a mat", "a sks cat", "a sks cat"]
    loss(batch_of(pixels, samples, prompts), models).backward()
    together = [parameter.grad.clone() for parameter in models["text_encoder"].parameters() if parameter.grad is not None]
    models["text_encoder"].zero_grad()
    for row, sample in enumerate(samples):
        (loss(batch_of(pixels[row : row + 1], [sample], [prompts[row]]), models) / 4).backward()
    apart = [parameter.grad for parameter in models["text_encoder"].parameters() if parameter.grad is not None]
    assert together and all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(together, apart, strict=True))


def test_noise_offset_shifts_whole_channels_and_leaves_the_rest(small_base, small_settings):
    batch, models = batch_of(pictures(1).expand(128, 3, 16, 16), list(range(128))), {"unet": Zero()}
    plain, plain_timesteps = loss_of(small_settings, small_base("sd1"))[0].squared_errors(batch, models)
    shifted, timesteps = loss_of(small_settings, small_base("sd1"), noise_offset=3.0)[0].squared_errors(batch, models)
    assert torch.equal(plain_timesteps, timesteps)
    # Noise of variance 1, and with the offset 1 + 3^2: the spread of the mean over 128 x 4 channels is 9 sqrt(2 / 512) = .56.
    assert float(plain.mean()) == pytest.approx(1, abs=0.05) and float(shifted.mean()) == pytest.approx(10, abs=2)


def test_no_gradients_where_none_were_asked_for(small_base, small_settings):
    loss, models = loss_of(small_settings, small_base("sd1"))
    batch = batch_of(pictures(1), [0])
    with torch.no_grad():
        assert not loss.squared_errors(batch, models)[0].requires_grad
    assert loss.squared_errors(batch, models)[0].requires_grad
    frozen = {name: model for name, model in models.items() if name == "unet"}
    assert not loss.squared_errors(batch, frozen)[0].requires_grad


def test_sdxl_is_told_the_sizes_of_the_picture(small_settings):
    base = pipeline("sdxl")
    loss = DreamBoothLoss(DreamBoothXLConfig(**small_settings), base, DEVICE)
    batch = batch_of(pictures(1), [4])
    cropped = batch | {"sizes": torch.tensor([[160, 320, 0, 64, 16, 16]])}
    with torch.no_grad():
        (whole, _), (part, _) = (loss.squared_errors(each, {}) for each in (batch, cropped))
    assert torch.isfinite(whole).all() and whole != part
