"""The memory plan: how much memory CERSA, LoRA and full fine-tuning of the same layers need, computed before any training."""

import statistics
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from cersa_diffusion.config import CersaConfig, LayerRanks, parse_bytes
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import kept_energy
from cersa_diffusion.layers.model import check_layers, components_of, match_targets
from cersa_diffusion.memory.budget import TargetLayer, select_ranks, untouched_bytes
from cersa_diffusion.memory.cost import OPTIMIZERS, LayerInput, MemoryUse, cersa_memory, full_memory, is_profitable, lora_memory
from cersa_diffusion.memory.tables import render_plan

METHODS = ("cersa", "lora", "full")


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one target layer.

    Args:
        name: "component.layer name".
        kind: see `layer_kind`.
        out_features, in_features: m and n.
        kept_rank: k; the full rank if the layer stays dense.
        core_rank: r; 0 if the layer stays dense.
        kept_energy: share of squared-singular-value energy that CERSA keeps, i.e. the alpha that corresponds to k.
        unprofitable: factors and core hold at least as many numbers as the dense weight.
        factored: False if CERSA leaves the layer dense and frozen for that reason (`unprofitable="skip"`).
        memory: method ("cersa", "lora", "full") -> memory.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    kept_rank: int
    core_rank: int
    kept_energy: float
    unprofitable: bool
    factored: bool
    memory: dict[str, MemoryUse]

    @property
    def component(self) -> str:
        """The component that the layer belongs to."""
        return self.name.partition(".")[0]

    def to_dict(self) -> dict:
        """The row as plain values for JSON."""
        return asdict(self) | {"memory": {method: use.to_dict() for method, use in self.memory.items()}}


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of three methods on the same layers; ``str()`` is a table.

    Args:
        layers: one row per target layer, in model order.
        untouched: method -> bytes of all other parameters and buffers.
        lora_rank: rank of LoRA.
        optimizer: a key of `OPTIMIZERS`.
        weight_dtype: the compute dtype; None: the dtype of the model.
        activations_counted: whether the rows of input are known; without them activations are zero.
        memory_budget: the budget in bytes for "cersa" in the whole model if it decided the ranks, else None.
        spectra: layer name -> all singular values, for plots.
    """

    layers: list[LayerPlan]
    untouched: dict[str, int]
    lora_rank: int
    optimizer: str
    weight_dtype: torch.dtype | None
    activations_counted: bool
    memory_budget: int | None
    spectra: dict[str, Tensor] = field(repr=False, compare=False)

    def totals(self) -> dict[str, dict[str, MemoryUse]]:
        """Memory by method of the "target_layers" and of the "whole_model", which includes what no method changes."""
        targets = {method: sum((layer.memory[method] for layer in self.layers), MemoryUse()) for method in METHODS}
        whole = {method: use + MemoryUse(frozen=self.untouched[method]) for method, use in targets.items()}
        return {"target_layers": targets, "whole_model": whole}

    def by_kind(self) -> dict[str, list[LayerPlan]]:
        """The layers of each kind: "component kind" -> layers."""
        layers_by_kind: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            layers_by_kind.setdefault(f"{layer.component} {layer.kind}", []).append(layer)
        return layers_by_kind

    def alpha_by_kind(self) -> dict[str, dict[str, float]]:
        """The shares of energy that CERSA keeps in the layers of each kind: "mean", "lowest" and "highest"."""
        shares_by_kind = {kind: [layer.kept_energy for layer in layers] for kind, layers in self.by_kind().items()}
        return {
            kind: {"mean": statistics.fmean(shares), "lowest": min(shares), "highest": max(shares)}
            for kind, shares in shares_by_kind.items()
        }

    def to_dict(self) -> dict:
        """The plan as plain values for JSON, all sizes in bytes."""
        return {
            "lora_rank": self.lora_rank,
            "optimizer": self.optimizer,
            "weight_dtype": self.dtype_name,
            "activations_counted": self.activations_counted,
            "memory_budget": self.memory_budget,
            "alpha_by_kind": self.alpha_by_kind(),
            "layers": [layer.to_dict() for layer in self.layers],
            "untouched": self.untouched,
            "totals": {part: {name: use.to_dict() for name, use in uses.items()} for part, uses in self.totals().items()},
        }

    @property
    def dtype_name(self) -> str:
        """The name of the compute dtype."""
        return "as loaded" if self.weight_dtype is None else str(self.weight_dtype).removeprefix("torch.")

    def to_markdown(self) -> str:
        """The tables in GitHub-flavoured Markdown."""
        return render_plan(self, markdown=True)

    def __str__(self) -> str:
        return render_plan(self, markdown=False)


def layer_kind(name: str) -> str:
    """The kind of a layer: the last part of its name, or the last two if the last one is a number ("to_q", "to_out.0")."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def plan_memory(
    model: nn.Module | Mapping[str, nn.Module],
    config: CersaConfig | Mapping[str, CersaConfig],
    *,
    lora_rank: int = 32,
    optimizer: str = "adamw",
    weight_dtype: torch.dtype | None = None,
    tokens: Mapping[str, LayerInput] | None = None,
    show_progress: bool = True,
) -> MemoryPlan:
    """Computes, before any training, how much memory CERSA, LoRA and full fine-tuning of the same layers need.

    The model is not changed. The on-disk cache keeps the decompositions for a later injection.

    Args:
        model: any dense torch model, or the components of a pipeline by name.
        config: settings for all components, or by component.
        lora_rank: rank of LoRA.
        optimizer: "adamw", "adamw8bit", "adafactor" or "sgd" (see `OPTIMIZERS`).
        weight_dtype: compute dtype of training; None: the current dtype of each layer.
        tokens: "component.layer name" -> input of the layer in one step (see `count_tokens`); None: activations are not counted.
        show_progress: show a bar while layers are decomposed.

    Raises:
        ConfigError: a setting is unknown, `config` has other components than the model, or a target layer has no entry in
            `tokens` or cannot be decomposed, or a model with `uniform_blocks` does not name its repeated blocks.
        NonFiniteError: NaN or infinity in a weight.
    """
    if lora_rank < 1:
        raise ConfigError(f"lora_rank is {lora_rank}, expected at least 1")
    components, targets = _targets(model, config, optimizer)
    selected = select_ranks(
        components, targets, optimizer=optimizer, weight_dtype=weight_dtype, tokens=tokens, show_progress=show_progress
    )
    linears, budget = [linear for linear, _ in targets.values()], selected[0][0].config.memory_budget
    frozen, full = (sum(untouched_bytes(components, linears, dtype).values()) for dtype in (weight_dtype, torch.float32))
    return MemoryPlan(
        layers=[_layer_plan(layer, ranks, lora_rank, optimizer) for layer, ranks in selected],
        untouched={"cersa": frozen, "lora": frozen, "full": full},
        lora_rank=lora_rank,
        optimizer=optimizer,
        weight_dtype=weight_dtype,
        activations_counted=tokens is not None,
        memory_budget=None if budget is None else parse_bytes(budget),
        spectra={layer.name: layer.spectrum for layer, _ in selected},
    )


def choose_ranks(
    model: nn.Module | Mapping[str, nn.Module],
    config: CersaConfig | Mapping[str, CersaConfig],
    *,
    optimizer: str = "adamw",
    weight_dtype: torch.dtype | None = None,
    tokens: Mapping[str, LayerInput] | None = None,
    also_trained: Collection[str] = (),
    show_progress: bool = True,
) -> dict[str, dict[str, LayerRanks | None]]:
    """The ranks of every layer according to the settings; the components of a pipeline share one memory budget.

    `plan_memory` with the same arguments uses the same ranks. `inject_cersa` takes those of a component:
    ``ranks=chosen[component]``.

    Args:
        model, optimizer, weight_dtype, tokens, show_progress: see `plan_memory`; the budget includes the state of the optimizer,
            and the activations if `tokens` are given.
        config: settings for all components, or by component; `memory_budget` must be the same in all of them.
        also_trained: "component.tensor name" of tensors that are trained in addition to the target layers, in float32.

    Returns:
        Component -> layer name -> ranks; None for a layer that stays dense and frozen. A single model is the component "model".

    Raises:
        ConfigError: as `plan_memory`, or the budget is too small; the message names the smallest possible budget.
        NonFiniteError: NaN or infinity in a weight.
    """
    components, targets = _targets(model, config, optimizer)
    chosen: dict[str, dict[str, LayerRanks | None]] = {component: {} for component in components}
    options = {"optimizer": optimizer, "weight_dtype": weight_dtype, "tokens": tokens, "also_trained": also_trained}
    for layer, ranks in select_ranks(components, targets, **options, show_progress=show_progress):
        component, _, name = layer.name.partition(".")
        chosen[component][name] = ranks
    return chosen


def _targets(
    model: nn.Module | Mapping[str, nn.Module], config: CersaConfig | Mapping[str, CersaConfig], optimizer: str
) -> tuple[dict[str, nn.Module], dict[str, tuple[nn.Module, CersaConfig]]]:
    """Checks the settings; returns the components, and "component.layer name" -> layer and settings."""
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {optimizer!r}, expected one of {sorted(OPTIMIZERS)}")
    components = components_of(model)
    configs = dict.fromkeys(components, config) if isinstance(config, CersaConfig) else dict(config)
    if set(configs) != set(components):
        raise ConfigError(
            f"config has settings for {sorted(configs)}, but the model has the components {sorted(components)}: "
            "pass one CersaConfig for all components, or one for each"
        )
    targets = {}
    for component, module in components.items():
        layers = match_targets(module, configs[component].target_modules, configs[component].exclude_modules)
        check_layers(module, layers)
        targets |= {f"{component}.{name}": (layer, configs[component]) for name, layer in layers.items()}
    return components, targets


def _layer_plan(layer: TargetLayer, ranks: LayerRanks | None, lora_rank: int, optimizer: str) -> LayerPlan:
    dense, config = layer.dense, layer.config
    kept, core = ranks or (layer.full_rank, 0)
    return LayerPlan(
        name=layer.name,
        kind=layer_kind(layer.name.partition(".")[2]),
        out_features=dense.out_features,
        in_features=dense.in_features,
        kept_rank=kept,
        core_rank=core,
        kept_energy=1.0 if config.residual == "keep" else kept_energy(layer.spectrum, kept),
        unprofitable=ranks is None or not is_profitable(dense.out_features, dense.in_features, ranks, config),
        factored=ranks is not None,
        memory={
            "cersa": MemoryUse(dense.dense_bytes()) if ranks is None else cersa_memory(dense, ranks, config, optimizer),
            "lora": lora_memory(dense, lora_rank, optimizer),
            "full": full_memory(dense, optimizer),
        },
    )
