"""The errors of this package: one small family, each also a ``ValueError``."""


class CersaError(ValueError):
    """Base of all errors raised by this package; the message says what was expected, what was found and what to do."""


class ConfigError(CersaError):
    """A setting, a path or a target that cannot be used."""


class AdapterFormatError(CersaError):
    """A file that is not a readable CERSA adapter."""


class BaseMismatchError(CersaError):
    """An adapter that belongs to another base model."""


class NonFiniteError(CersaError):
    """NaN or infinity in a weight or in an adapter."""
