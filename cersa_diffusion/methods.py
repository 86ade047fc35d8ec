"""What the fine-tuning methods do to one model. Loading the model, training and saving it are left to the entry points."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from cersa_diffusion.baselines import svfit_config, svft_config
from cersa_diffusion.config import CersaConfig, LayerRanks
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.inject import InjectionReport, inject_cersa, match_targets
from cersa_diffusion.lora_files import add_lora

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


class Adaptation(ABC):
    """One way to fine-tune given linear layers of one model."""

    # Whether the frozen weights may be kept in 16 bit under mixed precision.
    frozen_in_compute_dtype = True

    @abstractmethod
    def prepare(self, model: nn.Module) -> str:
        """Changes a model so that just this method's parameters are trained; returns a line that says what was done.

        Args:
            model: changed in place; all or nothing.

        Raises:
            ConfigError: the method cannot be applied to the layers that were asked for.
        """

    def cast_frozen(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Moves the frozen weights to the compute dtype, the trained ones stay float32."""
        if self.frozen_in_compute_dtype:
            # Set aside: rounded and turned back they would not be what the method began with.
            trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
            model.to(dtype=dtype)
            for parameter, data in trained.items():
                parameter.data = data.float()


class CersaAdaptation(Adaptation):
    """Cores in the basis of every target layer's weight: CERSA, and SVFit and SVFT as settings of it.

    Args:
        config: the settings, target layers included.
        ranks: what a memory budget that several models share came to (see `inject_cersa`).

    Attributes:
        report: what the injection did; None before `prepare`.
    """

    def __init__(self, config: CersaConfig, ranks: Mapping[str, LayerRanks | None] | None = None):
        self.config, self.ranks = config, ranks
        self.report: InjectionReport | None = None

    def prepare(self, model: nn.Module) -> str:
        self.report = inject_cersa(model, self.config, ranks=self.ranks)
        return str(self.report)


class LoraAdaptation(Adaptation):
    """LoRA by the peft library, under the adapter name "default".

    Args:
        target_modules: as `match_targets` takes them.
        rank: also lora_alpha, so that the scale is 1.
    """

    label, settings = "LoRA", {}

    def __init__(self, target_modules: str | list[str], rank: int):
        self.target_modules, self.rank = target_modules, rank

    def prepare(self, model: nn.Module) -> str:
        layers = match_targets(model, self.target_modules)
        self._check_layers(layers)
        # Whole names, so that these very layers are trained and no convolution of the same ending; without the prefix of the
        # text encoder's names, which not all transformers versions have (peft takes them as endings).
        names = [name.removeprefix("text_model.") for name in layers]
        model.requires_grad_(False)
        add_lora(model, LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names, **self.settings))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return f"{len(layers)} layers with {self.label} of rank {self.rank}: {trained / 1e6:.2f} M trained"

    # Only PiSSA takes its rank from the weight.
    def _check_layers(self, layers: dict[str, nn.Linear]) -> None:
        """Refuses layers that the method cannot be applied to."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained change as a LoRA of the model the user has, in peft's names without its prefix."""
        return get_peft_model_state_dict(model)

    def saved_settings(self) -> dict:
        """What differs between the settings of training and those that `weights` are loaded with."""
        return {}


class DoraAdaptation(LoraAdaptation):
    """DoRA (Liu et al., arXiv 2402.09353): LoRA on the direction of the weight, its magnitude trained beside it."""

    label, settings = "DoRA", {"use_dora": True}


class PissaAdaptation(LoraAdaptation):
    """PiSSA (Meng et al., arXiv 2404.02948): A and B start as the leading components, the base keeps the rest.

    The base that is trained on is not the one others have, so what is saved is the change, as a LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``.
    """

    label, settings = "PiSSA", {"init_lora_weights": "pissa"}

    def __init__(self, target_modules: str | list[str], rank: int):
        super().__init__(target_modules, rank)
        self._initial: dict[str, Tensor] = {}

    def _check_layers(self, layers: dict[str, nn.Linear]) -> None:
        name, smallest = min(((name, min(layer.weight.shape)) for name, layer in layers.items()), key=lambda item: item[1])
        if smallest < self.rank:
            raise ConfigError(
                f"rank is {self.rank}, but layer {name} has only {smallest} components for PiSSA to start from: "
                f"lower it to {smallest} or leave this layer out of the target modules"
            )

    def prepare(self, model: nn.Module) -> str:
        description = super().prepare(model)
        self._initial = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}
        return description

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        weights = {}
        for name, trained in get_peft_model_state_dict(model).items():
            initial = self._initial[name].to(trained)
            weights[name] = torch.cat([trained, initial]) if "lora_A" in name else torch.cat([trained, -initial], dim=1)
        return weights

    def saved_settings(self) -> dict:
        return {"r": 2 * self.rank, "lora_alpha": 2 * self.rank, "init_lora_weights": True}


class FullAdaptation(Adaptation):
    """Dense weights.

    Args:
        target_modules: the layers whose weights are trained, as `match_targets` takes them; None: all parameters of the model.
    """

    frozen_in_compute_dtype = False

    def __init__(self, target_modules: str | list[str] | None):
        self.target_modules = target_modules

    def prepare(self, model: nn.Module) -> str:
        if self.target_modules is None:
            model.requires_grad_(True)
            return f"all parameters: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M trained"
        layers = match_targets(model, self.target_modules)
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        trained = sum(layer.weight.numel() for layer in layers.values())
        return f"{len(layers)} layers, dense weights: {trained / 1e6:.2f} M trained"


LORA_FAMILY: dict[str, type[LoraAdaptation]] = {"lora": LoraAdaptation, "pissa": PissaAdaptation, "dora": DoraAdaptation}
