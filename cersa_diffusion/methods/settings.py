"""What the fine-tuning methods do to one model. Loading the model, training and saving it are left to the entry points."""

import warnings
from dataclasses import dataclass, field, fields
from typing import Literal

from cersa_diffusion.config import CersaConfig, svfit_config, svft_config
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.methods.adaptations import LORA_FAMILY, Adaptation, CersaAdaptation, FullAdaptation

CERSA_METHODS = ("cersa", "svfit", "svft")
LORA_METHODS = ("lora", "pissa", "dora")
METHOD_NAMES = (*CERSA_METHODS, *LORA_METHODS, "full")
# Options that not all methods read, with those that do.
READ_BY = dict.fromkeys(("alpha", "beta", "uniform_rank", "core", "block", "unprofitable", "memory_budget"), ("cersa",)) | {
    "rank": LORA_METHODS,
    "svfit_rank": ("svfit",),
    "sparse_pattern": ("svft", "cersa"),
    "off_diagonals": ("svft", "cersa"),
}


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _cersa_option(name: str):
    source = next(f for f in fields(CersaConfig) if f.name == name)
    return field(default=source.default, metadata=source.metadata)


@dataclass(kw_only=True)
class MethodSettings:
    """Which method, and the settings of all of them; the defaults are those of the CERSA paper's comparison.

    Raises:
        ConfigError: a value out of range, or settings that contradict each other.
    """

    method: Literal["cersa", "lora", "pissa", "dora", "svfit", "svft", "full"] = _option(
        "cersa", "What is trained on the layers that are addressed."
    )
    alpha: float = _cersa_option("alpha")
    beta: float | None = _cersa_option("beta")
    uniform_rank: int | None = _option(None, "CERSA: keep and train this many components in every layer instead (Table 5).")
    core: Literal["matrix", "diagonal", "sparse"] = _cersa_option("core")
    block: Literal["top", "bottom"] = _cersa_option("block")
    unprofitable: Literal["factor", "skip"] = _cersa_option("unprofitable")
    memory_budget: str | None = _cersa_option("memory_budget")
    rank: int = _option(32, "LoRA, PiSSA, DoRA: rank (and lora_alpha, so that the scale is 1).")
    svfit_rank: int = _option(768, "SVFit: singular values that are trained; all of a layer that has fewer.")
    sparse_pattern: Literal["banded", "random", "top_k"] = _option(
        "banded", "SVFT (and core='sparse'): which entries are trained; 'top_k' takes alpha 1."
    )
    off_diagonals: int = _option(
        2,
        "SVFT (and core='sparse'): off-diagonals on either side; the other patterns train as many entries as the banded one "
        "would. 2 comes to the trained parameters of the CERSA paper's comparison (Table 14), 0 is SVFT-plain.",
    )

    def __post_init__(self):
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"method is {self.method!r}, expected one of {', '.join(METHOD_NAMES)}")
        if self.memory_budget is not None and self.method != "cersa":
            raise ConfigError(f"memory_budget chooses what CERSA keeps: method {self.method!r} takes the memory it takes")
        for name in ("rank", "svfit_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        self._cersa_config("all-linear")
        changed = [f.name for f in fields(MethodSettings) if getattr(self, f.name) != f.default]
        ignored = [name for name in changed if self.method not in READ_BY.get(name, (self.method,))]
        if ignored:
            warnings.warn(f"method {self.method!r} ignores {', '.join(ignored)}", stacklevel=4)
        sparse = [name for name in changed if name in ("sparse_pattern", "off_diagonals")]
        if sparse and self.method == "cersa" and self.core != "sparse":
            warnings.warn(f"without core='sparse', {', '.join(sparse)} is ignored", stacklevel=4)

    def cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        """The CERSA settings that the method (cersa, svfit or svft) comes to, for one set of layers."""
        with warnings.catch_warnings():
            # Said once, when the settings were checked.
            warnings.simplefilter("ignore")
            return self._cersa_config(target_modules)

    def _cersa_config(self, target_modules: str | list[str]) -> CersaConfig:
        sparse = {"sparse_pattern": self.sparse_pattern, "off_diagonals": self.off_diagonals}
        if self.method == "svfit":
            return svfit_config(self.svfit_rank, target_modules=target_modules)
        if self.method == "svft":
            return svft_config(self.sparse_pattern, self.off_diagonals, target_modules=target_modules)
        return CersaConfig(
            alpha=self.alpha,
            beta=self.beta,
            rank=self.uniform_rank,
            core=self.core,
            block=self.block,
            unprofitable=self.unprofitable,
            memory_budget=self.memory_budget,
            target_modules=target_modules,
            **(sparse if self.core == "sparse" else {}),
        )

    def adaptation(self, target_modules: str | list[str] | None) -> "Adaptation":
        """What the method does to a model.

        Args:
            target_modules: as `match_targets` takes them; None, for full fine-tuning only: every parameter.
        """
        if self.method in CERSA_METHODS:
            return CersaAdaptation(self.cersa_config(target_modules))
        if self.method in LORA_METHODS:
            return LORA_FAMILY[self.method](target_modules, self.rank)
        return FullAdaptation(target_modules)
