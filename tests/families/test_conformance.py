"""One test for every family: what it says of a pipeline is what the pipeline itself does."""

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from cersa_diffusion.families.base import Family
from cersa_diffusion.families.table import FAMILIES, family_of

from ..conftest import DEVICE, randn
from ..pipelines_small import PROMPT, SIZE, pipeline

PIPELINES = ("sd1", "sd2", "sdxl")


@pytest.fixture(params=[*PIPELINES, "sdxl with statistics of its latents"])
def case(request) -> tuple[Family, object]:
    name, _, statistics = request.param.partition(" ")
    pipe = pipeline(name)
    if statistics:
        pipe.vae.register_to_config(latents_mean=[0.4, -0.2, 0.1, 0.0], latents_std=[1.5, 0.8, 2.0, 1.0])
    pipe.set_progress_bar_config(disable=True)
    return family_of(type(pipe).__name__), pipe


def test_every_family_is_tested():
    assert {family_of(type(pipeline(name)).__name__) for name in PIPELINES} == set(FAMILIES)


def test_the_names_are_components_of_the_pipeline(case):
    family, pipe = case
    assert isinstance(pipe, family.pipeline_class) and family.check(pipe) is None
    components = family.components(pipe)
    assert list(components) == list(family.trained) == [family.denoiser, *family.text_encoders]
    assert list(family.components(pipe, text_encoders=False)) == [family.denoiser]
    assert all(components[name] is getattr(pipe, name) for name in components)


@torch.no_grad()
def test_predict_and_one_step_are_those_of_the_pipeline(case):
    """The denoiser is called with the same tensors, says the same, and the scheduler makes the same latents of it."""
    family, pipe = case
    denoiser, calls, latents = getattr(pipe, family.denoiser), [], []

    def record(_module, args, kwargs, output):
        calls.append((args, kwargs, output[0].clone()))

    def keep(_pipe, _step, _timestep, given):
        latents.append(given["latents"].clone())
        return given

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    pipe(
        PROMPT, height=SIZE, width=SIZE, num_inference_steps=2, guidance_scale=1.0, callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    handle.remove()
    (noisy, timestep), keywords, said = calls[1]
    assert noisy.shape[1:] == family.latent_shape(pipe, SIZE) and len(noisy) == 1

    conditions = family.collate(family.encode(pipe, [PROMPT], {}))
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], device=DEVICE)
    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    predicted = family.predict(denoiser, noisy, timestep.expand(1), conditions, sizes)
    handle.remove()
    torch.testing.assert_close(predicted, said)
    again = calls[-1][1]
    torch.testing.assert_close(again["encoder_hidden_states"], keywords["encoder_hidden_states"])
    for name, tensor in (keywords.get("added_cond_kwargs") or {}).items():
        torch.testing.assert_close(again["added_cond_kwargs"][name], tensor)

    # From the same state of the scheduler the pipeline's second step follows.
    pipe.scheduler.set_timesteps(2, device=DEVICE)
    torch.testing.assert_close(pipe.scheduler.step(predicted, timestep, latents[0], return_dict=False)[0], latents[1])


@torch.no_grad()
def test_latents_and_pictures_are_those_of_the_pipeline(case):
    """Pictures become the latents that image-to-image starts from, and latents the pictures that the pipeline returns."""
    family, pipe = case
    pixels = (randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / 3).clamp(-1, 1)
    mean, std = family.posterior(pipe.vae, pixels)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)).to(mean)
    latents = family.normalise(pipe.vae, drawn)
    assert latents.dtype == torch.float32 and latents.shape[1:] == family.latent_shape(pipe, SIZE)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    # What comes before the noise that image-to-image adds.
    other.scheduler.add_noise = lambda clean, _noise, _timestep: clean
    options = {"dtype": torch.float32, "device": DEVICE, "generator": torch.Generator().manual_seed(2)}
    expected = other.prepare_latents(pixels, torch.tensor([1], device=DEVICE), 2, 1, **options)
    torch.testing.assert_close(latents, expected)

    options = {"height": SIZE, "width": SIZE, "num_inference_steps": 2}
    finished, shown = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type=kind, **options).images for kind in ("latent", "pt")
    )
    torch.testing.assert_close((family.decode(pipe.vae, finished) / 2 + 0.5).clamp(0, 1), shown)


def test_native_resolution_and_pixels_per_latent(case):
    family, pipe = case
    side = family.native_resolution(pipe)
    assert family.latent_shape(pipe, side)[1:] == (getattr(pipe, family.denoiser).config.sample_size,) * 2
    with torch.no_grad():
        mean, _ = family.posterior(pipe.vae, randn(1, 3, side, side))
    assert mean.shape[-1] * family.pixels_per_latent(pipe) == side


@torch.no_grad()
def test_a_caption_is_encoded_alike_alone_and_among_others(case):
    family, pipe = case
    captions = [PROMPT, "a mat", ""]
    together = family.encode(pipe, captions, {})
    for caption, conditions in zip(captions, together, strict=True):
        (alone,) = family.encode(pipe, [caption], {})
        assert alone.keys() == conditions.keys()
        for name, tensor in conditions.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    assert all(tensor.shape[0] == 3 for tensor in family.collate(together).values())
