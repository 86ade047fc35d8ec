"""The settings of the fine-tuning methods."""

import warnings
from dataclasses import dataclass, fields
from typing import Literal

from cersa_diffusion.config import (
    OFF_DIAGONALS,
    SPARSE_SETTINGS,
    CersaConfig,
    SubspaceSettings,
    option,
    svfit_config,
    svft_config,
)
from cersa_diffusion.errors import ConfigError

CERSA_METHODS = ("cersa", "svfit", "svft")
LORA_METHODS = ("lora", "pissa", "dora")
METHOD_NAMES = (*CERSA_METHODS, *LORA_METHODS, "full")
# Option -> the methods that read it, for the options that only some methods read.
READ_BY = dict.fromkeys(
    (
        "alpha",
        "beta",
        "uniform_rank",
        "rank_multiple",
        "uniform_blocks",
        "core",
        "block",
        "unprofitable",
        "memory_budget",
    ),
    ("cersa",),
) | {
    "rank": LORA_METHODS,
    "svfit_rank": ("svfit",),
    "sparse_pattern": ("svft", "cersa"),
    "off_diagonals": ("svft", "cersa"),
}


@dataclass(kw_only=True)
class MethodSettings(SubspaceSettings):
    """The method, and the settings of all methods; the defaults are those of the comparison in the CERSA paper.

    Raises:
        ConfigError: a value is out of range, or settings contradict each other.
    """

    method: Literal["cersa", "lora", "pissa", "dora", "svfit", "svft", "full"] = option(
        "cersa", "What is trained on the target layers."
    )
    uniform_rank: int | None = option(None, "CERSA: keep and train this many components in every layer instead (Table 5).")
    rank: int = option(32, "LoRA, PiSSA, DoRA: rank (and lora_alpha, so that the scale is 1).")
    svfit_rank: int = option(768, "SVFit: number of trained singular values; in a layer with fewer, all of them are trained.")
    # The default differs from that of `CersaConfig`: with 2, SVFT trains as many parameters as in the comparison of the CERSA
    # paper (Table 14); 0 is SVFT-plain.
    off_diagonals: int = option(2, OFF_DIAGONALS)

    def __post_init__(self):
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"method is {self.method!r}, expected one of {', '.join(METHOD_NAMES)}")
        if self.memory_budget is not None and self.method != "cersa":
            raise ConfigError(f"memory_budget decides the ranks of CERSA, method {self.method!r} cannot use it: leave it out")
        for name in ("rank", "svfit_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        self._cersa_config("all-linear")
        changed = [f.name for f in fields(MethodSettings) if getattr(self, f.name) != f.default]
        ignored = [name for name in changed if self.method not in READ_BY.get(name, (self.method,))]
        if ignored:
            warnings.warn(f"method {self.method!r} ignores {', '.join(ignored)}", stacklevel=4)
        sparse = [name for name in changed if name in SPARSE_SETTINGS]
        if sparse and self.method == "cersa" and self.core != "sparse":
            warnings.warn(f"without core='sparse', {', '.join(sparse)} is ignored", stacklevel=4)

    def cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        """The CERSA settings of the method (cersa, svfit or svft) for these layers."""
        with warnings.catch_warnings():
            # The check of the settings has already given these warnings.
            warnings.simplefilter("ignore")
            return self._cersa_config(target_modules)

    def _cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        if self.method == "svfit":
            return svfit_config(self.svfit_rank, target_modules=target_modules)
        if self.method == "svft":
            return svft_config(self.sparse_pattern, self.off_diagonals, target_modules=target_modules)
        shared = {field.name: getattr(self, field.name) for field in fields(SubspaceSettings)}
        if self.core != "sparse":
            shared = {name: value for name, value in shared.items() if name not in SPARSE_SETTINGS}
        return CersaConfig(rank=self.uniform_rank, target_modules=target_modules, **shared)
