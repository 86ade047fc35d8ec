"""CLIPScore and CLIP-I on the embedded CLIP: two libraries, one number, checked against embeddings by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.clip_models import OpenClipModel, load_clip
from cersa_diffusion.metrics.clipscore import clipscore_open_clip, clipscore_torchmetrics
from cersa_diffusion.metrics.similarity import clip_image_similarity, latent_distance
from cersa_diffusion.training.base import load_base
from cersa_diffusion.training.data import load_picture

from ..conftest import run_script


@pytest.fixture(scope="module")
def clip(clip_path):
    return load_clip(clip_path)


@pytest.fixture(scope="module")
def open_clip_model(clip_path):
    return OpenClipModel(clip_path)


@pytest.fixture(scope="module")
def pictures(subject, subject_path) -> list[Image.Image]:
    entries = subject["instance"] + subject["held_back"]
    return [load_picture(subject_path / entry["file"]).resize((64, 64), Image.Resampling.BOX) for entry in entries]


@pytest.fixture(scope="module")
def prompts(subject) -> list[str]:
    return [entry["prompt"].replace(" sks ", " ") for entry in subject["instance"] + subject["held_back"]]


def test_both_backends_agree(clip, open_clip_model, pictures, prompts):
    first, second = clipscore_torchmetrics(pictures, prompts, clip), clipscore_open_clip(pictures, prompts, open_clip_model)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 1e-3


def test_score_is_a_hundred_times_the_cosine_of_the_embeddings(clip, pictures, prompts):
    model, processor = clip
    inputs = processor(text=prompts[:1], images=pictures[:1], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.model(**inputs)
    cosine = float((output.image_embeds * output.text_embeds).sum())
    assert clipscore_torchmetrics(pictures[:1], prompts[:1], clip)[0] == pytest.approx(100 * max(cosine, 0), abs=1e-3)


def test_the_matching_background_scores_above_every_other_one(open_clip_model, subject, pictures):
    """The bundled cats were never shown to the CLIP; the background colours were."""
    wins = total = 0
    for entry, picture in zip(subject["held_back"], pictures[len(subject["instance"]) :], strict=True):
        right = entry["prompt"].replace(" sks ", " ")
        others = [right.replace(entry["background"], colour) for colour in subject["background_colours"]]
        scores = dict(zip(others, clipscore_open_clip([picture] * len(others), others, open_clip_model), strict=True))
        wins += sum(scores[right] > score for prompt, score in scores.items() if prompt != right)
        total += len(others) - 1
    assert wins >= 0.9 * total


def test_similarity_of_a_picture_with_itself_is_one(clip, pictures):
    assert clip_image_similarity(pictures[:1], pictures[:1], clip) == pytest.approx(1, abs=1e-5)
    assert clip_image_similarity(pictures[:1], pictures[1:], clip) < 1


def test_latent_distance_by_hand(base_path, pictures):
    autoencoder = load_base(str(base_path)).vae
    assert latent_distance(pictures, pictures, autoencoder) == 0
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1 for picture in pictures[:2]]
    with torch.no_grad():
        first, second = (autoencoder.encode(p).latent_dist.mean for p in pixels)
    expected = float((first - second).square().mean().sqrt())
    assert latent_distance(pictures[:1], pictures[1:2], autoencoder) == pytest.approx(expected, rel=1e-4)


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_clip(tmp_path)
    with pytest.raises(ConfigError, match="ARCHITECTURE:PRETRAINED"):
        OpenClipModel("no-such-model")


def test_script_scores_a_folder_and_writes_csv_and_json(subject_path, subject, tmp_path):
    prompts = {entry["file"].split("/")[-1]: entry["prompt"].replace(" sks ", " ") for entry in subject["instance"]}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    arguments = ["--images", subject_path / "instance", "--prompts", tmp_path / "prompts.json", "--output", tmp_path / "out"]
    finished = run_script("scripts/eval_clipscore.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "out" / "clipscore.json").read_text())
    assert len(result["pictures"]) == 5 and set(result["mean"]) == {"torchmetrics", "open_clip"}
    for backend, mean in result["mean"].items():
        assert mean == pytest.approx(sum(row[backend] for row in result["pictures"]) / 5)
        assert 0 < mean <= 100
    assert len((tmp_path / "out" / "clipscore.csv").read_text().splitlines()) == 6


def test_script_names_the_picture_without_a_prompt(subject_path, tmp_path):
    (tmp_path / "prompts.json").write_text("{}")
    finished = run_script(
        "scripts/eval_clipscore.py", "--images", subject_path / "instance", "--prompts", tmp_path / "prompts.json"
    )
    assert finished.returncode != 0 and "has no prompt for" in finished.stderr.splitlines()[-1]
