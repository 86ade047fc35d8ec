"""Cores that leave the machine: the same weight change in other singular vectors, for every kind of core."""

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaError
from cersa_diffusion.adapters.portable import portable_cores, restore_cores
from cersa_diffusion.functional import Decomposition, decompose
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import raises, train

KINDS = {
    "matrix": CersaConfig(alpha=0.9),
    "leading block": CersaConfig(alpha=0.9, beta=0.6),
    "bottom block": CersaConfig(alpha=0.9, beta=0.6, block="bottom"),
    "diagonal": CersaConfig(alpha=0.9, core="diagonal"),
    "sparse, banded": CersaConfig(alpha=0.9, core="sparse", off_diagonals=2),
    "sparse, random": CersaConfig(alpha=0.9, core="sparse", off_diagonals=2, sparse_pattern="random"),
    "sparse, top_k": CersaConfig(alpha=1.0, core="sparse", off_diagonals=2, sparse_pattern="top_k"),
}


def flipped_decompose(weight: torch.Tensor) -> Decomposition:
    U, s, Vh = decompose(weight)
    signs = torch.where(torch.arange(len(s)) % 3 == 0, -1.0, 1.0).to(s)
    return Decomposition(U * signs, s, signs[:, None] * Vh)


def turned_decompose(weight: torch.Tensor) -> Decomposition:
    """All vectors turned against their neighbours: no diagonal stays one."""
    U, s, Vh = decompose(weight)
    turn = torch.eye(len(s), dtype=torch.float64, device=s.device)
    for first in range(0, len(s) - 1, 2):
        angle = torch.tensor(0.3, dtype=torch.float64)
        turn[first : first + 2, first : first + 2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    return Decomposition(U @ turn, s, turn.T @ Vh)


@pytest.fixture
def injected(network, monkeypatch):
    """(settings, solver) -> the network, injected with the singular vectors of that solver."""
    monkeypatch.setenv("CERSA_CACHE", "off")

    def inject(config: CersaConfig, solver=decompose, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = copy.deepcopy(network).to(dtype)
        with monkeypatch.context() as patch:
            patch.setattr("cersa_diffusion.weights.cache.decompose", solver)
            cersa.inject_cersa(model, config, show_progress=False)
        return model

    return inject


def change_errors(found: nn.Module, expected: nn.Module) -> list[float]:
    pairs = zip(cersa_layers(found).values(), cersa_layers(expected).values(), strict=True)
    return [float((a.weight_change() - b.weight_change()).norm() / b.weight_change().norm()) for a, b in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_core_survives_flipped_singular_vectors(kind, injected):
    torch.manual_seed(0)
    model = injected(KINDS[kind])
    train(model)
    other = injected(KINDS[kind], flipped_decompose)
    train(other, steps=1)  # what is restored must not add to what is there
    errors = restore_cores(other, load(save(portable_cores(model))))
    assert list(errors) == list(cersa_layers(model)) and max(errors.values()) < 1e-6
    assert max(change_errors(other, model)) < 1e-5
    for a, b in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert a[0].endswith((".up.weight", ".down.weight", ".D", ".values")) or torch.allclose(a[1], b[1], rtol=1e-5)


def test_in_the_same_bases_the_cores_come_back(injected):
    for config in KINDS.values():
        model = injected(config)
        train(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors = portable_cores(model)
        for parameter in cersa.trainable_parameters(model):
            parameter.data.zero_()
        restore_cores(model, tensors)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-8)


def test_turned_vectors_cost_a_matrix_nothing_and_the_error_of_a_diagonal_is_told(injected):
    model, other = injected(KINDS["matrix"]), injected(KINDS["matrix"], turned_decompose)
    train(model)
    assert max(restore_cores(other, portable_cores(model)).values()) < 1e-6
    # Where the kept components end inside a turned pair the subspace is another one; the core is solved for all the same.
    model, other = injected(KINDS["diagonal"]), injected(KINDS["diagonal"], turned_decompose)
    train(model)
    assert min(restore_cores(other, portable_cores(model)).values()) > 0.01


def test_an_untrained_core_is_zero_in_any_basis(injected):
    other = injected(KINDS["matrix"], flipped_decompose)
    train(other)
    assert set(restore_cores(other, portable_cores(injected(KINDS["matrix"]))).values()) == {0.0}
    assert all(not parameter.any() for parameter in cersa.trainable_parameters(other))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_averages_travel_without_the_parameters(kind, injected):
    model, other = injected(KINDS[kind]), injected(KINDS[kind], flipped_decompose)
    train(model)
    restore_cores(other, portable_cores(model))
    before = {name: parameter.clone() for name, parameter in other.named_parameters()}
    averages = {parameter: parameter.detach() * 0.5 for parameter in cersa.trainable_parameters(model)}
    target = {parameter: torch.zeros_like(parameter) for parameter in cersa.trainable_parameters(other)}
    restore_cores(other, portable_cores(model, values=averages), values=target)
    assert all(torch.equal(parameter, before[name]) for name, parameter in other.named_parameters())
    for source, written in zip(averages.values(), target.values(), strict=True):
        torch.testing.assert_close(written.abs(), source.abs(), rtol=1e-4, atol=1e-6)


def test_sixteen_bit_bases(injected):
    model = injected(KINDS["matrix"], dtype=torch.bfloat16)
    other = injected(KINDS["matrix"], flipped_decompose, dtype=torch.bfloat16)
    for parameter in cersa.trainable_parameters(model):
        parameter.data.normal_()
    restore_cores(other, portable_cores(model))
    assert max(change_errors(other, model)) < 1e-5  # a sign changes nothing in rounding


def lost_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("2.")}


def smaller_block(tensors):
    return tensors | {"2.block": tensors["2.block"][:-1, :-1]}


def repeated_rows(tensors):
    return tensors | {"2.rows": torch.zeros_like(tensors["2.rows"])}


def far_rows(tensors):
    return tensors | {"2.rows": tensors["2.rows"] + 1000}


def not_finite(tensors):
    return tensors | {"2.block": tensors["2.block"] * float("nan")}


def other_components(tensors):
    return tensors | {"2.components": tensors["2.components"] + 1}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lost_layer, ("'default'", "2.block", "2.cols", "2.components")),
        (smaller_block, ("layer 2", "block", "(15, 15)", "(16, 16)")),
        (repeated_rows, ("layer 2", "rows", "columns")),
        (far_rows, ("layer 2", "rows", "64")),
        (not_finite, ("layer 2", "finite")),
        (other_components, ("layer 2", "component", "1", "0")),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(change, named, injected):
    model, other = injected(KINDS["matrix"]), injected(KINDS["matrix"])
    train(model)
    tensors = change(portable_cores(model))
    with raises(CersaError, *named):
        restore_cores(other, tensors)
    assert all(not parameter.any() for parameter in cersa.trainable_parameters(other))


def test_another_kind_of_core_is_refused(injected):
    with raises(CersaError, "'default'", "0.gate", "0.places"):
        restore_cores(injected(KINDS["matrix"]), portable_cores(injected(KINDS["sparse, banded"])))
