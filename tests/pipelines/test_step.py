"""What a step allocates, counted with fake tensors, against what the profiler of PyTorch sees real tensors take."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.pipelines.step import encoding_bytes, step_bytes
from cersa_diffusion.private_names import enable_gradient_checkpointing

SIZE = {"batch": 2, "resolution": 128}


def _allocated_peak(compute) -> int:
    compute()  # the first time also fills caches of the libraries
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _step(pipeline, dtype: torch.dtype) -> None:
    unet, trained = pipeline.unet, [weight for weight in pipeline.unet.parameters() if weight.requires_grad]
    trained += [weight for weight in pipeline.text_encoder.parameters() if weight.requires_grad]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        states = STABLE_DIFFUSION.encode(pipeline, [""], {})[0]["states"].expand(SIZE["batch"], -1, -1)
        latents = torch.randn(SIZE["batch"], *STABLE_DIFFUSION.latent_shape(pipeline, SIZE["resolution"])).to(unet.dtype)
        loss = unet(latents, torch.tensor([3, 5]), states.to(unet.dtype)).sample.float().square().mean()
    torch.autograd.grad(loss, trained)


@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_a_step_on_fake_tensors_takes_what_a_step_takes(base_path, dtype, checkpointing):
    pipeline = load_base(str(base_path))
    components = STABLE_DIFFUSION.components(pipeline)
    for name, model in components.items():
        config = CersaConfig(alpha=0.9, target_modules=STABLE_DIFFUSION.trained[name])
        cersa.inject_cersa(model.requires_grad_(False), config, show_progress=False)
        model.to(dtype).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
    expected = _allocated_peak(lambda: _step(pipeline, dtype))
    assert step_bytes(pipeline, **SIZE, dtype=dtype) == pytest.approx(expected, rel=0.15)
    assert all(model.training for model in components.values())
    assert all(weight.grad is None and not weight.is_meta for weight in pipeline.unet.parameters())


def test_counts_without_gradients_and_of_the_encoder(base_path):
    pipeline = load_base(str(base_path))
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    with torch.no_grad():
        states = STABLE_DIFFUSION.encode(pipeline, [""], {})[0]["states"].expand(SIZE["batch"], -1, -1)
        latents = torch.randn(SIZE["batch"], *STABLE_DIFFUSION.latent_shape(pipeline, SIZE["resolution"]))
        predicting = _allocated_peak(lambda: pipeline.unet(latents, torch.tensor([3, 5]), states).sample)
        pixels = torch.randn(SIZE["batch"], 3, SIZE["resolution"], SIZE["resolution"])
        encoding = _allocated_peak(lambda: pipeline.vae.encode(pixels).latent_dist.mean)
    whole = step_bytes(pipeline, **SIZE, dtype=torch.float32)
    prediction = step_bytes(pipeline, **SIZE, dtype=torch.float32, train=False)
    assert prediction == pytest.approx(predicting, rel=0.15) and prediction < whole
    assert encoding_bytes(pipeline, **SIZE) == pytest.approx(encoding, rel=0.15)
    half = step_bytes(pipeline, **SIZE, dtype=torch.bfloat16, as_loaded=False)
    assert half == pytest.approx(whole / 2, rel=0.1)
