"""Pictures are those of diffusers, in the precision that is asked for; the autoencoder keeps float32."""

import numpy as np
import pytest
import torch

from cersa_diffusion.pipelines.draw import drawing_dtypes, generate
from cersa_diffusion.pipelines.open import load_base

from ..conftest import DEVICE
from ..pipelines_small import PROMPT, pipeline

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture(params=["sd1", "sdxl"])
def base(request, tmp_path) -> str:
    pipeline(request.param).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_unasked_a_gpu_draws_in_16_bits_and_a_cpu_in_float32():
    assert drawing_dtypes(None, CPU)["default"] == torch.float32
    assert drawing_dtypes(None, GPU)["default"].itemsize == 2


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_dtype_that_is_asked_for_is_used_everywhere(dtype, device):
    assert drawing_dtypes(dtype, device) == {"default": dtype, "vae": torch.float32}


def test_in_float32_they_are_the_pictures_of_the_pipeline(base):
    pipe = load_base(base).to(DEVICE)
    expected = pipe([PROMPT] * 2, generator=generators(), **SETTINGS).images
    drawn = generate(pipe, [PROMPT], [0, 1], steps=2, guidance=4.0)[0]
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, expected, strict=True)] == [True, True]


def test_in_16_bits_only_the_autoencoder_computes_in_float32(base):
    pipe = load_base(base, dtype=drawing_dtypes(torch.bfloat16, DEVICE)).to(DEVICE)
    dtypes = {name: model.dtype for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    assert dtypes.pop("vae") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}
    exact, rounded = load_base(base).to(DEVICE), load_base(base, dtype=torch.bfloat16).to(DEVICE)
    latents = rounded([PROMPT] * 2, generator=generators(), output_type="latent", **SETTINGS).images
    with torch.no_grad():
        decoded = exact.vae.decode(latents.float() / exact.vae.config.scaling_factor).sample
    expected = exact.image_processor.postprocess(decoded)
    drawn = generate(pipe, [PROMPT], [0, 1], steps=2, guidance=4.0)[0]
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(drawn, expected, strict=True)] == [True, True]
