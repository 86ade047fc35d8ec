"""Several adapters on one model: weights, strengths by block, fusing."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import raises, randn, train
from ..pipelines_small import unet


@pytest.fixture
def two(trained):
    """A model with two trained adapters, "default" and "second"."""
    model = trained[1]
    cersa.add_adapter(model, "second")
    cersa.set_adapters(model, "second")
    train(model, steps=10, learning_rate=3e-3)
    return model


def change(model):
    return model[2].weight_change()


def test_adding_trains_only_the_new_adapter(trained):
    model = trained[1]
    cersa.add_adapter(model, "second")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"{i}.cores.second.D" for i in (0, 2, 4)}
    before = model[0].cores["default"].D.clone()
    train(model)
    assert torch.equal(model[0].cores["default"].D, before) and model[0].cores["second"].D.abs().max() > 0


def test_switching_and_mixing_is_linear_in_the_cores(two):
    cersa.set_adapters(two, "default")
    first = change(two)
    cersa.set_adapters(two, ["second"])
    second = change(two)
    assert cersa.active_adapters(two) == {"second": 1.0} and cersa.adapter_names(two) == ["default", "second"]
    cersa.set_adapters(two, ["default", "second"], [0.5, -2.0])
    torch.testing.assert_close(change(two), 0.5 * first - 2 * second)
    cersa.set_adapters(two, ["default", "second"], 0.25)
    torch.testing.assert_close(change(two), 0.25 * (first + second))


def test_disable_and_enable_keep_the_strengths(two):
    x = randn(4, 48)
    cersa.set_adapters(two, ["default", "second"], [0.5, 0.25])
    expected = two(x)
    cersa.disable_adapters(two)
    assert torch.equal(change(two), torch.zeros_like(change(two))) and cersa.active_adapters(two) == {}
    disabled = two(x)
    cersa.enable_adapters(two)
    assert torch.equal(two(x), expected) and not torch.allclose(disabled, expected)
    cersa.set_adapters(two, [])
    assert torch.equal(two(x), disabled)


def test_delete(two):
    cersa.set_adapters(two, "default")
    expected = change(two)
    cersa.delete_adapters(two, "second")
    assert cersa.adapter_names(two) == ["default"] and torch.equal(change(two), expected)
    cersa.add_adapter(two, "second")
    cersa.delete_adapters(two, ["default", "second"])
    assert cersa.adapter_names(two) == [] and two(randn(2, 48)).shape == (2, 24)


def test_mistakes_name_what_is_there_and_change_nothing(two):
    before = copy.deepcopy(two.state_dict())
    active = cersa.active_adapters(two)
    for mistake in (
        lambda: cersa.set_adapters(two, ["default", "third"]),
        lambda: cersa.delete_adapters(two, ["default", "third"]),
        lambda: cersa.add_adapter(two, "fourth", like="third"),
    ):
        with raises(ConfigError, "third", "default", "second"):
            mistake()
    with raises(ConfigError, "second"):
        cersa.add_adapter(two, "second")
    with raises(ConfigError, "2", "1"):
        cersa.set_adapters(two, ["default", "second"], [1.0])
    assert cersa.active_adapters(two) == active and two.state_dict().keys() == before.keys()


def test_each_adapter_saves_its_own_file(two, trained, tmp_path):
    base = trained[0]
    for name in ("default", "second"):
        cersa.save_adapter(two, tmp_path / f"{name}.safetensors", adapter_name=name, dtype=torch.float32)
        cersa.load_adapter(base, tmp_path / f"{name}.safetensors", adapter_name=name, show_progress=False)
    cersa.set_adapters(two, ["default", "second"], [0.7, 0.3])
    cersa.set_adapters(base, ["default", "second"], [0.7, 0.3])
    torch.testing.assert_close(change(base), change(two), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def unets():
    """Two equal UNets: one with CERSA, one with LoRA on the same attention layers."""
    torch.manual_seed(0)
    first = unet(16)
    second = copy.deepcopy(first)
    cersa.inject_cersa(first, CersaConfig(target_modules=["to_q", "to_v"]), "a", show_progress=False)
    second.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), "a")
    return first, second


def numbers(count: int):
    number = st.floats(-2, 2, allow_nan=False).map(lambda value: round(value, 3))
    return st.one_of(number, st.lists(number, min_size=count, max_size=count), st.lists(number, min_size=1, max_size=1))


SPECIFICATIONS = st.fixed_dictionaries(
    {},
    optional={
        "down": st.one_of(numbers(1), st.fixed_dictionaries({}, optional={"block_1": numbers(1)})),
        "mid": numbers(1),
        "up": st.one_of(numbers(2), st.fixed_dictionaries({}, optional={"block_0": numbers(2)})),
    },
)


@given(specification=SPECIFICATIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_strengths_by_block_are_those_of_the_lora_loader(unets, specification):
    first, second = unets
    cersa.set_adapters(first, "a", specification)
    second.set_adapters(["a"], [copy.deepcopy(specification)])
    for name, layer in cersa_layers(first).items():
        assert layer.strengths["a"] == pytest.approx(second.get_submodule(name).scaling["a"]), name


def test_strengths_of_layers_beside_the_attentions():
    model = unet(16)
    cersa.inject_cersa(model, CersaConfig(rank=4), "a", show_progress=False)
    cersa.set_adapters(model, "a", {"down": {"block_0": 0.1, "block_1": 0.2}, "mid": [0.3], "up": {"block_0": [0.4, 0.5]}})
    found = {name: layer.strengths["a"] for name, layer in cersa_layers(model).items()}
    expected = {
        "time_embedding.linear_1": 1.0,
        "down_blocks.0.resnets.0.time_emb_proj": 0.1,
        "down_blocks.1.resnets.0.time_emb_proj": 0.2,
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": 0.2,
        "mid_block.resnets.0.time_emb_proj": 0.3,
        "mid_block.resnets.1.time_emb_proj": 0.3,
        "up_blocks.0.resnets.0.time_emb_proj": 0.4,
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": 0.5,
        "up_blocks.1.resnets.1.time_emb_proj": 1.0,
    }
    assert {name: found[name] for name in expected} == expected
    assert cersa.active_adapters(model) == {"a": 1.0}


@pytest.mark.parametrize(
    ("specification", "names"),
    [
        ({"left": 1}, "left down mid up"),
        ({"down": {"block_7": 1}}, "block_7 down block_0 block_1"),
        ({"up": [1, 2, 3]}, "3 up.block_0 2"),
        ({"mid": [1, 2]}, "2 mid"),
        ({"mid": {"block_0": 1}}, "mid"),
        ({"down": "much"}, "much"),
        ({"down": True}, "True"),
    ],
)
def test_mistakes_in_strengths_by_block_change_nothing(unets, specification, names):
    model = unets[0]
    cersa.set_adapters(model, "a", 0.7)
    with raises(ConfigError, *names.split()):
        cersa.set_adapters(model, "a", specification)
    assert {layer.strengths["a"] for layer in cersa_layers(model).values()} == {0.7}


def test_strengths_by_block_need_blocks(two):
    with raises(ConfigError, "down", "mid", "up"):
        cersa.set_adapters(two, "default", {"down": 1})


def test_fuse_and_unfuse(two):
    x = randn(4, 48)
    cersa.set_adapters(two, ["default", "second"], [0.5, -2.0])
    expected, layers, cores = two(x), cersa_layers(two), cersa.trainable_parameters(two)
    weights = [layer.effective_weight() for layer in layers.values()]
    cersa.fuse(two)
    assert all(isinstance(two[i], nn.Linear) and torch.equal(two[i].weight, w) for i, w in zip((0, 2, 4), weights, strict=True))
    assert cersa.trainable_parameters(two) != cores and not any("cores" in name for name in two.state_dict())
    torch.testing.assert_close(two(x), expected, rtol=1e-4, atol=1e-5)
    cersa.unfuse(two)
    assert torch.equal(two(x), expected)
    assert all(now is before for now, before in zip(cersa.trainable_parameters(two), cores, strict=True))
    cersa.fuse(two, "second", scale=0.5)
    fused = [two[i].weight.clone() for i in (0, 2, 4)]
    cersa.unfuse(two)
    cersa.set_adapters(two, "second", -1.0)
    torch.testing.assert_close(fused, [two[i].effective_weight() for i in (0, 2, 4)])


@pytest.mark.parametrize("residual", ["drop", "keep"])
def test_fuse_into_two_factors(network, residual):
    cersa.inject_cersa(network, CersaConfig(rank=12, residual=residual), show_progress=False)
    train(network)
    cersa.add_adapter(network, "second")
    cersa.set_adapters(network, "second")
    train(network, steps=10)
    cersa.set_adapters(network, ["default", "second"], [0.5, -2.0])
    x = randn(4, 48)
    layers, expected = cersa_layers(network), network(x)
    factors = {name: (layer.U.clone(), layer.Vh.clone()) for name, layer in layers.items()}
    weights = [layer.effective_weight() for layer in layers.values()]
    cersa.fuse(network, form="factors")
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    for name, weight in zip(layers, weights, strict=True):
        fused, (U, Vh) = network.get_submodule(name), factors[name]
        torch.testing.assert_close(fused.effective_weight(), weight, rtol=1e-4, atol=1e-5)
        # The smaller factor is a new one, and the larger one is that of the CERSA layer.
        wide = fused.out_features <= fused.in_features
        assert torch.equal(fused.U, U) != wide and torch.equal(fused.Vh, Vh) == wide
        shared = fused.down if wide else fused.up
        assert shared.weight.data_ptr() == (layers[name].Vh if wide else layers[name].U).data_ptr()
    assert not cersa.trainable_parameters(network)
    cersa.unfuse(network)
    assert cersa_layers(network) == layers and torch.equal(network(x), expected)
    cersa.fuse(network, "second", scale=0.5, form="factors")
    fused = [network[i].effective_weight() for i in (0, 2, 4)]
    cersa.unfuse(network)
    cersa.set_adapters(network, "second", -1.0)
    torch.testing.assert_close(fused, [network[i].effective_weight() for i in (0, 2, 4)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_a_cast_of_a_fused_model_does_not_reach_the_factors(two, form):
    before = {name: tensor.clone() for name, tensor in two.state_dict().items()}
    cersa.fuse(two, form=form)
    two.bfloat16()(randn(4, 48, dtype=torch.bfloat16))
    cersa.unfuse(two.float())
    # The biases are no part of what is fused.
    assert all(torch.equal(tensor, before[name]) for name, tensor in two.state_dict().items() if not name.endswith("bias"))


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_the_adapters_of_a_fused_model_cannot_be_changed(two, form, tmp_path):
    cersa.save_adapter(two, tmp_path / "adapter.safetensors", adapter_name="second")
    cersa.fuse(two, form=form)
    x = randn(4, 48)
    expected = two(x)
    for change in (
        lambda: cersa.set_adapters(two, "default"),
        lambda: cersa.disable_adapters(two),
        lambda: cersa.delete_adapters(two, "default"),
        lambda: cersa.add_adapter(two, "third"),
        lambda: cersa.fuse(two, form=form),
        lambda: cersa.load_adapter(two, tmp_path / "adapter.safetensors", adapter_name="third", show_progress=False),
    ):
        with raises(ConfigError, "fused"):
            change()
    assert torch.equal(two(x), expected)


def test_an_unknown_form_is_refused(two):
    with raises(ConfigError, "form", "sparse", "dense", "factors"):
        cersa.fuse(two, form="sparse")
    assert all(isinstance(two[i], CersaLinear) for i in (0, 2, 4))


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_ways_out_of_a_fused_model(network, form):
    cersa.inject_cersa(network, CersaConfig(alpha=0.9), keep_base=True, show_progress=False)
    train(network, steps=3)
    base, merged = copy.deepcopy(network), copy.deepcopy(network)
    cersa.restore_base(base)
    for model in (network, merged):
        cersa.fuse(model, form=form)
    x = randn(4, 48)
    fused = merged(x)
    cersa.merge(merged)
    torch.testing.assert_close(merged(x), fused, rtol=0 if form == "dense" else 1e-4, atol=0 if form == "dense" else 1e-5)
    assert type(merged[0]) is nn.Linear
    cersa.restore_base(network)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in network.state_dict().items())


def test_fusing_needs_active_adapters(two):
    with raises(ConfigError, "CERSA"):
        cersa.fuse(nn.Sequential(nn.Linear(2, 2)))
    cersa.set_adapters(two, "default")
    with raises(ConfigError, "second", "default"):
        cersa.fuse(two, ["default", "second"])
    cersa.disable_adapters(two)
    with raises(ConfigError, "adapter"):
        cersa.fuse(two)
    assert all(isinstance(two[i], CersaLinear) for i in (0, 2, 4))
