"""All scores in one go: each is what its own definition gives, and appears only where there is something to measure."""

import numpy as np
import pytest
from PIL import ImageFilter

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.evaluation import Drift, Sample, Scorer
from cersa_diffusion.pipelines.open import load_base

from ..conftest import raises


@pytest.fixture(scope="module")
def scorer(clip, vit) -> Scorer:
    return Scorer({"torchmetrics": clip}, vit)


@pytest.fixture(scope="module")
def samples(pictures) -> list[Sample]:
    """Two prompts with two pictures each, and one alone."""
    prompts = ["a cat", "a dog", "a cat", "a dog", "a robot"]
    return [Sample(f"{i}.png", prompt, picture) for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=False))]


def test_each_mean_is_what_its_definition_gives(scorer, samples, pictures, clip, vit, base_path):
    references, base = pictures[8:11], [picture.filter(ImageFilter.GaussianBlur(6)) for picture in pictures[:3]]
    evaluation = scorer.evaluate(samples, references, Drift(pictures[:3], base, load_base(str(base_path)).vae))
    expected = {}
    for encoder, likeness, key in ((clip, "clip_i", "clip"), (vit, "vit_features", "vit_features")):
        a, r, d = (encoder.embed_pictures(group).numpy() for group in (pictures[:5], references, base))
        expected[likeness] = np.mean([[x @ y for y in r] for x in a])
        expected[f"diversity_{key}"] = np.mean([1 - a[0] @ a[2], 1 - a[1] @ a[3]])
        expected[f"drift_{key}"] = np.mean([1 - x @ y for x, y in zip(a[:3], d, strict=True)])
    assert {name: evaluation.means[name] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert set(evaluation.means) == set(expected) | {"clipscore_torchmetrics", "drift_latent"}
    assert [row["prompt"] for row in evaluation.rows] == [sample.prompt for sample in samples]
    scores = [row["clipscore_torchmetrics"] for row in evaluation.rows]
    assert evaluation.means["clipscore_torchmetrics"] == pytest.approx(np.mean(scores), abs=2e-5)


def test_what_cannot_be_measured_is_left_out(scorer, samples):
    evaluation = scorer.evaluate(samples[:2])
    assert set(evaluation.means) == {"clipscore_torchmetrics"}
    assert "seed" not in evaluation.rows[0] and str(evaluation).count("\n") == 2


def test_no_pictures_and_unknown_backends(scorer, clip_path):
    with raises(ConfigError, "0"):
        scorer.evaluate([])
    with raises(ConfigError, "jax", "torchmetrics", "open_clip"):
        Scorer.load(str(clip_path), ["jax"])
