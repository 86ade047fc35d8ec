"""The behaviours that users of the LoRA loader rely on, by their numbers in our list: 1 to 26, outputs and several adapters.

Files, metadata, devices and hot swap (27 to 37) are in test_loader_parity_files.py.
"""

import copy
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError, NonFiniteError
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import DEVICE, raises, warns
from ..pipelines_small import FAMILIES, TARGETS, adapted_components, cersa_modules, denoiser, differ, picture, pipeline

# For what does not depend on the kind of model: one each with one text encoder, with two, and with a transformer.
SOME_FAMILIES = ("sd1", "sdxl", "flux")
# Bit-exact where the same numbers are computed in the same way; this where the order of the operations differs.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def emoji(base_path):
    """Builder of pipelines with the embedded base (four steps)."""
    built = DiffusionPipeline.from_pretrained(base_path).to(DEVICE)
    return lambda: copy.deepcopy(built)


@pytest.fixture(scope="module")
def emoji_file(emoji, tmp_path_factory):
    pipe = emoji()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    torch.manual_seed(5)
    for name, model in models.items():
        cersa.inject_cersa(model, CersaConfig(alpha=0.8, target_modules=TARGETS[name]), show_progress=False)
        for core in cersa.trainable_parameters(model):
            core.data.normal_(std=0.2 / len(core) ** 0.5)
    path = tmp_path_factory.mktemp("emoji") / "adapter.safetensors"
    cersa.save_adapter(models, path)
    return path


def emoji_picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox", num_inference_steps=4, guidance_scale=4.0, generator=generator, output_type="pt").images[0]


def two_adapters(family, adapter_file):
    pipe = pipeline(family)
    pipe.load_cersa_weights(adapter_file(family, seed=1), adapter_name="a")
    pipe.load_cersa_weights(adapter_file(family, seed=2), adapter_name="b")
    return pipe


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_parity_01_shape_of_the_base(family, adapter_file):
    pipe = pipeline(family)
    before = picture(pipe)
    pipe.load_cersa_weights(adapter_file(family))
    assert before.shape == picture(pipe).shape == (3, 16, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_02_an_adapter_of_the_text_encoder_alone_changes_the_output(family, adapter_file):
    pipe = pipeline(family)
    before = picture(pipe)
    pipe.load_cersa_weights(adapter_file(family, components=("text_encoder",)))
    assert differ(picture(pipe), before)
    assert not cersa_layers(denoiser(pipe)) and cersa_layers(pipe.text_encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_03_an_adapter_of_all_components_changes_the_output(family, adapter_file):
    pipe = pipeline(family)
    before = picture(pipe)
    pipe.load_cersa_weights(adapter_file(family))
    assert differ(picture(pipe), before)
    assert all(cersa_layers(model) for model in adapted_components(pipe).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_04_save_unload_load_gives_the_same_output(family, adapter_file, tmp_path):
    pipe = pipeline(family)
    pipe.load_cersa_weights(adapter_file(family), adapter_name="a")
    adapted = picture(pipe)
    pipe.save_cersa_weights(tmp_path, dtype=torch.float32)
    pipe.unload_cersa_weights()
    assert differ(picture(pipe), adapted)
    pipe.load_cersa_weights(tmp_path)
    torch.testing.assert_close(picture(pipe), adapted, **CLOSE)


def test_parity_04_on_the_embedded_base(emoji, emoji_file, tmp_path):
    pipe = emoji()
    pipe.load_cersa_weights(emoji_file)
    adapted = emoji_picture(pipe)
    pipe.save_cersa_weights(tmp_path)
    pipe.unload_cersa_weights()
    assert differ(emoji_picture(pipe), adapted)
    pipe.load_cersa_weights(tmp_path)
    torch.testing.assert_close(emoji_picture(pipe), adapted, rtol=0, atol=2e-2)  # stored as float16


def test_parity_05_loading_initialises_nothing_that_the_file_overwrites(adapter_file):
    """What `low_cpu_mem_usage` is for in the LoRA loader holds always; so there is no such argument."""
    pipe = pipeline("sd1")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pipe.load_cersa_weights(adapter_file("sd1"))
    assert torch.equal(torch.get_rng_state(), before)
    with raises(TypeError, "low_cpu_mem_usage"):
        pipe.load_cersa_weights(adapter_file("sd1"), low_cpu_mem_usage=True)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_parity_07_strength_half_changes_and_zero_is_the_truncated_base(family, adapter_file):
    whole, half, none, truncated = (pipeline(family) for _ in range(4))
    for pipe, strength in ((whole, 1.0), (half, 0.5), (none, 0.0)):
        pipe.load_cersa_weights(adapter_file(family), strength=strength)
    for name, model in adapted_components(truncated).items():
        cersa.inject_cersa(model, CersaConfig(alpha=0.9, rank_multiple=1, target_modules=TARGETS[name]), show_progress=False)
    assert differ(picture(half), picture(whole)) and differ(picture(half), picture(none))
    assert torch.equal(picture(none), picture(truncated))


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_parity_08_set_adapters_with_a_strength_equals_loading_with_it(family, adapter_file):
    loaded, set_later = pipeline(family), pipeline(family)
    loaded.load_cersa_weights(adapter_file(family), adapter_name="a", strength=0.4)
    set_later.load_cersa_weights(adapter_file(family), adapter_name="a")
    set_later.set_cersa_adapters("a", 0.4)
    assert torch.equal(picture(set_later), picture(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_09_unload_restores_the_base_and_leaves_no_adapter_module(family, adapter_file):
    pipe, untouched = pipeline(family), pipeline(family)
    before = picture(pipe)
    pipe.load_cersa_weights(adapter_file(family))
    pipe.unload_cersa_weights()
    assert torch.equal(picture(pipe), before)
    assert not cersa_modules(pipe) and pipe.get_list_cersa_adapters() == {}
    for name, model in adapted_components(pipe).items():
        expected = getattr(untouched, name).state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_parity_09_on_the_embedded_base(emoji, emoji_file):
    pipe = emoji()
    before = emoji_picture(pipe)
    pipe.load_cersa_weights(emoji_file)
    assert differ(emoji_picture(pipe), before)
    pipe.unload_cersa_weights()
    assert torch.equal(emoji_picture(pipe), before)


def test_parity_10_a_file_with_some_of_the_layers(tmp_path):
    pipe, source = pipeline("sd1"), pipeline("sd1")
    before = picture(pipe)
    cersa.inject_cersa(source.unet, CersaConfig(target_modules=["attn1.to_q", "attn2.to_v"]), show_progress=False)
    for core in cersa.trainable_parameters(source.unet):
        core.data.normal_(std=0.1)
    cersa.save_adapter({"unet": source.unet}, tmp_path / "some.safetensors")
    pipe.load_cersa_weights(tmp_path / "some.safetensors")
    assert differ(picture(pipe), before)
    assert {name.rsplit(".", 2)[-2:][0] for name in cersa_layers(pipe.unet)} == {"attn1", "attn2"}


def test_parity_11_every_layer_has_its_own_rank(adapter_file):
    pipe = pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    ranks = {name: layer.cores["a"].rank for name, layer in cersa_layers(pipe.unet).items()}
    assert len(set(ranks.values())) > 3
    assert all(layer.cores["a"].D.shape == (layer.kept_rank, layer.kept_rank) for layer in cersa_modules(pipe))


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_12_save_pretrained_with_an_active_adapter(family, adapter_file, tmp_path):
    pipe = pipeline(family)
    pipe.load_cersa_weights(adapter_file(family), strength=0.7)
    adapted = picture(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(pipe), adapted) and len(cersa_modules(pipe)) > 10
    stock = DiffusionPipeline.from_pretrained(tmp_path).to(DEVICE)
    assert not cersa_modules(stock)
    torch.testing.assert_close(picture(stock), adapted, **CLOSE)


def test_parity_12_on_the_embedded_base(emoji, emoji_file, tmp_path):
    pipe = emoji()
    pipe.load_cersa_weights(emoji_file)
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(emoji_picture(stock), emoji_picture(pipe), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_13_fused_equals_unfused_and_unfuse_restores(family, adapter_file):
    pipe = pipeline(family)
    before = picture(pipe)
    pipe.load_cersa_weights(adapter_file(family), strength=0.8)
    adapted = picture(pipe)
    pipe.fuse_cersa()
    assert not cersa_modules(pipe)
    torch.testing.assert_close(picture(pipe), adapted, **CLOSE)
    pipe.unfuse_cersa()
    assert torch.equal(picture(pipe), adapted)
    pipe.fuse_cersa(components=["text_encoder"])
    assert cersa_modules(pipe) and differ(picture(pipe), before)
    pipe.unload_cersa_weights()
    assert torch.equal(picture(pipe), before)


def test_parity_13_on_the_embedded_base(emoji, emoji_file):
    pipe = emoji()
    before = emoji_picture(pipe)
    pipe.load_cersa_weights(emoji_file)
    adapted = emoji_picture(pipe)
    pipe.fuse_cersa()
    torch.testing.assert_close(emoji_picture(pipe), adapted, rtol=0, atol=1e-3)
    pipe.unfuse_cersa()
    assert torch.equal(emoji_picture(pipe), adapted)
    pipe.fuse_cersa()
    pipe.unload_cersa_weights()
    assert torch.equal(emoji_picture(pipe), before)


def test_parity_14_fuse_adapters_by_name(adapter_file):
    pipe, only_a = two_adapters("sdxl", adapter_file), pipeline("sdxl")
    both = picture(pipe)
    only_a.load_cersa_weights(adapter_file("sdxl", seed=1))
    pipe.fuse_cersa(adapter_names=["a", "b"])
    torch.testing.assert_close(picture(pipe), both, **CLOSE)
    pipe.unfuse_cersa()
    pipe.fuse_cersa(adapter_names="a")
    torch.testing.assert_close(picture(pipe), picture(only_a), **CLOSE)
    with raises(ConfigError, "UNet2DConditionModel", "fused", "unfuse_cersa()"):
        pipe.fuse_cersa(adapter_names="b")
    pipe.unfuse_cersa()
    pipe.set_cersa_adapters("a")
    with raises(ConfigError, "'b'", "active", "['a']"):
        pipe.fuse_cersa(adapter_names=["a", "b"])


@pytest.mark.parametrize("family", ["sd2", "flux"])
def test_parity_15_fuse_with_a_scale_equals_run_time_strength(family, adapter_file):
    pipe, half = pipeline(family), pipeline(family)
    pipe.load_cersa_weights(adapter_file(family))
    half.load_cersa_weights(adapter_file(family), strength=0.5)
    pipe.fuse_cersa(cersa_scale=0.5)
    torch.testing.assert_close(picture(pipe), picture(half), **CLOSE)


def test_parity_17_nan_with_safe_fusing_raises_before_anything_is_fused(adapter_file):
    pipe = pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    adapted = picture(pipe)
    layers = list(cersa_layers(pipe.text_encoder).values())
    value = layers[-1].cores["a"].D[0, 0].item()
    layers[-1].cores["a"].D.data[0, 0] = torch.nan
    with raises(NonFiniteError, list(cersa_layers(pipe.text_encoder))[-1], "safe_fusing"):
        pipe.fuse_cersa(safe_fusing=True)
    assert len(cersa_modules(pipe)) == len(cersa_layers(pipe.unet)) + len(layers)
    layers[-1].cores["a"].D.data[0, 0] = value
    assert torch.equal(picture(pipe), adapted)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_parity_18_two_adapters_alone_together_weighted_and_disabled(family, adapter_file):
    pipe, truncated = two_adapters(family, adapter_file), pipeline(family)
    truncated.load_cersa_weights(adapter_file(family), strength=0)
    pictures = []
    for names, weights in (("a", None), ("b", None), (["a", "b"], None), (["a", "b"], [0.5, 0.6])):
        pipe.set_cersa_adapters(names, weights)
        pictures.append(picture(pipe))
    pipe.disable_cersa()
    pictures.append(picture(pipe))
    assert all(differ(first, second) for i, first in enumerate(pictures) for second in pictures[:i])
    assert torch.equal(pictures[-1], picture(truncated))
    pipe.enable_cersa()
    assert torch.equal(picture(pipe), pictures[-2])


def test_parity_19_delete_one_a_list_and_all(adapter_file):
    pipe = pipeline("sdxl")
    before = picture(pipe)
    for seed, name in enumerate("abc"):
        pipe.load_cersa_weights(adapter_file("sdxl", seed=seed), adapter_name=name)
    pipe.delete_cersa_adapters("b")
    assert pipe.get_list_cersa_adapters() == {name: ["a", "c"] for name in ("unet", "text_encoder", "text_encoder_2")}
    pipe.set_cersa_adapters("c")
    only_c = pipeline("sdxl")
    only_c.load_cersa_weights(adapter_file("sdxl", seed=2))
    assert torch.equal(picture(pipe), picture(only_c))
    pipe.delete_cersa_adapters(["a", "c"])
    assert pipe.get_list_cersa_adapters() == {} and not cersa_modules(pipe)
    assert torch.equal(picture(pipe), before)


def test_parity_20_load_delete_load(adapter_file):
    pipe = pipeline("sd2")
    pipe.load_cersa_weights(adapter_file("sd2"), adapter_name="a")
    adapted = picture(pipe)
    pipe.delete_cersa_adapters("a")
    pipe.load_cersa_weights(adapter_file("sd2"), adapter_name="a")
    assert torch.equal(picture(pipe), adapted)


def test_parity_22_unknown_adapter_names(adapter_file):
    pipe = two_adapters("sd1", adapter_file)
    before = picture(pipe)
    for mistake in (
        lambda: pipe.set_cersa_adapters(["a", "nobody"]),
        lambda: pipe.delete_cersa_adapters(["a", "nobody"]),
        lambda: pipe.fuse_cersa(adapter_names=["nobody"]),
        lambda: pipe.save_cersa_weights("nowhere", adapter_name="nobody"),
    ):
        with raises(ValueError, "'nobody'", "['a', 'b']"):
            mistake()
    assert torch.equal(picture(pipe), before)


def test_parity_23_a_name_that_is_taken(adapter_file):
    pipe = two_adapters("sd1", adapter_file)
    with raises(ValueError, "'a'", "adapter_name", "hotswap"):
        pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")


def test_parity_24_an_unknown_component_is_ignored_with_a_warning(adapter_file):
    pipe, expected = pipeline("sd1"), pipeline("sd1")
    for each in (pipe, expected):
        each.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    with warns(UserWarning, "['transformer']", "'a'", "['unet', 'text_encoder']"):
        pipe.set_cersa_adapters("a", {"unet": 0.3, "transformer": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected.set_cersa_adapters("a", {"unet": 0.3})
    assert torch.equal(picture(pipe), picture(expected))


def test_parity_25_strengths_by_block(adapter_file):
    pipe = pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    whole, pictures = picture(pipe), []
    for blocks in (
        {"down": 0.2},
        {"mid": 0.2},
        {"up": 0.2},
        {"down": 0.2, "mid": 0.3, "up": 0.4},
        {"up": {"block_0": [0.1, 0.9]}, "down": {"block_1": 0.5}},
    ):
        pipe.set_cersa_adapters("a", {"unet": blocks})
        pictures.append(picture(pipe))
        assert differ(pictures[-1], whole)
    assert all(differ(first, second) for i, first in enumerate(pictures) for second in pictures[:i])
    pipe.set_cersa_adapters(["a"], [{"unet": {"up": {"block_0": [1, 1]}}, "text_encoder": 1.0}])
    assert torch.equal(picture(pipe), whole)


def test_parity_26_active_adapters_and_list(adapter_file):
    pipe = pipeline("sd1")
    assert pipe.get_list_cersa_adapters() == {} and pipe.get_active_cersa_adapters() == []
    pipe.load_cersa_weights(adapter_file("sd1", components=("unet",)), adapter_name="a")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="b")
    assert pipe.get_list_cersa_adapters() == {"unet": ["a", "b"], "text_encoder": ["b"]}
    assert pipe.get_active_cersa_adapters() == ["a", "b"]
    pipe.set_cersa_adapters("b")
    assert pipe.get_active_cersa_adapters() == ["b"]
    pipe.disable_cersa()
    assert pipe.get_active_cersa_adapters() == []


def test_the_methods_of_the_lora_loader_stay_what_they_are():
    for name in ("fuse_lora", "unfuse_lora", "set_adapters", "enable_lora", "disable_lora", "delete_adapters"):
        assert getattr(type(pipeline("sd1")), name).__module__.startswith("diffusers."), name
    assert LoraBaseMixin.get_list_adapters(pipeline("sd1")) == {}
