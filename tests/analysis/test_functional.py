"""Similarity of subspaces, intruder dimensions and forgetting: properties, and small cases that can be done by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cersa_diffusion import ConfigError, NonFiniteError
from cersa_diffusion.analysis.subspaces import (
    best_cosines,
    forgetting_rate,
    intruder_dimensions,
    resolved_rank,
    similarity_grid,
    subspace_similarity,
)

from ..conftest import raises

dimensions = st.tuples(st.integers(4, 24), st.integers(0, 2**31)).flatmap(
    lambda given: st.tuples(st.just(given[0]), st.integers(1, given[0]), st.integers(1, given[0]), st.just(given[1]))
)


def basis(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


@given(dimensions)
@settings(max_examples=40)
def test_psi_of_a_subspace_with_itself_is_one_however_its_basis_is_turned(given):
    m, i, _, seed = given
    A, turn = basis(m, i, seed), basis(i, i, seed + 1)
    assert subspace_similarity(A, A) == pytest.approx(1)
    assert subspace_similarity(A, A @ turn) == pytest.approx(1)


@given(dimensions)
@settings(max_examples=40)
def test_psi_does_not_depend_on_the_bases_nor_on_a_turn_of_the_whole_space(given):
    m, i, j, seed = given
    A, B = basis(m, i, seed), basis(m, j, seed + 1)
    psi = subspace_similarity(A, B)
    assert 0 <= psi <= 1
    assert subspace_similarity(B, A) == pytest.approx(psi)
    assert subspace_similarity(A @ basis(i, i, seed + 2), B @ basis(j, j, seed + 3)) == pytest.approx(psi)
    whole = basis(m, m, seed + 4)
    assert subspace_similarity(whole @ A, whole @ B) == pytest.approx(psi)
    # Eq. 3 written out as the squared cosines of the principal angles.
    angles = torch.linalg.svdvals(A.T @ B)
    assert psi == pytest.approx(float(angles.square().mean()))


@given(dimensions)
@settings(max_examples=30)
def test_psi_of_orthogonal_subspaces_is_zero_and_of_nested_ones_one(given):
    m, i, _, seed = given
    whole = basis(m, m, seed)
    A, B = whole[:, :i], whole[:, i:]
    if B.shape[1]:
        assert subspace_similarity(A, B) == pytest.approx(0, abs=1e-12)
    assert subspace_similarity(A, whole) == pytest.approx(1)


@given(dimensions)
@settings(max_examples=20)
def test_grid_is_psi_of_all_leading_columns(given):
    m, i, j, seed = given
    A, B = basis(m, i, seed), basis(m, j, seed + 1)
    grid = similarity_grid(A, B)
    assert grid.shape == (i, j)
    for a in range(1, i + 1):
        for b in range(1, j + 1):
            assert float(grid[a - 1, b - 1]) == pytest.approx(subspace_similarity(A[:, :a], B[:, :b]), abs=1e-12)


def test_intruders_by_hand():
    """Of three vectors one is kept with the sign turned, one lies at 45 degrees, one is new."""
    axes = torch.eye(6, dtype=torch.float64)
    pretrained = axes[:, :4]
    between = (axes[:, 1] + axes[:, 2]) / math.sqrt(2)
    tuned = torch.stack([-axes[:, 0], between, axes[:, 5]], dim=1)
    assert best_cosines(pretrained, tuned).tolist() == pytest.approx([1, 1 / math.sqrt(2), 0])
    assert [intruder_dimensions(pretrained, tuned, threshold) for threshold in (0.5, 0.8, 0.99)] == [1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_resolved_rank_finds_what_a_truncated_weight_kept(dtype, rank):
    values = torch.logspace(0, -0.5, rank, dtype=torch.float64)
    weight = (basis(40, rank, 0) * values) @ basis(60, rank, 1).T
    stored = torch.linalg.svdvals(weight.to(dtype).double())
    assert resolved_rank(stored, (40, 60), dtype) == rank


def test_resolved_rank_of_a_full_and_of_an_empty_matrix():
    full = torch.linalg.svdvals(torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).double())
    assert resolved_rank(full, (30, 50), torch.float32) == 30
    assert resolved_rank(torch.zeros(4), (4, 5), torch.float32) == 1


def test_forgetting_by_hand():
    # Means .8 and .6: a quarter of .8 is gone.
    assert forgetting_rate([0.9, 0.8, 0.7], [0.6, 0.8, 0.4]) == pytest.approx(0.25)
    assert forgetting_rate([0.5], [0.55]) == pytest.approx(-0.1)
    assert forgetting_rate([0.3, 0.4], [0.3, 0.4]) == 0


def test_what_cannot_be_compared_is_refused():
    A = basis(5, 2, 0)
    with raises(ConfigError, "5", "6", "2"):
        subspace_similarity(A, basis(6, 2, 0))
    with raises(ConfigError, "column"):
        subspace_similarity(A, A[:, :0])
    with raises(NonFiniteError, "NaN"):
        similarity_grid(A, torch.full((5, 2), math.nan))
    with raises(ConfigError, "1", "2"):
        forgetting_rate([0.5], [0.5, 0.4])
    with raises(ConfigError, "0"):
        forgetting_rate([0.0], [0.1])
    with raises(NonFiniteError, "accuracy", "NaN"):
        forgetting_rate([0.5], [math.nan])
