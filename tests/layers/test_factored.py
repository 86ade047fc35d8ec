"""The linear maps inside of a CERSA layer: quantisers and offloading see them, whatever selects layers does not."""

import accelerate
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.layers.model import cersa_layers, match_targets, named_layers
from cersa_diffusion.memory.tokens import count_tokens

from ..conftest import DEVICE, raises, randn
from ..pipelines_small import unet


@pytest.fixture
def partly(network) -> nn.Sequential:
    """A network whose layers 0 and 2 are CERSA layers and whose layer 4 is dense."""
    cersa.inject_cersa(network, CersaConfig(alpha=0.9, target_modules=["0", "2"]), show_progress=False)
    return network


@pytest.mark.parametrize("residual", ["drop", "keep"])
def test_the_factors_are_weights_of_plain_linear_layers(network, residual):
    bias = network[0].bias
    cersa.inject_cersa(network, CersaConfig(rank=6, residual=residual), show_progress=False)
    for layer in cersa_layers(network).values():
        maps = [layer.up, layer.down, *([layer.residual] if residual == "keep" else [])]
        assert {type(linear) for linear in maps} == {nn.Linear}
        assert not any(linear.weight.requires_grad for linear in maps)
        assert layer.U is layer.up.weight and layer.Vh is layer.down.weight
        assert layer.up.weight.shape == (layer.out_features, 6) and layer.down.weight.shape == (6, layer.in_features)
    assert network[0].bias is bias and network[2].bias is None


@pytest.mark.parametrize("targets", ["all-linear", r".*", r"\d(\..*)?", ["4", "up", "down"]])
def test_targets_are_whole_layers(partly, targets):
    assert list(match_targets(partly, targets)) == ["4"]
    assert list(named_layers(partly)) == ["", "0", "1", "2", "3", "4"]
    assert list(named_layers(partly[0])) == [""]


@pytest.mark.parametrize("targets", [["up"], ["down"], r"\d\.(up|down)"])
def test_targets_inside_of_a_layer_match_nothing(partly, targets):
    with raises(ConfigError, "4"):
        match_targets(partly, targets)


def test_a_second_injection_replaces_the_rest(partly):
    maps = [(layer.up, layer.down) for layer in cersa_layers(partly).values()]
    cersa.inject_cersa(partly, CersaConfig(alpha=0.9), show_progress=False)
    assert list(cersa_layers(partly)) == ["0", "2", "4"]
    assert maps == [(layer.up, layer.down) for layer in list(cersa_layers(partly).values())[:2]]


def test_tokens_are_counted_for_whole_layers(partly):
    assert list(count_tokens(partly, lambda: partly(randn(3, 48)))) == ["model.4"]


def test_no_lora_goes_into_a_layer(partly):
    with raises(ConfigError, "up", "exclude_modules", "residual"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), partly)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", exclude_modules=["up", "down", "residual"]), partly)
    assert hasattr(partly[4], "base_layer")
    assert all(type(linear) is nn.Linear for layer in cersa_layers(partly).values() for linear in (layer.up, layer.down))


def test_a_file_cannot_name_the_inside_of_a_layer(network, tmp_path):
    """A layer of a file is looked for among whole layers only."""
    inner = nn.Sequential(nn.ModuleDict({"up": nn.Linear(*reversed(network[0].weight.shape))})).to(DEVICE)
    cersa.inject_cersa(inner, CersaConfig(alpha=1.0), show_progress=False)
    cersa.save_adapter(inner, tmp_path / "inner.safetensors")
    cersa.inject_cersa(network, CersaConfig(alpha=1.0), show_progress=False)
    with raises(cersa.BaseMismatchError, "model.0.up"):
        cersa.load_adapter(network, tmp_path / "inner.safetensors", adapter_name="b", show_progress=False)


def test_offloading_takes_the_factors_of_a_whole_model_away_and_changes_nothing():
    torch.manual_seed(0)
    model = unet(16).to(DEVICE)
    cersa.inject_cersa(model, CersaConfig(alpha=0.9), show_progress=False)
    for core in cersa.trainable_parameters(model):
        core.data.normal_(std=0.01)
    layers = [module for module in model.modules() if isinstance(module, CersaLinear)]
    size = model.config.sample_size
    inputs = randn(1, model.config.in_channels, size, size), 500, randn(1, 7, model.config.cross_attention_dim)
    with torch.no_grad():
        expected = model(*inputs).sample
        accelerate.cpu_offload(model, DEVICE)
        for _ in range(2):
            assert all(tensor.is_meta for layer in layers for tensor in layer.parameters())
            assert torch.equal(model(*inputs).sample, expected)
