"""Settings are checked where they are made."""

import pytest

from cersa_diffusion import CersaConfig, ConfigError


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        CersaConfig(alpha=alpha)


@pytest.mark.parametrize("beta", [0.0, 0.96, float("nan")])
def test_beta_must_be_at_most_alpha(beta):
    with pytest.raises(ConfigError, match="beta"):
        CersaConfig(alpha=0.95, beta=beta)


def test_dictionary_round_trip_and_unknown_settings():
    config = CersaConfig(alpha=0.9, beta=0.5, target_modules=["to_q"])
    assert CersaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="gamma"):
        CersaConfig.from_dict({"gamma": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"core": "tensor"}, "core is 'tensor', expected one of 'matrix', 'diagonal', 'sparse'"),
        ({"residual": "maybe"}, "residual"),
        ({"unprofitable": "x"}, "unprofitable"),
        ({"sparse_pattern": "x"}, "sparse_pattern"),
        ({"off_diagonals": -1}, "off_diagonals"),
        ({"block": "bottom"}, "set beta below alpha"),
        ({"core": "sparse", "beta": 0.5}, "leave beta out"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        CersaConfig(**settings)


@pytest.mark.parametrize("settings", [{"off_diagonals": 2}, {"rank": 4, "beta": 0.5}])
def test_ignored_settings_are_said(settings):
    with pytest.warns(UserWarning, match="ignored"):
        CersaConfig(**settings)
