"""The memory plan: what CERSA, LoRA and full fine-tuning of the same layers cost, told before any memory is spent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cersa_diffusion.adapter import components_of
from cersa_diffusion.cache import DecompositionCache, leading_factors
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.inject import check_layers, match_targets
from cersa_diffusion.memory import OPTIMIZERS, DenseLayer, MemoryUse, cersa_memory, full_memory, lora_memory, not_smaller
from cersa_diffusion.plan_report import render_plan
from cersa_diffusion.tokens import LayerInput

METHODS = ("cersa", "lora", "full")


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one target layer.

    Args:
        name: "component.layer name".
        kind: see `layer_kind`.
        out_features: m.
        in_features: n.
        kept_rank: k.
        core_rank: r.
        unprofitable: factors and core hold no fewer numbers than the dense weight.
        factored: False where CERSA leaves the layer dense and frozen for that reason (`unprofitable="skip"`).
        memory: what each method costs: "cersa", "lora", "full".
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    kept_rank: int
    core_rank: int
    unprofitable: bool
    factored: bool
    memory: dict[str, MemoryUse]

    @property
    def component(self) -> str:
        """The component of the model it belongs to."""
        return self.name.partition(".")[0]

    def to_dict(self) -> dict:
        """The row as plain values for JSON."""
        memory = {method: use.to_dict() for method, use in self.memory.items()}
        return asdict(self) | {"memory": memory}


@dataclass(frozen=True)
class MemoryPlan:
    """What three methods would cost on the same layers; ``str()`` is a table.

    Args:
        layers: one row per target layer, in model order.
        untouched: bytes of all other parameters and buffers by method.
        lora_rank: the rank that LoRA is counted with.
        optimizer: a key of `OPTIMIZERS`.
        weight_dtype: the compute dtype, or None for that of the model as it was given.
        activations_counted: whether rows of input were given; without them activations are zero.
        spectra: layer name -> all singular values, for plots.
    """

    layers: list[LayerPlan]
    untouched: dict[str, int]
    lora_rank: int
    optimizer: str
    weight_dtype: torch.dtype | None
    activations_counted: bool
    spectra: dict[str, Tensor] = field(repr=False, compare=False)

    def totals(self) -> dict[str, dict[str, MemoryUse]]:
        """Bytes by method of the "target_layers" and of the "whole_model", which adds what no method touches."""
        targets = {method: sum((layer.memory[method] for layer in self.layers), MemoryUse()) for method in METHODS}
        whole = {method: use + MemoryUse(frozen=self.untouched[method]) for method, use in targets.items()}
        return {"target_layers": targets, "whole_model": whole}

    def to_dict(self) -> dict:
        """The plan as plain values for JSON, all sizes in bytes."""
        return {
            "lora_rank": self.lora_rank,
            "optimizer": self.optimizer,
            "weight_dtype": self.dtype_name,
            "activations_counted": self.activations_counted,
            "layers": [layer.to_dict() for layer in self.layers],
            "untouched": self.untouched,
            "totals": {part: {name: use.to_dict() for name, use in uses.items()} for part, uses in self.totals().items()},
        }

    @property
    def dtype_name(self) -> str:
        """The compute dtype in words."""
        return "as loaded" if self.weight_dtype is None else str(self.weight_dtype).removeprefix("torch.")

    def to_markdown(self) -> str:
        """The tables in GitHub-flavoured Markdown."""
        return render_plan(self, markdown=True)

    def __str__(self) -> str:
        return render_plan(self, markdown=False)


def layer_kind(name: str) -> str:
    """What kind of layer a name stands for: its last part, a number together with the part before ("to_q", "to_out.0")."""
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
    """Counts, before any training, what CERSA, LoRA and full fine-tuning of the same layers keep in memory.

    The model is left as it is. Decompositions go through the on-disk cache, where a following injection finds them.

    Args:
        model: any torch model that is still dense, or the components of a pipeline by name.
        config: energy shares and targets, for all components or by component.
        lora_rank: rank of LoRA.
        optimizer: "adamw", "adamw8bit", "adafactor" or "sgd" (see `OPTIMIZERS`).
        weight_dtype: compute dtype of training; None: the dtype that each layer has.
        tokens: "component.layer name" -> what the layer is given per step (see `count_tokens`); None: activations are left out.
        show_progress: show a bar while layers are decomposed.

    Returns:
        The plan, sizes in bytes.

    Raises:
        ConfigError: a setting is unknown, components and settings differ, a target has no tokens or cannot be decomposed.
        NonFiniteError: NaN or infinity in a weight.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {optimizer!r}, expected one of {sorted(OPTIMIZERS)}")
    if lora_rank < 1:
        raise ConfigError(f"lora_rank is {lora_rank}, expected at least 1")
    components = components_of(model)
    targets = _targets(components, config)
    cache, layers, spectra, sources = DecompositionCache.default(), [], {}, set()
    bar = tqdm(targets.items(), desc="planning", unit="layer", disable=not show_progress)
    for name, (linear, own_config) in bar:
        bar.set_postfix_str(name[-40:], refresh=False)
        spectra[name] = leading_factors(linear.weight, own_config.kept_rank, cache).s
        dense = _dense_layer(name, linear, weight_dtype, tokens, sources)
        layers.append(_layer_plan(name, dense, own_config, spectra[name], lora_rank, optimizer))
    if cache:
        cache.trim()
    untouched = _untouched(components, [linear for linear, _ in targets.values()], weight_dtype)
    return MemoryPlan(layers, untouched, lora_rank, optimizer, weight_dtype, tokens is not None, spectra)


def _targets(
    components: dict[str, nn.Module], config: CersaConfig | Mapping[str, CersaConfig]
) -> dict[str, tuple[nn.Linear, CersaConfig]]:
    configs = dict.fromkeys(components, config) if isinstance(config, CersaConfig) else dict(config)
    if set(configs) != set(components):
        raise ConfigError(
            f"settings are given for {sorted(configs)}, the model has the components {sorted(components)}: "
            "give one CersaConfig for all of them, or one for each"
        )
    targets = {}
    for component, module in components.items():
        own = configs[component]
        if own.core != "matrix" or own.residual != "drop":
            raise ConfigError(
                f"{component}: core={own.core!r} with residual={own.residual!r} cannot be planned: "
                "the plan counts core='matrix' with residual='drop'"
            )
        layers = match_targets(module, own.target_modules, own.exclude_modules)
        check_layers(module, layers)
        targets |= {f"{component}.{name}": (layer, own) for name, layer in layers.items()}
    return targets


def _dense_layer(
    name: str,
    linear: nn.Linear,
    weight_dtype: torch.dtype | None,
    tokens: Mapping[str, LayerInput] | None,
    sources: set[int],
) -> DenseLayer:
    """`sources` holds the inputs that earlier target layers keep, and is added to."""
    if tokens is not None and name not in tokens:
        raise ConfigError(f"tokens says nothing about layer {name}: count them with count_tokens, or add it (0 rows: not run)")
    given = LayerInput(0) if tokens is None else tokens[name]
    input_kept = given.source is not None and given.source in sources
    sources.add(given.source)
    dtype = weight_dtype or linear.weight.dtype
    return DenseLayer(*linear.weight.shape, linear.bias is not None, dtype, given.rows, input_kept)


def _layer_plan(name: str, dense: DenseLayer, config: CersaConfig, spectrum: Tensor, lora_rank: int, optimizer: str) -> LayerPlan:
    kept_rank, core_rank = config.kept_rank(spectrum), config.core_rank(spectrum)
    unprofitable = not_smaller(dense, kept_rank, core_rank)
    factored = not (unprofitable and config.unprofitable == "skip")
    memory = {
        "cersa": cersa_memory(dense, kept_rank, core_rank, optimizer) if factored else MemoryUse(dense.dense_bytes()),
        "lora": lora_memory(dense, lora_rank, optimizer),
        "full": full_memory(dense, optimizer),
    }
    kind = layer_kind(name.partition(".")[2])
    return LayerPlan(name, kind, dense.out_features, dense.in_features, kept_rank, core_rank, unprofitable, factored, memory)


def _untouched(components: dict[str, nn.Module], targets: list[nn.Linear], weight_dtype: torch.dtype | None) -> dict[str, int]:
    counted = {id(tensor) for layer in targets for tensor in layer.parameters()}
    tensors = {id(t): t for module in components.values() for t in [*module.parameters(), *module.buffers()]}
    others = [tensor for key, tensor in tensors.items() if key not in counted]

    def size(tensor: Tensor, dtype: torch.dtype | None) -> int:
        return tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize

    frozen = sum(size(tensor, weight_dtype) for tensor in others)
    return {"cersa": frozen, "lora": frozen, "full": sum(size(tensor, torch.float32) for tensor in others)}
