"""Injection layer by layer: dense weights are dropped at once, and a failure half-way puts all of them back."""

import copy
import os
import shutil
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaError, CersaLinear, ConfigError
from cersa_diffusion.config import svft_config
from cersa_diffusion.pipelines.offload import run_from_cpu

from .conftest import DEVICE, frozen_parameters, raises


@pytest.fixture
def unet(base_path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base_path, subfolder="unet").to(DEVICE)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


@pytest.mark.parametrize("change", ["inject", "load", "load with bases"])
def test_a_dense_weight_is_dropped_when_its_layer_is_in_place(unet, tmp_path, change):
    if change != "inject":
        injected = copy.deepcopy(unet)
        cersa.inject_cersa(injected, CersaConfig(alpha=0.9), show_progress=False)
        cersa.save_adapter(injected, tmp_path / "adapter.safetensors", save_bases=change == "load with bases")
    layers = _linears(unet)
    replaced_when_freed = []

    def count_replaced() -> None:
        replaced_when_freed.append(sum(isinstance(module, CersaLinear) for module in unet.modules()))

    for layer in layers.values():
        weakref.finalize(layer.weight, count_replaced)
    count = len(layers)
    del layers, layer
    if change == "inject":
        cersa.inject_cersa(unet, CersaConfig(alpha=0.9), show_progress=False)
    else:
        cersa.load_adapter(unet, tmp_path / "adapter.safetensors", show_progress=False)
    assert len(replaced_when_freed) == count
    # The weights of all replaced layers but the last are free.
    assert all(replaced <= freed + 2 for freed, replaced in enumerate(replaced_when_freed))


def test_factors_are_built_in_the_dtype_of_the_training_from_the_exact_weights(unet):
    expected = copy.deepcopy(unet)
    cersa.inject_cersa(expected, CersaConfig(alpha=0.9), show_progress=False)
    expected = frozen_parameters(expected.to(torch.bfloat16))
    cersa.inject_cersa(unet, CersaConfig(alpha=0.9), dtype=torch.bfloat16, show_progress=False)
    assert next(unet.parameters()).dtype == torch.float32, "the caller casts what is not decomposed"
    actual = frozen_parameters(unet.to(torch.bfloat16))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def _make_the_last_layer_fail(model: nn.Module) -> None:
    """The pattern top_k of SVFT needs all components of a layer, and a weight of rank 1 has only one."""
    *_, last = _linears(model).values()
    last.weight.data[:, 1:] = 0


def _fails(model: nn.Module) -> None:
    with raises(ConfigError, "keeps 1 components", "top_k"):
        cersa.inject_cersa(model, svft_config(off_diagonals=2, pattern="top_k"), show_progress=False)


@pytest.mark.parametrize("source", ["checkpoint", "memory"])
def test_a_failure_half_way_puts_all_layers_back(unet, network, source):
    model = unet if source == "checkpoint" else network
    _make_the_last_layer_fail(model)
    first = next(iter(_linears(model).values()))
    first.weight.requires_grad_(False)
    del first
    before = copy.deepcopy(model)
    _fails(model)
    assert str(model) == str(before)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.state_dict().items())
    gradients = {name: parameter.requires_grad for name, parameter in before.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert all(model.get_parameter(name).device == parameter.device for name, parameter in before.named_parameters())


def test_a_failure_whose_checkpoint_changed_meanwhile_says_what_to_do(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    _make_the_last_layer_fail(model)
    weights = next(tmp_path.glob("*.safetensors"))

    def write_anew() -> None:
        copied = shutil.copy(weights, tmp_path / "copy")
        os.replace(copied, weights)

    # When the first layer is dropped.
    weakref.finalize(next(iter(_linears(model).values())).weight, write_anew)
    with raises(CersaError, "cannot be put back", "load the model again"):
        cersa.inject_cersa(model, svft_config(off_diagonals=2, pattern="top_k"), show_progress=False)


@pytest.mark.gpu
def test_a_model_computes_on_the_gpu_from_cpu_memory(unet):
    size = unet.config.cross_attention_dim
    unet.to("cpu")
    addresses = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    arguments = torch.randn(1, unet.config.in_channels, 8, 8), torch.tensor(3), torch.randn(1, 4, size)
    expected = unet(*arguments).sample
    with run_from_cpu(unet, torch.device("cuda")):
        actual = unet(*(argument.cuda() for argument in arguments)).sample
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == addresses


@pytest.mark.gpu
def test_a_model_in_cpu_memory_never_is_on_the_gpu_in_dense_form(unet):
    unet.to("cpu")
    dense = sum(layer.weight.numel() * 4 for layer in _linears(unet).values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cersa.inject_cersa(unet, CersaConfig(alpha=0.5), device="cuda", dtype=torch.bfloat16, show_progress=False)
    assert torch.cuda.memory_allocated() - before < dense / 2
    unet.to("cuda", torch.bfloat16)
    assert all(parameter.is_cuda for parameter in unet.parameters())
