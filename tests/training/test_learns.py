"""Every method learns the bundled robot: its pictures come nearer to the held-back ones than the base's."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cersa_diffusion.metrics.similarity import latent_distance
from cersa_diffusion.pictures import load_picture
from cersa_diffusion.pipelines.draw import generate
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, load_result, train_dreambooth

# Part of the distance to the held-back pictures that is gone after 60 steps of 4 pictures; a method that does nothing has 0.
MARGIN = 0.15
RATES = {"cersa": 2e-3, "lora": 2e-3, "pissa": 1e-3, "dora": 2e-3, "svfit": 3e-2, "svft": 3e-2, "full": 5e-4}


@pytest.fixture(scope="module")
def robot(subject_path) -> Path:
    return subject_path.parent / "fluent-robot"


@pytest.fixture(scope="module")
def distance(robot, base_path):
    """Pipeline -> distance of its pictures of the held-back prompts from the held-back pictures."""
    held_back = json.loads((robot / "subject.json").read_text())["held_back"]
    references = [load_picture(robot / entry["file"]).resize((64, 64), Image.Resampling.BOX) for entry in held_back]
    autoencoder = load_base(str(base_path)).vae

    def of(pipeline) -> float:
        pipeline.set_progress_bar_config(disable=True)
        pictures = [row[0] for row in generate(pipeline, [entry["prompt"] for entry in held_back], [0], steps=15)]
        return latent_distance(pictures, references, autoencoder)

    return of


@pytest.mark.parametrize("method", [name if name == "cersa" else pytest.param(name, marks=pytest.mark.slow) for name in RATES])
def test_learns_the_subject(method, robot, base_path, distance, tmp_path):
    config = DreamBoothConfig(
        str(base_path),
        "a 3d emoji of a sks robot",
        str(robot / "instance"),
        method=method,
        learning_rate=RATES[method],
        text_encoder_lr=RATES[method] / 10,
        resolution=64,
        center_crop=True,
        cache_latents=True,
        max_train_steps=60,
        lr_scheduler="cosine",
        output_dir=str(tmp_path),
    )
    result = train_dreambooth(config, [])
    before, after = distance(load_base(str(base_path))), distance(load_result(method, Path(result.weights_path), str(base_path)))
    print(f"{method}: {before:.3f} -> {after:.3f}, {1 - after / before:.0%}")
    assert after < (1 - MARGIN) * before
