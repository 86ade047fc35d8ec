"""The layer: what it computes, what it trains, what it keeps for the backward pass."""

import copy

import pytest
import torch
from torch import nn

from cersa_diffusion import CersaLinear, ConfigError
from cersa_diffusion.functional import decompose, energy_rank


def make_layer(m=20, n=30, alpha=0.9, beta=0.7, bias=True, dtype=torch.float32, seed=0) -> tuple[nn.Linear, CersaLinear]:
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, bias=bias).to(dtype)
    factors = decompose(linear.weight)
    layer = CersaLinear(factors, energy_rank(factors.s, alpha), linear.bias, dtype)
    rank = energy_rank(factors.s, beta)
    layer.add_core("default", rank, 0.1 * torch.randn(rank, rank))
    return linear, layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 9), (9, 1)])
def test_forward_is_a_dense_layer_with_the_effective_weight(shape, bias):
    _, layer = make_layer(*shape, bias=bias)
    x = torch.randn(5, 3, shape[1])
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.effective_weight(), layer.bias), rtol=1e-5, atol=1e-5)


def test_untrained_layer_is_the_truncated_one():
    linear, _ = make_layer()
    factors = decompose(linear.weight)
    layer = CersaLinear(factors, 7, linear.bias, torch.float32)
    layer.add_core("default", 5)
    truncated = factors.U[:, :7] @ torch.diag(factors.s[:7]) @ factors.Vh[:7]
    torch.testing.assert_close(layer.effective_weight().double(), truncated, rtol=1e-6, atol=1e-6)


def test_alpha_one_is_the_dense_layer():
    linear, layer = make_layer(alpha=1.0)
    layer.strengths["default"] = 0.0
    x = torch.randn(64, 30)
    expected = linear(x)
    assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()


def test_gradient_of_the_core_is_the_dense_gradient_in_the_subspace():
    _, layer = make_layer()
    x, target = torch.randn(64, 30), torch.randn(64, 20)
    (layer(x) - target).square().sum().backward()
    dense = layer.effective_weight().requires_grad_()
    (nn.functional.linear(x, dense, layer.bias) - target).square().sum().backward()
    rank = layer.cores["default"].shape[0]
    expected = layer.U[:, :rank].T @ dense.grad @ layer.Vh[:rank].T
    torch.testing.assert_close(layer.cores["default"].grad, expected, rtol=1e-4, atol=1e-4)


def test_backward_keeps_only_the_projected_input():
    tokens, m, n = 512, 96, 160
    _, layer = make_layer(m, n, alpha=0.5, beta=0.5)
    layer.bias.requires_grad_(False)
    factors = {layer.U.data_ptr(), layer.Vh.data_ptr(), layer.s.data_ptr(), layer.cores["default"].data_ptr()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in factors:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(tokens, n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert sum(saved.values()) <= tokens * layer.kept_rank * 4


def test_only_the_core_is_a_parameter_that_training_changes():
    _, layer = make_layer()
    layer.bias.requires_grad_(False)
    frozen = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 1e-2)
    before = layer.cores["default"].detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(8, 30)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in layer.named_buffers())
    assert not torch.equal(layer.cores["default"], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cores_and_singular_values_stay_float32_through_dtype_moves(dtype):
    _, layer = make_layer()
    core, s = layer.cores["default"].detach().clone(), layer.s.clone()
    layer.to(dtype)
    assert layer.U.dtype == layer.Vh.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.cores["default"], core) and torch.equal(layer.s, s)
    assert layer(torch.randn(4, 30, dtype=dtype)).dtype == dtype


def test_autocast_gives_the_autocast_dtype():
    _, layer = make_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 30))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.cores["default"].grad.dtype == torch.float32


def test_cores_of_different_rank_add_up_with_their_strengths():
    _, layer = make_layer()
    first = layer.weight_change()
    layer.add_core("second", 3, torch.randn(3, 3), strength=0.0)
    torch.testing.assert_close(layer.weight_change(), first)
    layer.strengths.update(default=0.0, second=2.0)
    second = layer.weight_change()
    layer.strengths.update(default=0.5, second=2.0)
    torch.testing.assert_close(layer.weight_change(), 0.5 * first + second)


def test_core_names_and_ranks_are_checked():
    _, layer = make_layer()
    with pytest.raises(ConfigError, match="already on this layer"):
        layer.add_core("default", 2)
    with pytest.raises(ConfigError, match=r"outside 1\.\."):
        layer.add_core("other", layer.kept_rank + 1)


def test_deepcopy_and_state_dict_round_trip():
    _, layer = make_layer()
    x = torch.randn(4, 30)
    twin = copy.deepcopy(layer)
    _, other = make_layer(seed=5)
    other = CersaLinear(decompose(torch.randn(20, 30)), layer.kept_rank, other.bias, torch.float32)
    other.add_core("default", layer.cores["default"].shape[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x)) and torch.equal(other(x), layer(x))
