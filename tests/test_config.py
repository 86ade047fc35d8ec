"""Settings are checked where they are made."""

import pytest
import torch

from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.config import parse_bytes

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
    config = CersaConfig(alpha=0.9, beta=0.5, target_modules=["to_q"])
    assert CersaConfig.from_dict(config.to_dict()) == config
    with raises(ConfigError, "gamma"):
        CersaConfig.from_dict({"gamma": 1})


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"rank": 0}, "rank 0"),
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
