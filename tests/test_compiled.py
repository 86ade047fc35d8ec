"""Injected models of diffusers under torch.compile: one graph, the same numbers, and repeated blocks that are compiled once."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch._dynamo.testing import CompileCounter

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig
from cersa_diffusion.layers.model import cersa_layers

from .conftest import DEVICE, randn


def small_unet() -> tuple[UNet2DConditionModel, dict]:
    """A UNet whose four transformer blocks have one width, and its inputs."""
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    return model, {
        "sample": randn(2, 4, 8, 8),
        "timestep": torch.tensor(3, device=DEVICE),
        "encoder_hidden_states": randn(2, 5, 16),
    }


def small_dit() -> tuple[FluxTransformer2DModel, dict]:
    """A diffusion transformer with two blocks of each of its two classes, and its inputs."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": randn(1, 16, 4),
        "encoder_hidden_states": randn(1, 8, 32),
        "pooled_projections": randn(1, 32),
        "timestep": torch.tensor([0.5], device=DEVICE),
        "img_ids": randn(16, 3),
        "txt_ids": randn(8, 3),
    }


MODELS = {"unet": small_unet, "dit": small_dit}


@pytest.fixture(params=list(MODELS))
def model_and_inputs(request) -> tuple[nn.Module, dict]:
    """A model whose layers have spectra that decay at different rates, as those of trained models do; and its inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for number, layer in enumerate(layers):
        U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight = nn.Parameter((U * s * torch.logspace(0, -0.3 * (1 + number % 5), len(s))) @ Vh)
    return model.to(DEVICE), inputs


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_trained_cores(model: nn.Module, **settings) -> nn.Module:
    cersa.inject_cersa(model, CersaConfig(alpha=0.9, **settings), show_progress=False)
    for core in cersa.trainable_parameters(model):
        core.data.normal_(std=0.1)
    return model


def gradients(model: nn.Module, called: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = called(**inputs).sample
    output.square().mean().backward()
    return output.detach(), {name: core.grad for name, core in model.named_parameters() if core.requires_grad}


def test_training_in_one_graph_gives_the_gradients_of_eager_mode(model_and_inputs):
    model, inputs = with_trained_cores(model_and_inputs[0], beta=0.7), model_and_inputs[1]
    assert {layer.cores["default"].rank < layer.kept_rank for layer in cersa_layers(model).values()} == {True, False}
    other = copy.deepcopy(model)
    expected, expected_gradients = gradients(model, model, inputs)
    output, of_cores = gradients(other, torch.compile(other, fullgraph=True, backend="aot_eager"), inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert of_cores.keys() == expected_gradients.keys() and len(of_cores) == len(cersa_layers(model))
    torch.testing.assert_close(of_cores, expected_gradients, rtol=1e-3, atol=1e-6)
    assert any(gradient.any() for gradient in of_cores.values())


def test_drawing_in_one_graph_gives_the_output_of_eager_mode(model_and_inputs):
    model, inputs = with_trained_cores(model_and_inputs[0]).requires_grad_(False), model_and_inputs[1]
    expected = model(**inputs).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_and_inputs", ["unet"], indirect=True)
def test_inductor_draws_and_trains_blocks(model_and_inputs):
    """The backend that users take; on the blocks, because it takes longer for whole models."""
    model, inputs = with_trained_cores(model_and_inputs[0], uniform_blocks=True), model_and_inputs[1]
    other = copy.deepcopy(model)
    other.compile_repeated_blocks(fullgraph=True)
    expected, expected_gradients = gradients(model, model, inputs)
    output, of_cores = gradients(other, other, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_cores, expected_gradients, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).sample, model(**inputs).sample, rtol=1e-4, atol=1e-5)


def compilations(model: nn.Module, inputs: dict) -> int:
    """How often the repeated blocks of a model are compiled when it is called."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        model(**inputs)
    return counter.frame_count


def test_uniform_blocks_are_compiled_as_often_as_dense_ones(model_and_inputs):
    dense, inputs = model_and_inputs
    models = {uniform: copy.deepcopy(dense) for uniform in (False, True)}
    for uniform, model in models.items():
        with_trained_cores(model, uniform_blocks=uniform)
    # The single-stream blocks of Flux get inputs of two layouts, so that dense blocks are compiled three times as well.
    least = 1 if isinstance(dense, UNet2DConditionModel) else 3
    assert compilations(dense, inputs) == compilations(models[True], inputs) == least < compilations(models[False], inputs)
