"""Settings are checked where they are made."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.config import parse_bytes, svfit_config, svft_config
from cersa_diffusion.functional import energy_rank

from .conftest import raises, warns


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with raises(ConfigError, "alpha"):
        CersaConfig(alpha=alpha)


@pytest.mark.parametrize("beta", [0.0, 0.96, float("nan")])
def test_beta_must_be_at_most_alpha(beta):
    with raises(ConfigError, "beta"):
        CersaConfig(alpha=0.95, beta=beta)


def test_dictionary_round_trip_and_unknown_settings():
    for config in (CersaConfig(alpha=0.9, beta=0.5, target_modules=["to_q"]), CersaConfig(rank_multiple=16, uniform_blocks=True)):
        assert CersaConfig.from_dict(config.to_dict()) == config
    with raises(ConfigError, "gamma"):
        CersaConfig.from_dict({"gamma": 1})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank_multiple": 0}, "rank_multiple 0"),
        ({"core": "tensor"}, "core tensor matrix diagonal sparse"),
        ({"residual": "maybe"}, "residual"),
        ({"unprofitable": "x"}, "unprofitable"),
        ({"sparse_pattern": "x"}, "sparse_pattern"),
        ({"off_diagonals": -1}, "off_diagonals"),
        ({"block": "bottom"}, "block beta alpha"),
        ({"core": "sparse", "beta": 0.5}, "core beta"),
        ({"core": "sparse", "sparse_pattern": "top_k"}, "sparse_pattern top_k alpha 0.95 banded random"),
        ({"core": "sparse", "sparse_pattern": "top_k", "alpha": 1.0, "rank": 9}, "sparse_pattern top_k rank 9"),
        ({"residual": "keep", "unprofitable": "skip"}, "residual unprofitable"),
        ({"memory_budget": 1000, "rank": 4}, "rank 4 memory_budget 1000"),
        ({"memory_budget": 1000, "residual": "keep"}, "memory_budget residual"),
        ({"memory_budget": 1000, "beta": 1.1}, "beta 1.1"),
        ({"memory_budget": 1000, "block": "bottom"}, "block beta alpha"),
    ],
)
def test_settings_that_cannot_be(settings, names):
    with raises(ConfigError, *names.split()):
        CersaConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "names"), [({"off_diagonals": 2}, "off_diagonals core='sparse'"), ({"rank": 4, "beta": 0.5}, "beta rank")]
)
def test_ignored_settings_are_said(settings, names):
    with warns(UserWarning, *names.split()):
        CersaConfig(**settings)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("900MB", 900_000_000), ("1.5GiB", 3 * 2**29), ("2 kib", 2048), ("7", 7), (1e9, 10**9), (123, 123), ("3TB", 3 * 10**12)],
)
def test_memory_sizes(size, expected):
    assert parse_bytes(size) == expected
    assert CersaConfig.from_dict(CersaConfig(memory_budget=size).to_dict()).memory_budget == size


@pytest.mark.parametrize(
    "size", ["", "MB", "-1MB", "0", 0, -5, "900 XB", "1.2.3GB", float("nan"), float("inf"), "1e999", True, "0.1B"]
)
def test_what_is_no_memory_size_is_refused(size):
    with raises(ConfigError, "memory_budget", repr(size), "900MB"):
        CersaConfig(memory_budget=size)


def test_a_budget_decides_instead_of_alpha():
    assert CersaConfig(memory_budget=1000, beta=1.0).beta == 1.0
    CersaConfig(memory_budget=1000, beta=0.95, block="bottom")
    with warns(UserWarning, "alpha", "memory_budget"):
        CersaConfig(memory_budget=1000, alpha=0.5)
    with raises(ConfigError, "choose_ranks"):
        CersaConfig(memory_budget=1000).kept_rank(torch.ones(3))


@st.composite
def spectra(draw) -> torch.Tensor:
    values = draw(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(1e-3, 1e3), min_size=1, max_size=40))
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


@given(spectra(), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 17))
def test_ranks_are_the_smallest_multiples_that_hold_the_shares(spectrum, alpha, part, multiple):
    exact = CersaConfig(alpha=alpha, beta=alpha * part, rank_multiple=1).layer_ranks(spectrum)
    rounded = CersaConfig(alpha=alpha, beta=alpha * part, rank_multiple=multiple).layer_ranks(spectrum)
    assert 1 <= rounded.core <= rounded.kept <= len(spectrum)
    for least, rank in zip(exact, rounded, strict=True):
        assert least <= rank < least + multiple
        assert rank % multiple == 0 or rank == len(spectrum)


@given(spectra(), st.integers(1, 50))
def test_a_rank_of_the_caller_is_not_rounded(spectrum, rank):
    own = min(rank, len(spectrum))
    for config in (CersaConfig(rank=rank), svfit_config(rank)):
        assert config.layer_ranks(spectrum) == (own, own)


@given(spectra())
def test_svft_keeps_exactly_what_has_energy(spectrum):
    assert svft_config().layer_ranks(spectrum) == (energy_rank(spectrum, 1.0),) * 2


def test_settings_from_before_rounding_mean_exact_ranks():
    old = CersaConfig(alpha=0.9).to_dict()
    del old["rank_multiple"], old["uniform_blocks"]
    assert CersaConfig.from_dict(old) == CersaConfig(alpha=0.9, rank_multiple=1)
