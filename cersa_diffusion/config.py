"""What CERSA does to a model, as one dataclass whose help texts the command lines reuse."""

from dataclasses import asdict, dataclass, field, fields

from cersa_diffusion.errors import ConfigError


@dataclass
class CersaConfig:
    """Settings of an injection (CERSA, section 3.1).

    Raises:
        ConfigError: alpha outside (0, 1], or beta outside (0, alpha].
    """

    alpha: float = field(
        default=0.95,
        metadata={"help": "Share of squared-singular-value energy that is kept in every layer, in (0, 1]. The rest is dropped."},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Share of the energy whose components are trained, at most alpha. Default: alpha, all that is kept."},
    )
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={"help": "'all-linear', a regular expression for whole module names, or a list of name endings."},
    )
    exclude_modules: str | list[str] | None = field(
        default=None,
        metadata={"help": "Layers to leave alone: a regular expression for whole module names, or a list of name endings."},
    )

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, expected a share in (0, 1]: the usual values are .8 to .95")
        if self.beta is not None and not 0 < self.beta <= self.alpha:
            raise ConfigError(f"beta is {self.beta}, expected a share in (0, alpha = {self.alpha}]: lower beta or raise alpha")

    @property
    def trained_share(self) -> float:
        """beta, or alpha where beta was left out."""
        return self.alpha if self.beta is None else self.beta

    def to_dict(self) -> dict:
        """The settings as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CersaConfig":
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a setting that this version does not know.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown CERSA settings {sorted(unknown)}: was this written by a newer version?")
        return cls(**values)
