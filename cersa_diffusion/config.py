"""The settings of CERSA, as one dataclass whose help texts the command lines reuse."""

import math
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank


def option(default, text: str):
    """A dataclass field with a default and the help text that the command lines show."""
    return field(default=default, metadata={"help": text})


# The dtype of a model's computations, by the name of the precision.
PRECISIONS = {None: torch.float32, "no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LayerRanks(NamedTuple):
    """The number of kept components of a layer (k) and the number of trained ones among them (r)."""

    kept: int
    core: int


_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power for power, prefix in enumerate("kmgt", start=1) for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(size: str | int | float, setting: str = "memory_budget") -> int:
    """Converts a memory size to a whole number of bytes.

    Args:
        size: "900MB" (powers of 1000), "1.5GiB" (powers of 1024), or a number of bytes.
        setting: the name of the setting, for the error.

    Raises:
        ConfigError: `size` has another form or is less than one byte.
    """
    match = re.fullmatch(r"(\d+\.?\d*(?:e\+?\d+)?)\s*([a-z]*)", str(size).strip().lower())
    byte_count = float(match[1]) * _UNITS.get(match[2], math.nan) if match else math.nan
    if not 1 <= byte_count < math.inf:
        raise ConfigError(
            f"{setting} is {size!r}, which is not a memory size: expected e.g. '900MB', '1.5GiB' or a number of bytes, at least 1"
        )
    return int(byte_count)


def listed_targets(targets: list[str]) -> str | list[str]:
    """Target modules as a command line lists them, in the form that `match_targets` takes.

    A single plain name is a name ending, as in a longer list; any other single entry is a pattern for whole names.
    """
    is_pattern = len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0]))
    return targets[0] if is_pattern else targets


# Settings that only core='sparse' reads.
SPARSE_SETTINGS = ("sparse_pattern", "off_diagonals")
OFF_DIAGONALS = (
    "SVFT (and core='sparse'): off-diagonals on each side. The other patterns train as many entries as the banded one would."
)


@dataclass(kw_only=True)
class SubspaceSettings:
    """What every layer keeps and what is trained in it: declared once, for `CersaConfig` and for the command lines."""

    alpha: float = option(0.95, "Share of squared-singular-value energy that every layer keeps, in (0, 1]. The rest is dropped.")
    beta: float | None = option(
        None, "Share of the energy whose components are trained, at most alpha. Default: alpha, which trains all kept components."
    )
    core: Literal["matrix", "diagonal", "sparse"] = option(
        "matrix", "What is trained on the components: a dense matrix, its diagonal (Table 6), or a few of its entries (SVFT)."
    )
    block: Literal["top", "bottom"] = option(
        "top", "With beta below alpha: train the leading components, or the same number of the last kept components (Table 3)."
    )
    rank_multiple: int = option(
        8,
        "Round kept and trained ranks that follow from alpha, beta or a memory budget up to multiples of this: GPUs multiply "
        "16-bit matrices fastest in multiples of 8. 1 gives the ranks of the paper.",
    )
    uniform_blocks: bool = option(
        False,
        "Give equal layers of a model's repeated blocks the largest rank among them, so that compile_repeated_blocks compiles "
        "equal blocks only once.",
    )
    unprofitable: Literal["factor", "skip"] = option(
        "factor", "Layers whose factors and core hold more numbers than their dense weight: factor them too, or leave them dense."
    )
    # The command lines give text; code may also pass a number of bytes.
    memory_budget: str | None = option(
        None,
        "Largest size of the training state of the whole model (all frozen and trained weights, gradients and optimizer state), "
        "e.g. '900MB' or '1.5GiB'. It replaces alpha: it decides how much every layer keeps.",
    )
    sparse_pattern: Literal["banded", "random", "top_k"] = option(
        "banded", "SVFT (and core='sparse'): which entries are trained; 'top_k' needs alpha 1."
    )
    off_diagonals: int = option(0, OFF_DIAGONALS)


@dataclass(kw_only=True)
class CersaConfig(SubspaceSettings):
    """Settings of an injection (CERSA, section 3.1, and its ablations).

    Raises:
        ConfigError: a value is out of range, or settings contradict each other.
    """

    rank: int | None = option(None, "Keep and train this many components in every layer, instead of alpha and beta (Table 5).")
    residual: Literal["drop", "keep"] = option("drop", "Drop the part of the weight outside alpha, or keep it frozen and dense.")
    target_modules: str | list[str] = option(
        "all-linear", "'all-linear', a regular expression for whole module names, or a list of name endings."
    )
    exclude_modules: str | list[str] | None = option(
        None, "Layers to leave alone: a regular expression for whole module names, or a list of name endings."
    )

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, expected a share in (0, 1]: usual values are 0.8 to 0.95")
        largest_beta = 1.0 if self.memory_budget is not None else self.alpha
        if self.beta is not None and not 0 < self.beta <= largest_beta:
            raise ConfigError(f"beta is {self.beta}, expected a share in (0, alpha = {largest_beta}]: lower beta or raise alpha")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected at least 1, or None so that alpha decides")
        if self.rank_multiple < 1:
            raise ConfigError(f"rank_multiple is {self.rank_multiple}, expected at least 1; 1 does not round")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}")
        if self.off_diagonals < 0:
            raise ConfigError(f"off_diagonals is {self.off_diagonals}, expected 0 or more")
        if self.block == "bottom" and (self.beta in (None, largest_beta) or self.rank is not None):
            raise ConfigError("block='bottom' trains the last of the kept components: set beta below alpha, and do not set rank")
        if self.core == "sparse" and self.beta not in (None, largest_beta):
            raise ConfigError("core='sparse' trains entries between all kept components: do not set beta")
        if self.core == "sparse" and self.sparse_pattern == "top_k":
            self._check_top_k()
        if self.core != "sparse" and (self.off_diagonals or self.sparse_pattern != "banded"):
            warnings.warn("sparse_pattern and off_diagonals are ignored without core='sparse'", stacklevel=3)
        if self.rank is not None and self.beta is not None:
            warnings.warn("beta is ignored: rank fixes both the kept and the trained components", stacklevel=3)
        if self.residual == "keep" and self.unprofitable == "skip":
            raise ConfigError(
                "residual='keep' keeps the whole weight, so unprofitable='skip' would skip every layer: drop one of them"
            )
        if self.memory_budget is not None:
            self._check_budget()

    def _check_top_k(self):
        # SVFT computes the alignment of two vectors from complete, square bases; it does not define it for truncated ones.
        truncating = {name: getattr(self, name) for name in ("rank", "memory_budget") if getattr(self, name) is not None}
        if self.alpha < 1:
            truncating["alpha"] = self.alpha
        if truncating:
            listing = ", ".join(f"{name} = {value}" for name, value in truncating.items())
            raise ConfigError(
                f"sparse_pattern='top_k' needs all components of every layer, expected only alpha = 1, found {listing}: set "
                "alpha=1 without rank and memory_budget, or set sparse_pattern='banded' or 'random'"
            )

    def _check_budget(self):
        parse_bytes(self.memory_budget)
        if self.rank is not None:
            raise ConfigError(
                f"rank = {self.rank} and memory_budget = {self.memory_budget} both decide what is kept: leave one out"
            )
        if self.residual == "keep":
            raise ConfigError("memory_budget decides what is dropped, but residual='keep' drops nothing: leave one of them out")
        if self.alpha != CersaConfig.alpha:
            warnings.warn("alpha is ignored: memory_budget decides how much is kept", stacklevel=4)

    @property
    def needs_all_layers(self) -> bool:
        """Whether the ranks of a layer also depend on other layers, so that the spectra of all of them come first."""
        return self.memory_budget is not None or (self.uniform_blocks and self.rank is None)

    def rounded_rank(self, rank: int, full_rank: int) -> int:
        """A rank rounded up to a multiple of `rank_multiple`, but at most `full_rank`."""
        return min(math.ceil(rank / self.rank_multiple) * self.rank_multiple, full_rank)

    def kept_rank(self, singular_values: Tensor) -> int:
        """The number k of kept components for a spectrum (p,), descending (Eq. 2, rounded up).

        Raises:
            ConfigError: a memory budget is set, which cannot be applied to one layer alone (see `choose_ranks`).
        """
        if self.memory_budget is not None:
            raise ConfigError(f"memory_budget = {self.memory_budget} applies to all layers together: use choose_ranks")
        full_rank = len(singular_values)
        if self.rank is not None:
            return min(self.rank, full_rank)
        return self.rounded_rank(energy_rank(singular_values, self.alpha), full_rank)

    def core_rank(self, singular_values: Tensor, kept_rank: int) -> int:
        """The number r of trained components among the k kept ones, for a spectrum (p,), descending (Eq. 2, rounded up)."""
        if self.beta is None or self.rank is not None:
            return kept_rank
        return self.rounded_rank(energy_rank(singular_values, self.beta), kept_rank)

    def layer_ranks(self, singular_values: Tensor) -> LayerRanks:
        """k and r for a spectrum (p,), descending, of a layer that shares them with no other; raises as `kept_rank`."""
        kept = self.kept_rank(singular_values)
        return LayerRanks(kept, self.core_rank(singular_values, kept))

    def to_dict(self) -> dict:
        """The settings as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CersaConfig":
        """The inverse of `to_dict`; raises ConfigError for a setting that this version does not know.

        Settings without `rank_multiple`, as the headers of files from before it have them, mean ranks that are not rounded.
        """
        unknown = set(values) - {setting.name for setting in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown CERSA settings {sorted(unknown)}: was this written by a newer version?")
        return cls(**{"rank_multiple": 1} | values)


_CHOICES = {setting.name: get_args(setting.type) for setting in fields(CersaConfig) if get_origin(setting.type) is Literal}


def svfit_config(rank: int = 768, **settings) -> CersaConfig:
    """SVFit (Sun et al., arXiv 2409.05926): trains the top singular values and leaves everything else as it is.

    Args:
        rank: number of trained singular values; a layer that has fewer trains all. The CERSA paper compares with 768.
        settings: further settings of `CersaConfig` (target_modules, exclude_modules).
    """
    return CersaConfig(rank=rank, rank_multiple=1, core="diagonal", residual="keep", **settings)


def svft_config(pattern: Literal["banded", "random", "top_k"] = "banded", off_diagonals: int = 0, **settings) -> CersaConfig:
    """SVFT (Lingam et al., arXiv 2405.19597): trains a few entries of the whole singular-value matrix, multiplied by a gate.

    Args:
        pattern: which entries are trained; "banded" without off-diagonals is SVFT-plain.
        off_diagonals: their number on each side of the diagonal; the other patterns train as many entries as the banded one.
        settings: further settings of `CersaConfig` (target_modules, exclude_modules).
    """
    return CersaConfig(alpha=1.0, rank_multiple=1, core="sparse", sparse_pattern=pattern, off_diagonals=off_diagonals, **settings)
