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
