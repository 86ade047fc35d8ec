"""The mathematics against brute force and against its own definition."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cersa_diffusion.functional import block_to_core, core_to_block, decompose, energy_rank, pivot_rows

from .conftest import DEVICE, randn


def brute_force_rank(values: list[float], share: float) -> int:
    total = sum(value**2 for value in values)
    running = 0.0
    for k, value in enumerate(values, start=1):
        running += value**2
        if running / total >= share:
            return k
    return len(values)


def test_rank_is_the_smallest_that_reaches_the_share_on_200_spectra():
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        size = int(torch.randint(1, 60, (1,), generator=generator))
        values = torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values.to(DEVICE) + 1e-3
        if number % 4 == 0:
            values = values.mul(4).round().clamp_min(1)  # ties, and sums of small integers that hit shares exactly
        share = [0.5, 0.8, 0.9, 0.95, 1.0][number % 5]
        assert energy_rank(values, share) == brute_force_rank(values.tolist(), share)


def test_rank_counts_a_share_that_is_hit_exactly():
    energies = torch.tensor([7.0, 2.0, 1.0], device=DEVICE)  # 0.7, 0.9 and 1.0 of 10
    for share, expected in ((0.7, 1), (0.7000001, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert energy_rank(energies.double().sqrt().square().sqrt(), share) == expected


def test_rank_of_zero_and_rank_deficient_spectra():
    assert energy_rank(torch.zeros(5, device=DEVICE), 0.95) == 1
    assert energy_rank(torch.tensor([3.0, 2.0, 0.0, 0.0], device=DEVICE), 1.0) == 2


def test_decomposition_is_float64_whatever_the_weight():
    weight = randn(12, 7, generator=torch.Generator().manual_seed(0)).half()
    U, s, Vh = decompose(weight)
    assert U.dtype == s.dtype == Vh.dtype == torch.float64
    torch.testing.assert_close(U @ torch.diag(s) @ Vh, weight.double(), rtol=1e-12, atol=1e-12)


def test_pivot_rows_are_distinct_and_well_conditioned():
    basis = torch.linalg.qr(randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    rows = pivot_rows(basis)
    assert rows.unique().numel() == 30
    assert torch.linalg.cond(basis[rows]) < torch.linalg.cond(basis[:30])


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 60), share=st.floats(0, 1), part=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_first_pivots_are_those_of_the_first_columns(m, share, part, seed):
    """So that one factorisation of all kept components serves the core of any leading block."""
    rank = 1 + int(share * (m - 1))
    basis = torch.linalg.qr(randn(m, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    leading = 1 + int(part * (rank - 1))
    rows = pivot_rows(basis)[:leading]
    assert torch.equal(rows, pivot_rows(basis[:, :leading]))
    assert torch.linalg.cond(basis[rows, :leading]) < 1e4


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), share=st.floats(0.3, 1.0), seed=st.integers(0, 2**31))
def test_the_block_is_the_weight_change_at_its_rows_and_columns_and_gives_the_core_back(m, n, share, seed):
    generator = torch.Generator().manual_seed(seed)
    U, s, Vh = decompose(randn(m, n, generator=generator))
    rank = energy_rank(s, share)
    core = randn(rank, rank, generator=generator, dtype=torch.float64)
    rows, columns = pivot_rows(U[:, :rank]), pivot_rows(Vh[:rank].T)
    U, Vh = U[:, :rank], Vh[:rank]
    block = core_to_block(core, U, Vh, rows, columns)
    change = U @ core @ Vh
    torch.testing.assert_close(block, change[rows][:, columns])
    torch.testing.assert_close(block_to_core(block, U, Vh, rows, columns), core, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 10))
def test_the_block_means_the_same_in_any_basis_of_the_subspace(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = decompose(randn(20, 16, generator=generator))
    core = randn(rank, rank, generator=generator, dtype=torch.float64)
    U, Vh = U[:, :rank], Vh[:rank]
    rows, columns = pivot_rows(U), pivot_rows(Vh.T)
    block = core_to_block(core, U, Vh, rows, columns)
    left, right = (torch.linalg.qr(randn(rank, rank, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    other_U, other_Vh = U @ left, right @ Vh
    other_core = block_to_core(block, other_U, other_Vh, rows, columns)
    torch.testing.assert_close(other_U @ other_core @ other_Vh, U @ core @ Vh)


def matrix_of_condition(shape: tuple[int, int], decades: float) -> torch.Tensor:
    """A float64 matrix whose singular values fall evenly from 1 to 10^-decades."""
    generator = torch.Generator().manual_seed(0)
    p = min(shape)
    left, right = (torch.linalg.qr(randn(size, p, generator=generator, dtype=torch.float64)).Q for size in shape)
    return left @ torch.diag(torch.logspace(0, -decades, p, dtype=torch.float64, device=DEVICE)) @ right.T


@settings(max_examples=100, deadline=None)
@given(shape=st.sampled_from([(40, 40), (60, 20), (20, 60), (1, 7), (7, 1)]), decades=st.floats(1, 9))
@example(shape=(60, 20), decades=5.0)
@example(shape=(20, 60), decades=5.88)
def test_both_solvers_give_orthonormal_bases_to_float32_and_the_weight_to_float64(shape, decades):
    weight = matrix_of_condition(shape, decades)
    U, s, Vh = decompose(weight)
    identity = torch.eye(min(shape), dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(U.T @ U, identity, rtol=0, atol=2e-8)
    torch.testing.assert_close(Vh @ Vh.T, identity, rtol=0, atol=2e-8)
    torch.testing.assert_close((U * s) @ Vh, weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight), rtol=0, atol=1e-10)
