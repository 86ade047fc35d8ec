"""A check that refuses installed packages that are known not to work together."""

from cersa_diffusion.errors import ConfigError
from cersa_doctor.versions import bad_pairs


def check_versions() -> None:
    """Raises ConfigError if two installed packages make training impossible; it names them and what to install instead."""
    unusable = [str(pair) for pair in bad_pairs() if pair.stops_training]
    if unusable:
        raise ConfigError(f"{' '.join(unusable)} (`cersa doctor` tells more)")
