"""The layer: what it computes, what it trains, what it keeps for the backward pass."""

import copy
from typing import ClassVar

import accelerate
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cersa_diffusion import CersaLinear, ConfigError
from cersa_diffusion.functional import decompose, energy_rank
from cersa_diffusion.layers.core import DiagonalCore, MatrixCore, SparseCore, banded_places, random_places, top_places
from cersa_diffusion.layers.fused import FusedFactors
from cersa_diffusion.layers.kinds import build_layer
from cersa_diffusion.weights.cache import leading_factors
from cersa_diffusion.weights.stored import FinestWeight

from ..conftest import DEVICE, frozen_parameters, raises, randn


def make_layer(m=20, n=30, alpha=0.9, beta=0.7, bias=True, dtype=torch.float32, seed=0) -> tuple[nn.Linear, CersaLinear]:
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, bias=bias).to(DEVICE, dtype)
    factors = decompose(linear.weight)
    layer = CersaLinear(factors, energy_rank(factors.s, alpha), linear.bias, dtype)
    rank = energy_rank(factors.s, beta)
    layer.add_core("default", MatrixCore(rank, values=0.1 * randn(rank, rank)))
    return linear, layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 9), (9, 1)])
def test_forward_is_a_dense_layer_with_the_effective_weight(shape, bias):
    _, layer = make_layer(*shape, bias=bias)
    x = randn(5, 3, shape[1])
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.effective_weight(), layer.bias), rtol=1e-5, atol=1e-5)


def test_untrained_layer_is_the_truncated_one():
    linear, _ = make_layer()
    factors = decompose(linear.weight)
    layer = CersaLinear(factors, 7, linear.bias, torch.float32)
    layer.add_core("default", MatrixCore(5))
    truncated = factors.U[:, :7] @ torch.diag(factors.s[:7]) @ factors.Vh[:7]
    torch.testing.assert_close(layer.effective_weight().double(), truncated, rtol=1e-6, atol=1e-6)


def test_alpha_one_is_the_dense_layer():
    linear, layer = make_layer(alpha=1.0)
    layer.strengths["default"] = 0.0
    x = randn(64, 30)
    expected = linear(x)
    assert (layer(x) - expected).norm() <= 1e-5 * expected.norm()


def test_gradient_of_the_core_is_the_dense_gradient_in_the_subspace():
    _, layer = make_layer()
    x, target = randn(64, 30), randn(64, 20)
    (layer(x) - target).square().sum().backward()
    dense = layer.effective_weight().requires_grad_()
    (nn.functional.linear(x, dense, layer.bias) - target).square().sum().backward()
    rank = layer.cores["default"].rank
    expected = layer.U[:, :rank].T @ dense.grad @ layer.Vh[:rank].T
    torch.testing.assert_close(layer.cores["default"].D.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_backward_keeps_only_the_changed_part_of_the_projected_input(beta):
    tokens, m, n = 512, 96, 160
    _, layer = make_layer(m, n, alpha=0.5, beta=beta)
    layer.bias.requires_grad_(False)
    factors = {layer.U.data_ptr(), layer.Vh.data_ptr(), layer.s.data_ptr(), layer.cores["default"].D.data_ptr()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in factors:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = randn(tokens, n).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert sum(saved.values()) <= tokens * layer.cores["default"].rank * 4


def test_only_the_core_is_a_parameter_that_training_changes():
    _, layer = make_layer()
    layer.bias.requires_grad_(False)
    frozen = {name: tensor.clone() for name, tensor in frozen_parameters(layer).items()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], 1e-2)
    before = layer.cores["default"].D.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        layer(randn(8, 30)).square().sum().backward()
        optimizer.step()
    assert frozen.keys() == {"up.weight", "up.bias", "down.weight"}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_parameters(layer).items())
    assert not torch.equal(layer.cores["default"].D, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cores_and_singular_values_stay_float32_through_dtype_moves(dtype):
    _, layer = make_layer()
    core, s = layer.cores["default"].D.detach().clone(), layer.s.clone()
    layer.to(dtype)
    assert layer.U.dtype == layer.Vh.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.cores["default"].D, core) and torch.equal(layer.s, s)
    assert layer(randn(4, 30, dtype=dtype)).dtype == dtype


def test_autocast_gives_the_autocast_dtype():
    _, layer = make_layer()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer(randn(4, 30))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.cores["default"].D.grad.dtype == torch.float32


def test_cores_of_different_rank_add_up_with_their_strengths():
    _, layer = make_layer()
    first = layer.weight_change()
    layer.add_core("second", MatrixCore(3, offset=4, values=randn(3, 3)), strength=0.0)
    torch.testing.assert_close(layer.weight_change(), first)
    layer.strengths.update(default=0.0, second=2.0)
    second = layer.weight_change()
    layer.strengths.update(default=0.5, second=2.0)
    torch.testing.assert_close(layer.weight_change(), 0.5 * first + second)


def test_core_names_and_ranks_are_checked():
    _, layer = make_layer()
    with raises(ConfigError, "default"):
        layer.add_core("default", MatrixCore(2))
    with raises(ConfigError, str(layer.kept_rank)):
        layer.add_core("other", MatrixCore(3, offset=layer.kept_rank - 2))
    with raises(ConfigError, "other"):
        layer.delete_core("other")


def test_deepcopy_and_state_dict_round_trip():
    _, layer = make_layer()
    x = randn(4, 30)
    twin = copy.deepcopy(layer)
    _, other = make_layer(seed=5)
    other = CersaLinear(decompose(randn(20, 30)), layer.kept_rank, other.bias, torch.float32)
    other.add_core("default", MatrixCore(layer.cores["default"].rank))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x)) and torch.equal(other(x), layer(x))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_diagonal_core_is_the_matrix_core_of_its_diagonal():
    _, layer = make_layer()
    values = randn(5)
    layer.delete_core("default")
    layer.add_core("diagonal", DiagonalCore(5, offset=2))
    layer.cores["diagonal"].d.data.copy_(values)
    x = randn(8, 30)
    actual = layer(x)
    layer.delete_core("diagonal")
    layer.add_core("matrix", MatrixCore(5, offset=2, values=torch.diag(values)))
    torch.testing.assert_close(actual, layer(x))
    torch.testing.assert_close(actual, nn.functional.linear(x, layer.effective_weight(), layer.bias), rtol=1e-5, atol=1e-5)


def test_a_bottom_core_changes_only_its_components():
    _, layer = make_layer()
    layer.delete_core("default")
    offset = layer.kept_rank - 4
    layer.add_core("bottom", MatrixCore(4, offset, randn(4, 4)))
    change = layer.weight_change()
    inside = layer.U[:, offset:].double() @ layer.U[:, offset:].double().T @ change
    assert relative_error(inside, change) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kept_residual_makes_the_untrained_layer_the_dense_one(dtype, limit):
    torch.manual_seed(0)
    linear = nn.Linear(30, 20).to(DEVICE, dtype).requires_grad_(False)
    factors = leading_factors(linear.weight, lambda s: 6, None)
    layer = build_layer(linear, factors, 6, FinestWeight(linear.weight), dtype=dtype, keep_residual=True)
    assert relative_error(layer.effective_weight().float(), linear.weight.float()) < limit
    x = randn(9, 30, dtype=dtype)
    assert relative_error(layer(x).float(), linear(x).float()) < limit


@pytest.mark.parametrize(("rank", "off_diagonals"), [(5, 0), (5, 2), (7, 6)])
def test_banded_places_and_their_number(rank, off_diagonals):
    places = banded_places(rank, off_diagonals)
    expected = {(i, j) for i in range(rank) for j in range(rank) if abs(i - j) <= off_diagonals}
    assert {tuple(place) for place in places.T.tolist()} == expected
    assert places.shape[1] == rank * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)


def test_random_and_top_places():
    torch.manual_seed(0)
    places = random_places(6, 20)
    assert len({tuple(place) for place in places.T.tolist()}) == 20 and places.max() < 6
    for shape in ((6, 6), (9, 6), (6, 9)):
        U, _, Vh = decompose(randn(*shape))
        alignment = U @ Vh if shape == (6, 6) else (Vh if shape == (9, 6) else U)
        (rows, columns) = top_places(U, Vh, 4)
        assert sorted(alignment[rows, columns].tolist()) == sorted(alignment.flatten().topk(4).values.tolist())


def test_sparse_core_is_the_gated_matrix_of_svft():
    torch.manual_seed(0)
    linear = nn.Linear(10, 8).to(DEVICE)
    U, s, Vh = decompose(linear.weight)
    layer = CersaLinear(decompose(linear.weight), 8, linear.bias, torch.float32)
    layer.add_core("default", SparseCore(8, banded_places(8, 1)))
    core = layer.cores["default"]
    core.gate.data.fill_(0.7)
    M = torch.zeros(8, 8, dtype=torch.float64, device=DEVICE)
    for (i, j), value in zip(core.places.T.tolist(), core.values.tolist(), strict=True):
        M[i, j] = value
    expected = U @ (torch.diag(s) + torch.sigmoid(torch.tensor(0.7, dtype=torch.float64, device=DEVICE)) * M) @ Vh
    torch.testing.assert_close(layer.effective_weight().double(), expected, rtol=1e-5, atol=1e-5)
    layer(randn(3, 10)).square().sum().backward()
    assert core.values.grad.abs().sum() > 0 and core.gate.grad.abs() > 0


@pytest.mark.parametrize("kind", ["matrix", "diagonal", "sparse"])
def test_every_kind_of_core_stays_float32(kind):
    _, layer = make_layer()
    layer.delete_core("default")
    core = {"matrix": MatrixCore(4), "diagonal": DiagonalCore(4), "sparse": SparseCore(4, banded_places(4, 1))}[kind]
    layer.add_core("default", core)
    layer.to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in layer.cores.parameters())
    assert layer(randn(2, 30, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["matrix", "diagonal", "sparse"])
def test_a_core_may_be_put_away_as_soon_as_it_was_called(kind, strength):
    """As diffusers' group offloading does with every module, leaf by leaf: a parameter is elsewhere before it is used."""
    _, layer = make_layer()
    layer.delete_core("default")
    core = {"matrix": MatrixCore(4), "diagonal": DiagonalCore(4), "sparse": SparseCore(4, banded_places(4, 1))}[kind]
    layer.add_core("default", core, strength)
    x = randn(5, 30)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.fill_(0.3)
        expected = layer(x)
    parameters = {name: parameter.detach().clone() for name, parameter in core.named_parameters()}

    def fetch(module, _):
        for name, parameter in module.named_parameters():
            parameter.data = parameters[name]

    def put_away(module, *_):
        for parameter in module.parameters():
            parameter.data = torch.full_like(parameter, float("nan"))

    core.register_forward_pre_hook(fetch)
    core.register_forward_hook(put_away)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_offloading_takes_the_bases_away_and_changes_nothing():
    _, layer = make_layer()
    x = randn(5, 30)
    with torch.no_grad():
        expected = layer(x)
        accelerate.cpu_offload(layer, DEVICE)
        assert layer.U.is_meta and layer.Vh.is_meta and layer.cores["default"].D.is_meta
        for _ in range(2):
            assert torch.equal(layer(x), expected)
        assert layer.U.is_meta


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something; views cost no kernel."""

    VIEWS: ClassVar = {"view", "_unsafe_view", "t", "transpose", "slice", "alias", "detach", "reshape", "view_as", "permute"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_a_layer_takes_few_kernels(dtype, most):
    """peft's LoRA takes five in float32. In 16 bit a cast of the core and one behind the singular values come on top."""
    _, layer = make_layer(beta=0.9, dtype=dtype)
    assert layer.cores["default"].rank == layer.kept_rank
    x = randn(2, 3, 30, dtype=dtype)
    with Kernels() as kernels:
        layer(x)
    assert len(kernels.names) <= most, kernels.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("beta", [0.9, 0.7])
def test_a_layer_with_fused_factors_takes_two_kernels(shape, dtype, beta):
    _, layer = make_layer(*shape, beta=beta, dtype=dtype)
    x = randn(2, 3, shape[1], dtype=dtype)
    fused = FusedFactors(layer, {"default": 0.5})
    layer.strengths["default"] = 0.5
    with Kernels() as kernels:
        y = fused(x)
    assert len(kernels.names) == 2 and y.dtype == dtype, kernels.names
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y, layer(x), rtol=tolerance, atol=tolerance)


def test_torch_compile_has_no_graph_breaks():
    _, layer = make_layer()
    x = randn(4, 30)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
