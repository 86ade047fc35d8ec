"""The behaviours that users of the LoRA loader rely on, by their numbers in our list: 27 to 37, files, devices and hot swap."""

import shutil
from functools import partial

import pytest
import safetensors
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.adapters.file import from_state_dict
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import DEVICE, raises, randn
from ..pipelines_small import SIZE, cersa_modules, denoiser, differ, picture, pipeline

FILE_NAME = "pytorch_cersa_weights.safetensors"


def header(path) -> str:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()["cersa"]


@pytest.fixture
def facts() -> dict:
    return {
        "config": {"unet": CersaConfig(alpha=0.9).to_dict()},
        "base_model": {"name_or_path": "someone/base", "revision": "v1"},
        "training": {"steps": 100, "instance_prompt": "a photo of ☃ “sks”", "learning_rate": 1e-4, "nested": {"list": [1, None]}},
    }


def test_parity_27_metadata_round_trip_is_exact(adapter_file, facts, tmp_path):
    source, pipe = pipeline("sd1"), pipeline("sd1")
    cersa.inject_cersa(source.unet, CersaConfig(alpha=0.9), show_progress=False)
    cersa.save_adapter({"unet": source.unet}, tmp_path / "first.safetensors", **facts)
    pipe.load_cersa_weights(tmp_path / "first.safetensors", adapter_name="a")
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="b")
    pipe.save_cersa_weights(tmp_path, adapter_name="a", weight_name="second.safetensors")
    written = pipe.cersa_state_dict(tmp_path / "second.safetensors")["cersa"]
    found = from_state_dict(pipe.cersa_state_dict(tmp_path / "second.safetensors"))
    assert {"config": found.config, "base_model": found.base_model, "training": found.training} == facts
    assert written == pipe.cersa_state_dict(tmp_path / "first.safetensors")["cersa"]


def test_parity_29_wrong_metadata_is_refused(adapter_file):
    pipe = pipeline("sd1")
    state = pipe.cersa_state_dict(adapter_file("sd1"))
    other = pipe.cersa_state_dict(adapter_file("sd1", components=("text_encoder",)))
    before = picture(pipe)
    for wrong, named in (
        ("{", "JSON"),
        ("[]", "JSON"),
        ('{"format_version": 99}', "99"),
        (other["cersa"], "unet.down_blocks.0.resnets.0.time_emb_proj.block"),
        (state["cersa"].replace('"r": ', '"r": 1'), "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"),
        (None, "'cersa'"),
    ):
        with raises(AdapterFormatError, "state dict", named):
            pipe.load_cersa_weights(state | {"cersa": wrong})
    assert not cersa_modules(pipe) and torch.equal(picture(pipe), before)


def test_parity_30_file_folder_dict_and_hub_id(adapter_file, tmp_path, monkeypatch):
    path = adapter_file("sd1")
    shutil.copy(path, tmp_path / "other.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, filename, **_: str(path.parent / filename))
    state = pipeline("sd1").cersa_state_dict(path)
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    pictures = []
    for source in (path, str(path), path.parent, tmp_path, state, "someone/a-cat"):
        pipe = pipeline("sd1")
        pipe.load_cersa_weights(source)
        pictures.append(picture(pipe))
    assert all(torch.equal(one, pictures[0]) for one in pictures)
    assert state.keys() == before.keys() and state["cersa"] == before["cersa"]
    assert all(torch.equal(value, before[name]) for name, value in state.items() if name != "cersa")


def test_parity_30_a_dict_goes_from_one_pipeline_to_another(adapter_file):
    first, second = pipeline("sdxl"), pipeline("sdxl")
    first.load_cersa_weights(adapter_file("sdxl"))
    second.load_cersa_weights(second.cersa_state_dict(adapter_file("sdxl").parent, weight_name=FILE_NAME))
    assert torch.equal(picture(second), picture(first))


def test_parity_31_no_matching_key(adapter_file):
    pipe = pipeline("sd1")
    before = picture(pipe)
    with raises(BaseMismatchError, "'transformer'", "['text_encoder', 'unet']"):
        pipe.load_cersa_weights(adapter_file("flux"))
    assert torch.equal(picture(pipe), before)


def test_parity_32_missing_and_unexpected_keys_in_one_message(adapter_file):
    pipe = pipeline("sd1")
    state = pipe.cersa_state_dict(adapter_file("sd1"))
    name = next(key for key in state if key.endswith(".rows"))
    state["unet.nothing.rows"] = state.pop(name)
    with raises(AdapterFormatError, name, "unet.nothing.rows"):
        pipe.load_cersa_weights(state)
    assert not cersa_modules(pipe)


def test_parity_33_file_names_are_guessed_offline(adapter_file, tmp_path):
    """The real huggingface_hub, offline: from its cache under the default name; else an error that says what was asked for."""
    snapshot = tmp_path / "models--someone--a-cat" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--a-cat" / "refs").mkdir()
    (tmp_path / "models--someone--a-cat" / "refs" / "main").write_text("0123")
    shutil.copy(adapter_file("sd1"), snapshot / FILE_NAME)
    pipe = pipeline("sd1")
    pipe.load_cersa_weights("someone/a-cat", cache_dir=tmp_path, local_files_only=True)
    assert cersa_modules(pipe)
    with raises(AdapterFormatError, "someone/a-cat", "other.safetensors", "weight_name"):
        pipe.load_cersa_weights("someone/a-cat", "other.safetensors", cache_dir=tmp_path, local_files_only=True)


def check_offloaded_loading(adapter_file, enable, is_offloaded):
    """Load, fuse, unfuse and unload under offloading: hooks are there before and after, pictures as without offloading."""
    plain, pipe = (pipeline("sd1") for _ in range(2))
    enable(pipe)
    before = picture(pipe)
    for each in (plain, pipe):
        each.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    assert is_offloaded(pipe)
    torch.testing.assert_close(picture(pipe), picture(plain), rtol=0, atol=1e-5 if DEVICE.type == "cpu" else 1e-3)
    factors = partial(pipe.fuse_cersa, form="factors")
    for change in (pipe.fuse_cersa, pipe.unfuse_cersa, factors, pipe.unfuse_cersa, pipe.unload_cersa_weights):
        change()
        assert is_offloaded(pipe)
        picture(pipe)
    torch.testing.assert_close(picture(pipe), before, rtol=0, atol=0 if DEVICE.type == "cpu" else 1e-4)


def model_offloaded(pipe) -> bool:
    return type(getattr(pipe.unet, "_hf_hook", None)).__name__ == "CpuOffload" and len(pipe._all_hooks) == 3


def test_parity_34_model_offload_then_load(adapter_file):
    check_offloaded_loading(adapter_file, lambda pipe: pipe.enable_model_cpu_offload(device=DEVICE), model_offloaded)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="accelerate offloads to the CPU: needs CERSA_TEST_DEVICE=cuda")
def test_parity_34_sequential_offload_then_load(adapter_file):
    def offloaded(pipe):
        return pipe.unet.conv_in.weight.is_meta

    check_offloaded_loading(adapter_file, lambda pipe: pipe.enable_sequential_cpu_offload(device=DEVICE), offloaded)


def test_parity_34_sequential_offload_comes_back_after_loading(adapter_file):
    """Without a run: accelerate's sequential offload itself does not run with the CPU as its device."""
    plain, pipe = pipeline("sd1"), pipeline("sd1")
    pipe.enable_sequential_cpu_offload(device="cpu")
    for each in (plain, pipe):
        each.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    assert pipe.unet.conv_in.weight.is_meta
    pipe.remove_all_hooks()
    assert torch.equal(picture(pipe.to(DEVICE)), picture(plain))


def test_parity_34_offloading_hooks_bring_the_cores_to_the_device(adapter_file):
    """What sequential offload puts on every module with tensors of its own: here on CERSA layers, their maps and their cores."""
    plain, pipe = pipeline("sd1"), pipeline("sd1")
    for each in (plain, pipe):
        for seed, name in enumerate("ab"):
            each.load_cersa_weights(adapter_file("sd1", seed=seed), adapter_name=name)
    for layer in cersa_modules(pipe):
        for module in (layer, layer.up, layer.down, *layer.cores.values()):
            add_hook_to_module(module, AlignDevicesHook(execution_device=DEVICE, offload=True))
    assert all(layer.U.is_meta and layer.Vh.is_meta for layer in cersa_modules(pipe))
    assert all(core.D.is_meta for layer in cersa_modules(pipe) for core in layer.cores.values())
    assert torch.equal(picture(pipe), picture(plain))
    for each in (plain, pipe):
        each.set_cersa_adapters("b", 0.5)
    assert torch.equal(picture(pipe), picture(plain))


def test_parity_34_no_hooks_appear_where_there_were_none(adapter_file):
    pipe = pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1"))
    assert not any(hasattr(module, "_hf_hook") for module in pipe.unet.modules())


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_parity_35_group_offload_then_load(adapter_file, offload_type):
    settings = {"onload_device": DEVICE, "offload_device": torch.device("cpu"), "offload_type": offload_type}

    def enable(pipe):
        apply_group_offloading(pipe.unet, num_blocks_per_group=1, **settings)
        pipe.text_encoder.to(DEVICE)
        pipe.vae.to(DEVICE)

    def offloaded(pipe):
        hooks = [module._diffusers_hook.hooks for module in pipe.unet.modules() if hasattr(module, "_diffusers_hook")]
        return any("group_offloading" in names for names in hooks)

    check_offloaded_loading(adapter_file, enable, offloaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_36_moving_the_dtype_keeps_cores_and_works(adapter_file, dtype):
    pipe = pipeline("sdxl")
    pipe.load_cersa_weights(adapter_file("sdxl"), adapter_name="a")
    # Given: some versions of torch draw other noise in 16 bit.
    side = SIZE // pipe.vae_scale_factor
    noise = randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    adapted = picture(pipe, latents=noise)
    pipe.to(dtype)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == dtype
    assert all(layer.cores["a"].D.dtype == layer.s.dtype == torch.float32 for layer in cersa_modules(pipe))
    torch.testing.assert_close(picture(pipe, latents=noise.to(dtype)).float(), adapted, rtol=0, atol=0.1)
    pipe.unload_cersa_weights()
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {dtype}


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_parity_37_hotswap_equals_loading_the_other_adapter(adapter_file, family):
    pipe, other = pipeline(family), pipeline(family)
    pipe.load_cersa_weights(adapter_file(family, seed=1), adapter_name="a")
    other.load_cersa_weights(adapter_file(family, seed=2), adapter_name="a", strength=0.6)
    modules = cersa_modules(pipe)
    cores = [layer.cores["a"].D for layer in modules]
    pipe.load_cersa_weights(adapter_file(family, seed=2), adapter_name="a", hotswap=True, strength=0.6)
    assert torch.equal(picture(pipe), picture(other))
    for layer, core, now in zip(modules, cores, cersa_modules(pipe), strict=True):
        assert now is layer and now.cores["a"].D is core and list(now.cores) == ["a"]


def test_parity_37_hotswap_compiles_nothing_again(adapter_file):
    pipe, other = pipeline("flux"), pipeline("flux")
    pipe.load_cersa_weights(adapter_file("flux", seed=1), adapter_name="a")
    other.load_cersa_weights(adapter_file("flux", seed=2))
    counter = CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    first = picture(pipe)
    compiled = counter.frame_count
    pipe.load_cersa_weights(adapter_file("flux", seed=2), adapter_name="a", hotswap=True)
    assert differ(picture(pipe), first)
    torch.testing.assert_close(picture(pipe), picture(other), rtol=0, atol=1e-5)
    assert counter.frame_count == compiled > 0


def test_parity_37_hotswap_pads_smaller_cores_and_refuses_others(adapter_file, tmp_path):
    """Half of the layers and half of the trained rank: what the file does not say is zero."""
    source, pipe = pipeline("sd1"), pipeline("sd1")
    config = CersaConfig(alpha=0.9, beta=0.6, rank_multiple=1, target_modules=["to_q", "to_k"])
    cersa.inject_cersa(source.unet, config, show_progress=False)
    for core in cersa.trainable_parameters(source.unet):
        core.data.normal_(std=0.1)
    cersa.save_adapter({"unet": source.unet}, tmp_path / "small.safetensors", dtype=torch.float32)
    pipe.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    pipe.load_cersa_weights(tmp_path / "small.safetensors", adapter_name="a", hotswap=True)
    changes = {name: layer.weight_change() for name, layer in cersa_layers(pipe.unet).items()}
    for name, layer in cersa_layers(source.unet).items():
        torch.testing.assert_close(changes.pop(name), layer.weight_change(), rtol=1e-4, atol=1e-6)
    assert all(not change.any() for change in changes.values())
    only_text = pipeline("sd1")
    only_text.load_cersa_weights(adapter_file("sd1", components=("text_encoder",)), adapter_name="a")
    before = picture(only_text)
    with raises(ConfigError, "unet.time_embedding.linear_1", "hotswap=True"):
        only_text.load_cersa_weights(adapter_file("sd1"), adapter_name="a", hotswap=True)
    with raises(ConfigError, "hotswap", "adapter_name", "'b'", "['a']"):
        only_text.load_cersa_weights(adapter_file("sd1"), adapter_name="b", hotswap=True)
    assert torch.equal(picture(only_text), before)
    assert not any(isinstance(module, CersaLinear) for module in denoiser(only_text).modules())
