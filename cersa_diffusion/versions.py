"""Refusing to start with packages that are known not to work together."""

from cersa_diffusion.errors import ConfigError
from cersa_doctor.versions import bad_pairs


def check_versions() -> None:
    """Looks for pairs of installed packages with which nothing can be trained.

    Raises:
        ConfigError: there is one; it is named, with what to install instead.
    """
    unusable = [str(pair) for pair in bad_pairs() if pair.stops_training]
    if unusable:
        raise ConfigError(f"{' '.join(unusable)} (`cersa doctor` says more)")
