"""Encoded once is as good as encoded every time, in memory and on disk, whatever happens to the files."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cersa_diffusion import NonFiniteError
from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.data.dataset import DreamBoothDataset, collate, fixed_views
from cersa_diffusion.training.data.latent_cache import cache_latents, cache_text_embeddings
from cersa_diffusion.training.run.loss import DreamBoothLoss
from cersa_diffusion.training.settings.config import DreamBoothConfig, DreamBoothXLConfig

from ..conftest import DEVICE, raises, warns
from ..pipelines_small import SIZE, pipeline

PROMPTS = ["a sks cat", "a cat", "a mat"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    found = []
    for number, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 40 - 10 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        found.append(Example(tmp_path / f"{number}.png", prompt))
    return found


def settings(config_class=DreamBoothConfig, **changes) -> DreamBoothConfig:
    options = {"resolution": SIZE, "random_flip": True, "train_text_encoder": False, "instance_data_dir": "pictures"} | changes
    return config_class(pretrained_model_name_or_path="base", instance_prompt="a sks cat", **options)


def losses(examples, config, base, batch_size, *, latents=None, embeddings=None) -> list[torch.Tensor]:
    loss = DreamBoothLoss(config, base, DEVICE, embeddings)
    data = DreamBoothDataset(examples, examples[:2], config, first=0, last=8, samples_per_step=batch_size, latents=latents)
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate)
    with torch.no_grad():
        return [loss.squared_errors(batch, {})[0] for batch in loader]


@pytest.mark.parametrize("buckets", [{}, {"aspect_ratio_buckets": True, "bucket_step": 8}])
def test_cached_latents_train_as_pictures_do(examples, buckets):
    """The loss encodes the two pictures of a sample together, the cache one by one: equal but for that rounding."""
    config, base = settings(center_crop=True, cache_latents=True, **buckets), pipeline("sd1")
    latents = cache_latents(examples, examples[:2], config, base.vae, show_progress=False)
    for batch_size in (1, 4):
        live = losses(examples, config, base, batch_size)
        cached = losses(examples, config, base, batch_size, latents=latents)
        assert all(torch.allclose(first, second, rtol=1e-4) for first, second in zip(live, cached, strict=True))


def test_one_picture_a_batch_is_the_same_bit_for_bit(examples):
    config, base = settings(center_crop=True, cache_latents=True), pipeline("sd2")
    latents = cache_latents(examples, [], config, base.vae, show_progress=False)
    loss = DreamBoothLoss(config, base, DEVICE)
    options = {"first": 3, "last": 9, "samples_per_step": 1}
    for index in range(6):
        pictures, cached = (
            collate([DreamBoothDataset(examples, [], config, **options, latents=each)[index]]) for each in (None, latents)
        )
        assert "pixels" not in cached and "latent_mean" not in pictures
        with torch.no_grad():
            assert torch.equal(loss.squared_errors(pictures, {})[0], loss.squared_errors(cached, {})[0])


def test_entries_are_the_posterior_of_the_vae(examples):
    config, vae = settings(), pipeline("sd1").vae
    latents = cache_latents(examples, [], config, vae, show_progress=False)
    assert set(latents) == set(fixed_views(examples, [], config)) and len(latents) == 6
    for view, (mean, std) in latents.items():
        with torch.no_grad():
            posterior = vae.encode(view.pixels()[None].to(DEVICE)).latent_dist
        assert torch.equal(mean, posterior.mean[0].cpu()) and torch.equal(std, posterior.std[0].cpu())
        assert not mean.requires_grad


@pytest.fixture
def counted(monkeypatch):
    """A VAE that counts how often it encodes."""
    vae = pipeline("sd1").vae
    encode, calls = vae.encode, []

    def counting(pixels):
        calls.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", counting)
    vae.calls = calls
    return vae


def entries(folder) -> list:
    return sorted(folder.glob("latents/??/*.safetensors"))


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True)
    )


def test_memory_alone_writes_nothing(examples, counted, cache_folder):
    cache_latents(examples, [], settings(), counted, show_progress=False)
    assert len(counted.calls) == 6 and not cache_folder.exists()


def test_a_later_run_reads_what_the_first_has_written(examples, counted, cache_folder):
    config = settings(cache_latents=True, cache_to_disk=True, center_crop=True)
    first = cache_latents(examples, [], config, counted, show_progress=False)
    assert len(counted.calls) == len(entries(cache_folder)) == 6
    assert same(cache_latents(examples, [], config, counted, show_progress=False), first) and len(counted.calls) == 6
    assert not list(cache_folder.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "other bytes", "foreign", "empty"])
def test_damaged_files_are_computed_again(examples, counted, cache_folder, damage):
    config = settings(cache_latents=True, cache_to_disk=True)
    first = cache_latents(examples, [], config, counted, show_progress=False)
    victim = entries(cache_folder)[2]
    content = victim.read_bytes()
    changed = content[:-3] + bytes(byte ^ 1 for byte in content[-3:])
    victim.write_bytes({"cut": content[:-9], "other bytes": changed, "foreign": b"hello", "empty": b""}[damage])
    with warns(UserWarning, victim.name):
        again = cache_latents(examples, [], config, counted, show_progress=False)
    assert same(again, first) and len(counted.calls) == 7
    assert victim.read_bytes() == content


@pytest.mark.parametrize("change", ["picture", "size", "crop", "weights", "dtype"])
def test_what_an_entry_depends_on_makes_another_entry(examples, counted, change):
    options = {"cache_latents": True, "cache_to_disk": True, "random_flip": False}
    wide = examples[:1]
    cache_latents(wide, [], settings(**options), counted, show_progress=False)
    if change == "picture":
        Image.open(wide[0].picture).rotate(180).save(wide[0].picture)
    if change == "size":
        options["resolution"] = 24
    if change == "crop":
        options["center_crop"] = True
    if change == "weights":
        with torch.no_grad():
            next(counted.parameters())[0] += 0.1
    if change == "dtype":
        counted.double()
    changed = cache_latents(wide, [], settings(**options), counted, show_progress=False)
    assert len(counted.calls) == 2 and all(mean.dtype == counted.dtype for mean, _ in changed.values())


def test_a_name_does_not_matter_and_a_caption_does_not(examples, counted, tmp_path):
    config = settings(cache_latents=True, cache_to_disk=True)
    cache_latents(examples[:1], [], config, counted, show_progress=False)
    os.rename(examples[0].picture, tmp_path / "renamed.png")
    renamed = [Example(tmp_path / "renamed.png", "another caption")]
    cache_latents(renamed, [], config, counted, show_progress=False)
    assert len(counted.calls) == 2


def test_without_a_cache_folder_a_warning_says_so(examples, counted, monkeypatch):
    monkeypatch.setenv("CERSA_CACHE", "off")
    config = settings(cache_latents=True, cache_to_disk=True)
    with warns(UserWarning, "cache_to_disk", "CERSA_CACHE"):
        assert len(cache_latents(examples, [], config, counted, show_progress=False)) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_latents(examples, [], settings(), counted, show_progress=False)


def test_latents_that_overflow_are_refused_and_not_kept(examples, cache_folder):
    vae = pipeline("sd1").vae
    with torch.no_grad():
        next(vae.parameters()).fill_(float("nan"))
    with raises(NonFiniteError, "0.png", "float32"):
        cache_latents(examples, [], settings(cache_latents=True, cache_to_disk=True), vae, show_progress=False)
    assert not entries(cache_folder)


@pytest.mark.parametrize(("family", "config_class"), [("sd1", DreamBoothConfig), ("sdxl", DreamBoothXLConfig)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_embeddings_train_as_prompts_do(examples, family, config_class, on_disk, cache_folder):
    config = settings(config_class, pre_compute_text_embeddings=True, cache_to_disk=on_disk)
    base = pipeline(family)
    expected = losses(examples, config, base, 2)
    prompts = [example.prompt for example in examples] * 2
    first = cache_text_embeddings(prompts, config, base, show_progress=False)
    again = cache_text_embeddings(prompts, config, base, show_progress=False)
    assert list(first) == PROMPTS and all(torch.equal(again[p][n], first[p][n]) for p in first for n in first[p])
    assert len(list(cache_folder.glob("text_embeddings/??/*.safetensors"))) == 3 * on_disk
    base.text_encoder = base.text_encoder_2 = None
    for found in (first, again):
        cached = losses(examples, config, base, 2, embeddings=found)
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(expected, cached, strict=True))


def test_another_text_encoder_or_tokenizer_has_entries_of_its_own(cache_folder):
    config, base = settings(pre_compute_text_embeddings=True, cache_to_disk=True), pipeline("sd1")
    first = cache_text_embeddings(["a cat"], config, base, show_progress=False)["a cat"]
    base.tokenizer.model_max_length = 8
    shorter = cache_text_embeddings(["a cat"], config, base, show_progress=False)["a cat"]
    assert {name: tensor.shape[0] for name, tensor in shorter.items()} == dict.fromkeys(first, 8)
    base.text_encoder.half()
    assert all(
        tensor.dtype == torch.float16
        for tensor in cache_text_embeddings(["a cat"], config, base, show_progress=False)["a cat"].values()
    )
    assert len(list(cache_folder.glob("text_embeddings/??/*.safetensors"))) == 3
