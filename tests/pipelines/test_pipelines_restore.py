"""What must come back: the base and the adapters after a failure halfway, over two pipelines that share a model, and memory."""

import gc

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import cersa_diffusion
from cersa_diffusion import AdapterFormatError, CersaLinear, ConfigError

from ..conftest import DEVICE, raises
from ..pipelines_small import adapted_components, cersa_modules, differ, picture, pipeline

ONLY_A = {"unet": ["a"], "text_encoder": ["a"]}


class Interrupted(BaseException):
    """As KeyboardInterrupt: no Exception."""


def fail_at(monkeypatch, owner, name, call):
    """Lets the real operation run until it is called for the `call`-th time."""
    real, calls = getattr(owner, name), []

    def operation(*arguments, **settings):
        calls.append(name)
        if len(calls) == call:
            raise Interrupted
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, operation)


def modules_and_states(pipe):
    """Identity of every module, and the bytes of every tensor."""
    models = adapted_components(pipe)
    modules = {f"{key}.{name}": module for key, model in models.items() for name, module in model.named_modules()}
    states = {f"{key}.{name}": value.clone() for key, model in models.items() for name, value in model.state_dict().items()}
    return modules, states


def assert_unchanged(pipe, before):
    modules, states = modules_and_states(pipe)
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | CersaLinear)}
    assert modules.keys() == before[0].keys() and states.keys() == before[1].keys()
    assert all(modules[name] is before[0][name] for name in linear)
    assert all(torch.equal(value, before[1][name]) for name, value in states.items())


@pytest.fixture
def loaded(adapter_file):
    pipe = pipeline("sd1")
    pipe.load_cersa_weights(adapter_file("sd1", seed=1), adapter_name="a", strength=0.5)
    return pipe


@pytest.mark.parametrize("call", [1, 20, 50])
def test_loading_that_fails_halfway_leaves_the_base(adapter_file, monkeypatch, call):
    pipe = pipeline("sd1")
    before, image = modules_and_states(pipe), picture(pipe)
    fail_at(monkeypatch, cersa_diffusion.adapters.load, "replace_module", call)
    with pytest.raises(Interrupted):
        pipe.load_cersa_weights(adapter_file("sd1"))
    monkeypatch.undo()
    assert_unchanged(pipe, before)
    assert torch.equal(picture(pipe), image) and not cersa_modules(pipe)


@pytest.mark.parametrize("hotswap", [False, True])
def test_a_second_adapter_that_fails_halfway_leaves_the_first(loaded, adapter_file, monkeypatch, hotswap):
    before, image = modules_and_states(loaded), picture(loaded)
    fail_at(monkeypatch, CersaLinear, "add_core", 30)
    name = "a" if hotswap else "b"
    with pytest.raises(Interrupted):
        loaded.load_cersa_weights(adapter_file("sd1", seed=2), adapter_name=name, hotswap=hotswap)
    monkeypatch.undo()
    assert_unchanged(loaded, before)
    assert torch.equal(picture(loaded), image) and loaded.get_list_cersa_adapters() == ONLY_A


@pytest.mark.parametrize(
    ("operation", "owner", "name"),
    [
        ("fuse_cersa", CersaLinear, "effective_weight"),
        ("unload_cersa_weights", cersa_diffusion.inject, "original_layer"),
        ("delete_cersa_adapters", cersa_diffusion.inject, "original_layer"),
        ("save_pretrained", CersaLinear, "effective_weight"),
    ],
)
def test_changes_that_fail_halfway_leave_the_adapter(loaded, monkeypatch, tmp_path, operation, owner, name):
    before, image = modules_and_states(loaded), picture(loaded)
    fail_at(monkeypatch, owner, name, len(cersa_modules(loaded)) - 2)
    arguments = {"delete_cersa_adapters": ["a"], "save_pretrained": [tmp_path]}.get(operation, [])
    with pytest.raises(Interrupted):
        getattr(loaded, operation)(*arguments)
    monkeypatch.undo()
    assert_unchanged(loaded, before)
    assert torch.equal(picture(loaded), image) and loaded.get_active_cersa_adapters() == ["a"]


def test_unfusing_that_fails_halfway_stays_fused_and_can_be_done_again(loaded, monkeypatch):
    image = picture(loaded)
    loaded.fuse_cersa()
    fused = picture(loaded)
    fail_at(monkeypatch, cersa_diffusion.adapters.fuse, "replace_module", 40)
    with pytest.raises(Interrupted):
        loaded.unfuse_cersa()
    monkeypatch.undo()
    assert torch.equal(picture(loaded), fused) and not cersa_modules(loaded)
    loaded.unfuse_cersa()
    assert torch.equal(picture(loaded), image)


def test_a_wrong_strength_for_one_component_changes_none(loaded, adapter_file):
    image = picture(loaded)
    for weights in ({"unet": 0.1, "text_encoder": {"down": 1}}, {"unet": {"down": 0.1, "up": "much"}}, [0.1, 0.2]):
        with pytest.raises(ConfigError):
            loaded.set_cersa_adapters("a", weights)
        assert torch.equal(picture(loaded), image)


@pytest.mark.parametrize("kept", [0.2, 0.7, 0.99])
def test_a_truncated_file_leaves_the_pipeline(loaded, adapter_file, tmp_path, kept):
    content = adapter_file("sd1", seed=2).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(kept * len(content))])
    before, image = modules_and_states(loaded), picture(loaded)
    for settings in ({"adapter_name": "b"}, {"adapter_name": "a", "hotswap": True}):
        with raises(AdapterFormatError, "cut.safetensors"):
            loaded.load_cersa_weights(tmp_path, **settings)
    assert_unchanged(loaded, before)
    assert torch.equal(picture(loaded), image)


def test_unload_without_a_kept_base_leaves_the_pipeline(adapter_file):
    pipe = pipeline("sd1")
    cersa_diffusion.inject_cersa(pipe.unet, cersa_diffusion.CersaConfig(), show_progress=False)
    pipe.load_cersa_weights(adapter_file("sd1", components=("text_encoder",)))
    before = modules_and_states(pipe)
    with raises(ConfigError, "time_embedding.linear_1", "keep_base=True"):
        pipe.unload_cersa_weights()
    assert_unchanged(pipe, before)


def test_a_base_that_changed_on_disk_is_not_put_back(adapter_file, tmp_path):
    """The weights of a pipeline from disk are read there again; saved over by adapted ones they are gone, and that is said."""
    first = pipeline("sd1")
    first.save_pretrained(tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base").to(DEVICE)
    base = picture(pipe)
    pipe.load_cersa_weights(adapter_file("sd1"))
    pipe.unload_cersa_weights()
    assert torch.equal(picture(pipe), base)
    pipe.load_cersa_weights(adapter_file("sd1"))
    adapted = picture(pipe)
    first.load_cersa_weights(adapter_file("sd1"))
    first.save_pretrained(tmp_path / "base")
    with raises(ConfigError, "time_embedding.linear_1", "keep_base=True"):
        pipe.unload_cersa_weights()
    assert torch.equal(picture(pipe), adapted) and cersa_modules(pipe)


def image_to_image(pipe) -> torch.Tensor:
    start = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    result = pipe("a cat", start, strength=0.9, num_inference_steps=3, generator=generator, output_type="pt")
    return result.images[0]


def test_pipelines_that_share_models_share_the_adapters(adapter_file):
    """An adapter belongs to the models: either pipeline shows, sets and unloads it, and the base of both comes back."""
    first = pipeline("sd1")
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    bases = picture(first), image_to_image(second)
    first.load_cersa_weights(adapter_file("sd1"), adapter_name="a")
    assert second.get_list_cersa_adapters() == first.get_list_cersa_adapters() == ONLY_A
    assert differ(image_to_image(second), bases[1])
    with raises(ConfigError, "'a'", "adapter_name", "hotswap"):
        second.load_cersa_weights(adapter_file("sd1", seed=1), adapter_name="a")
    second.load_cersa_weights(adapter_file("sd1", seed=1))
    second.set_cersa_adapters("default_0")
    assert first.get_active_cersa_adapters() == ["default_0"]
    second.fuse_cersa()
    with raises(ConfigError, "fused", "unfuse_cersa()"):
        first.set_cersa_adapters("a")
    third = StableDiffusionImg2ImgPipeline.from_pipe(first)
    third.unload_cersa_weights()
    assert torch.equal(picture(first), bases[0]) and torch.equal(image_to_image(second), bases[1])
    first.unload_cersa_weights()
    assert torch.equal(picture(first), bases[0])


def living_tensors() -> tuple[int, int]:
    """How many tensors are alive, and the bytes of their storages."""
    gc.collect()
    # By exact type: torch.compile in another test leaves fake tensors behind, which have no storage.
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values())


def test_loading_and_unloading_50_times_does_not_grow(adapter_file):
    pipe, path = pipeline("sd1"), adapter_file("sd1", components=("text_encoder",))
    pipe.set_progress_bar_config(disable=True)

    def round_trip():
        pipe.load_cersa_weights(path, adapter_name="a")
        pipe.load_cersa_weights(path, adapter_name="a", hotswap=True)
        pipe.fuse_cersa()
        pipe.unfuse_cersa()
        pipe.unload_cersa_weights()

    round_trip()
    before, names = living_tensors(), set(vars(pipe.text_encoder))
    for _ in range(50):
        round_trip()
    assert living_tensors() == before and set(vars(pipe.text_encoder)) == names
