"""The class pictures: drawn by a pipeline of their own, in the chosen precision, without any effect on the training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cersa_diffusion import ConfigError
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, train_dreambooth
from cersa_diffusion.training.data.classes import sample_class_pictures

from ..conftest import DEVICE, raises
from ..pipelines_small import SIZE

PROMPT = "a cat"
SEED_STRIDE = 100_003


class Losses(TrainingCallback):
    def __init__(self):
        self.values = []

    def on_step(self, progress):
        self.values.append(progress.loss)


@pytest.fixture
def settings(small_settings, tmp_path) -> dict:
    return small_settings | {
        "with_prior_preservation": True,
        "class_data_dir": str(tmp_path / "classes"),
        "class_prompt": PROMPT,
        "num_class_images": 3,
        "sample_batch_size": 2,
        "max_train_steps": 2,
    }


def pictures(folder: str) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_they_are_the_pictures_of_the_base_in_this_precision(settings, precision):
    config = DreamBoothConfig(**settings, seed=7, prior_generation_precision=precision)
    sample_class_pictures(config, DEVICE)
    drawn = pictures(config.class_data_dir)
    assert list(drawn) == ["class-00000.png", "class-00001.png", "class-00002.png"]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base, exact = load_base(config.pretrained_model_name_or_path, dtype=dtype), load_base(config.pretrained_model_name_or_path)
    # The pictures of the first batch.
    seeds = [torch.Generator().manual_seed(7 * SEED_STRIDE + number) for number in (0, 1)]
    latents = base([PROMPT] * 2, generator=seeds, height=SIZE, width=SIZE, output_type="latent").images
    with torch.no_grad():
        decoded = exact.vae.decode(latents.float() / exact.vae.config.scaling_factor).sample
    expected = exact.image_processor.postprocess(decoded)
    assert all(np.array_equal(drawn[f"class-0000{number}.png"], np.asarray(expected[number])) for number in (0, 1))


def test_drawing_them_changes_nothing_of_the_training(settings, tmp_path):
    losses = {}
    for name in ("drawn", "found"):
        recorder = Losses()
        own = settings | {"output_dir": str(tmp_path / name), "prior_generation_precision": "bf16"}
        train_dreambooth(DreamBoothConfig(**own), [recorder])
        losses[name] = recorder.values
    assert len(losses["drawn"]) == 2 and losses["drawn"] == losses["found"]


def test_a_base_that_cannot_be_loaded_leaves_no_folder(settings, tmp_path):
    config = DreamBoothConfig(**settings | {"pretrained_model_name_or_path": str(tmp_path / "nowhere" / "base")})
    with raises(ConfigError, "base"):
        sample_class_pictures(config, DEVICE)
    assert not Path(config.class_data_dir).exists()
