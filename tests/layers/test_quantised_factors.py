"""Quantised factors: the linear maps of CERSA layers under torchao and bitsandbytes. Both packages are optional."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import raises, randn, train


def torchao_int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def bitsandbytes_nf4(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for layer in cersa_layers(model).values():
        for name, linear in (("up", layer.up), ("down", layer.down)):
            options = {"compute_dtype": torch.float32, "quant_type": "nf4"}
            quantised = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **options)
            quantised.load_state_dict(linear.state_dict())
            setattr(layer, name, quantised.requires_grad_(False).to(linear.weight.device))


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


# The quantiser, and the largest relative error of an output.
QUANTISERS = [
    pytest.param(torchao_int8, 0.01, id="torchao int8", marks=needs("torchao")),
    pytest.param(bitsandbytes_nf4, 0.3, id="bitsandbytes nf4", marks=needs("bitsandbytes")),
]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.fixture
def injected(network) -> nn.Module:
    cersa.inject_cersa(network, CersaConfig(alpha=0.95), show_progress=False)
    return network


@pytest.mark.parametrize(("quantise", "limit"), QUANTISERS)
def test_quantised_factors_compute_nearly_the_same_and_cores_train(injected, quantise, limit):
    x, plain = randn(64, 48), copy.deepcopy(injected)
    quantise(injected)
    assert all(type(linear.weight) is not nn.Parameter for linear in (injected[0].up, injected[0].down))
    assert 0 < relative_error(injected(x), plain(x)) < limit
    cores, before = cersa.trainable_parameters(injected), injected(x)
    assert [core.shape for core in cores] == [core.shape for core in cersa.trainable_parameters(plain)]
    for model in (injected, plain):
        train(model)
    assert all(core.abs().max() > 0 for core in cores) and not torch.allclose(injected(x), before)
    assert relative_error(injected(x), plain(x)) < 3 * limit


@pytest.mark.parametrize(("quantise", "limit"), QUANTISERS)
def test_what_reads_the_factors_reads_the_quantised_numbers(injected, quantise, limit):
    quantise(injected)
    train(injected)
    x = randn(8, 48)
    expected = injected(x)
    for name, layer in cersa_layers(injected).items():
        inputs = randn(8, layer.in_features)
        weight = layer.effective_weight()
        assert type(weight) is torch.Tensor and weight.dtype == torch.float32, name
        torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, weight, layer.bias), rtol=1e-4, atol=1e-4)
    for form in ("dense", "factors"):
        cersa.fuse(injected, form=form)
        torch.testing.assert_close(injected(x), expected, rtol=1e-4, atol=1e-4)
        cersa.unfuse(injected)
        assert torch.equal(injected(x), expected)
    cersa.merge(injected)
    assert type(injected[0]) is nn.Linear
    torch.testing.assert_close(injected(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantise", "limit"), QUANTISERS)
def test_an_adapter_trained_on_quantised_factors_fits_the_base(network, quantise, limit, tmp_path):
    model = copy.deepcopy(network)
    cersa.inject_cersa(model, CersaConfig(alpha=0.95), show_progress=False)
    quantise(model)
    train(model)
    cersa.save_adapter(model, tmp_path / "adapter.safetensors", dtype=torch.float32)
    cersa.load_adapter(network, tmp_path / "adapter.safetensors", show_progress=False)
    for name, layer in cersa_layers(network).items():
        assert relative_error(layer.weight_change(), model.get_submodule(name).weight_change()) < 5 * limit, name


def test_factors_that_cannot_be_read_are_refused(injected):
    layer = injected[0]
    layer.up.weight = nn.Parameter(layer.up.weight.mul(100).to(torch.int8), requires_grad=False)
    for use in (layer.weight_change, layer.effective_weight, lambda: cersa.fuse(injected), lambda: cersa.merge(injected)):
        with raises(ConfigError, "int8", "torchao", "bitsandbytes"):
            use()
