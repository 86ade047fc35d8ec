"""Likeness, drift and diversity: against sums written out by hand, and in the direction that eyes would say."""

import itertools

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.encoders import VisionEncoder
from cersa_diffusion.metrics.similarity import (
    Lpips,
    clip_image_similarity,
    diversity,
    latent_distance,
    paired_distance,
    similarity_to_references,
)
from cersa_diffusion.pipelines.open import load_base

from ..conftest import DEVICE, raises


def unit_vectors(count: int, seed: int, width: int = 6) -> torch.Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(max_examples=25)
@given(count=st.integers(2, 5), references=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_three_measures_by_hand(count, references, seed):
    a, b = unit_vectors(count, seed), unit_vectors(references, seed + 100)
    expected = [sum(float(cosine_similarity(x, y, dim=0)) for y in b) / references for x in a]
    assert similarity_to_references(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    pairs = [1 - float(cosine_similarity(x, y, dim=0)) for x, y in itertools.combinations(a, 2)]
    assert diversity(a) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    other = unit_vectors(count, seed + 200)
    expected = sum(1 - float(cosine_similarity(x, y, dim=0)) for x, y in zip(a, other, strict=True)) / count
    assert paired_distance(a, other) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=10)
@given(count=st.integers(2, 5), seed=st.integers(0, 99))
def test_nothing_moved_and_all_alike_are_zero(count, seed):
    a = unit_vectors(count, seed)
    assert paired_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert diversity(a[:1].repeat(count, 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_pictures_of_one_subject_are_more_alike_than_those_of_two(kind, pictures, prompts, request):
    encoder = request.getfixturevalue(kind)
    cats = [picture for picture, prompt in zip(pictures, prompts, strict=True) if "cat on a white" in prompt]
    robots = [picture for picture, prompt in zip(pictures, prompts, strict=True) if "robot on a white" in prompt]
    assert clip_image_similarity(cats[:1], cats[:1], encoder) == pytest.approx(1, abs=1e-5)
    assert clip_image_similarity(cats[:3], cats[3:], encoder) > clip_image_similarity(cats, robots, encoder)


def test_clip_picture_features_by_hand(clip, pictures):
    # As large as the model's input: nothing to resize.
    small = [picture.resize((64, 64)) for picture in pictures[:3]]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in small])
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        output = clip.model.vision_model(pixel_values=((pixels - mean) / std).to(DEVICE))
        expected = normalize(clip.model.visual_projection(output.pooler_output), dim=-1)
    torch.testing.assert_close(clip.embed_pictures(small, batch_size=2), expected, atol=1e-5, rtol=0)


def test_vision_features_are_those_of_the_class_token(vit, vit_path, pictures):
    small = [picture.resize((64, 64)) for picture in pictures[:3]]
    model = AutoModel.from_pretrained(vit_path, dtype=torch.float32)
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in small])
    with torch.no_grad():
        expected = normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(vit.embed_pictures(small, batch_size=2), expected, atol=1e-5, rtol=0)


def small_vit(folder, kind: str):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings |= {"image_size": 16, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(**settings)) if kind == "dinov2" else ViTForImageClassification(ViTConfig(**settings))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "folder", "label"),
    [("dinov2", "backbone", "DINO"), ("vit", "dino-vits16", "DINO"), ("vit", "classifier", "ViT features")],
)
def test_only_dino_is_called_dino(kind, folder, label, pictures, tmp_path):
    encoder = VisionEncoder(small_vit(tmp_path / folder, kind))
    assert encoder.label == label
    assert encoder.embed_pictures(pictures[:2]).shape == (2, 16)


def test_vision_models_that_cannot_be_used(clip_path, tmp_path):
    with raises(ConfigError, "vision"):
        VisionEncoder(tmp_path)
    with raises(ConfigError, "clip", "vit"):
        VisionEncoder(clip_path)


def test_latent_distance_by_hand(base_path, pictures):
    autoencoder = load_base(str(base_path)).vae
    small = [picture.resize((64, 64)) for picture in pictures[:2]]
    assert latent_distance(small, small, autoencoder) == 0
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1 for picture in small]
    with torch.no_grad():
        first, second = (autoencoder.encode(p).latent_dist.mean for p in pixels)
    expected = autoencoder.config.scaling_factor * float((first - second).square().mean().sqrt())
    assert latent_distance(small[:1], small[1:], autoencoder) == pytest.approx(expected, rel=1e-4)
    with raises(ConfigError, "2", "1"):
        latent_distance(small, small[:1], autoencoder)


@pytest.fixture
def hub_folder(monkeypatch, tmp_path):
    """torch's hub folder, empty, with nothing to be had from the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_lpips_over_all_pairs(hub_folder, pictures):
    # A network with random weights in the place of the downloaded one: what is tested is the sum over the pairs.
    torch.manual_seed(0)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), hub_folder / weights.url.split("/")[-1])
    tensors = [torch.from_numpy(np.array(p.resize((64, 64)))).permute(2, 0, 1)[None] / 127.5 - 1 for p in pictures[:3]]
    expected = [
        float(learned_perceptual_image_patch_similarity(a, b, net_type="squeeze")) for a, b in itertools.combinations(tensors, 2)
    ]
    lpips = Lpips("squeeze")
    small = [picture.resize((64, 64)) for picture in pictures[:3]]
    assert lpips.diversity(small) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert lpips.diversity([small[0], Image.fromarray(np.array(small[0]))]) == pytest.approx(0, abs=1e-6)


def test_lpips_without_its_weights(hub_folder):
    with raises(ConfigError, "LPIPS", "alex", "checkpoints"):
        Lpips("alex")
