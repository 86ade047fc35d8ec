"""The training memory of every method, computed without training, in the columns of Table 14 of the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cersa_diffusion.analysis.output import Figure, check_shares, new_figure
from cersa_diffusion.config import CersaConfig, svfit_config, svft_config
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.model import check_layers, match_targets
from cersa_diffusion.memory.budget import dense_layers, untouched_bytes
from cersa_diffusion.memory.cost import FLOAT32, OPTIMIZERS, MemoryUse, full_memory, lora_memory
from cersa_diffusion.memory.plan import plan_memory

Targets = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class TableSettings:
    """The rows of the table; the defaults are those of Table 14.

    Args:
        lora_ranks: ranks of LoRA (and of PiSSA, which takes as much memory).
        svfit_rank: number of singular values that SVFit trains.
        off_diagonals: width of the band of SVFT, on each side of the diagonal.
        alphas: alphas of CERSA, with beta = alpha.
        optimizer: the optimizer whose state is counted.
        weight_dtype: compute dtype of the frozen weights; None: their own dtype.

    Raises:
        ConfigError: a value is out of range.
    """

    lora_ranks: Sequence[int] = (8, 32)
    svfit_rank: int = 768
    off_diagonals: int = 2
    alphas: Sequence[float] = (0.95, 0.92, 0.9, 0.85, 0.8)
    optimizer: str = "adamw"
    weight_dtype: torch.dtype | None = None

    def __post_init__(self):
        check_shares("alphas", self.alphas)
        if any(rank < 1 for rank in self.lora_ranks):
            raise ConfigError(f"lora_ranks is {list(self.lora_ranks)}, expected at least 1 each")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}, expected one of {sorted(OPTIMIZERS)}")


def memory_rows(
    components: Mapping[str, nn.Module], targets: Targets, settings: TableSettings | None = None, *, show_progress: bool = True
) -> list[dict]:
    """A row for every method, in bytes, without activations and data, as in the paper.

    Args:
        components: component name -> dense model; the models are not changed.
        targets: component name -> target layers, as `match_targets` takes them.
        settings: the rows of the table.
        show_progress: show a progress bar while layers are decomposed.

    Returns:
        Rows with "method", "trainable" (numbers), "ratio" (trained share of the bytes of the weights), "weights", "optimizer",
        "gradients" and "total" (bytes). "full" trains every parameter, "full, target layers" only the weights of these layers.

    Raises:
        ConfigError: no layer matches, or a target cannot be decomposed.
        NonFiniteError: a weight holds NaN or infinity.
    """
    settings = settings or TableSettings()
    matched = {component: match_targets(model, targets[component]) for component, model in components.items()}
    for component, model in components.items():
        check_layers(model, matched[component])
    linears = {f"{component}.{name}": layer for component, layers in matched.items() for name, layer in layers.items()}
    uses = {"full": _full_use(components, settings.optimizer)} | _dense_methods(components, linears, settings)
    # SVFT is first because it keeps all components: the other methods then find the decompositions in the cache.
    configs = {f"SVFT d={settings.off_diagonals}": svft_config("banded", settings.off_diagonals)}
    configs[f"SVFit r={settings.svfit_rank}"] = svfit_config(settings.svfit_rank)
    # The paper does not round its ranks.
    configs |= {f"CERSA alpha={alpha:g}": CersaConfig(alpha=alpha, rank_multiple=1) for alpha in settings.alphas}
    for title, config in configs.items():
        plan = plan_memory(
            components,
            {component: replace(config, target_modules=layers) for component, layers in targets.items()},
            optimizer=settings.optimizer,
            weight_dtype=settings.weight_dtype,
            show_progress=show_progress,
        )
        uses[title] = plan.totals()["whole_model"]["cersa"]
    return [_row(method, use) for method, use in uses.items()]


def _full_use(components: Mapping[str, nn.Module], optimizer: str) -> MemoryUse:
    # By id, because models may share tensors.
    parameters = {id(parameter): parameter for model in components.values() for parameter in model.parameters()}.values()
    buffers = {id(buffer): buffer for model in components.values() for buffer in model.buffers()}.values()
    numbers = sum(parameter.numel() for parameter in parameters)
    return MemoryUse(
        frozen=sum(buffer.numel() * buffer.element_size() for buffer in buffers),
        trained=numbers * FLOAT32,
        gradients=numbers * FLOAT32,
        optimizer=sum(OPTIMIZERS[optimizer](*parameter.shape) for parameter in parameters),
    )


def _dense_methods(
    components: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], settings: TableSettings
) -> dict[str, MemoryUse]:
    layers, modules = dense_layers(components, linears, settings.weight_dtype, None).values(), list(linears.values())
    untouched, untouched_full = (
        sum(untouched_bytes(components, modules, dtype).values()) for dtype in (settings.weight_dtype, torch.float32)
    )
    full = sum((full_memory(layer, settings.optimizer) for layer in layers), MemoryUse(untouched_full))
    lora = {
        f"LoRA r={rank}": sum((lora_memory(layer, rank, settings.optimizer) for layer in layers), MemoryUse(untouched))
        for rank in settings.lora_ranks
    }
    return {"full, target layers": full} | lora


def _row(method: str, use: MemoryUse) -> dict:
    weights = use.frozen + use.trained
    sizes = {"weights": weights, "optimizer": use.optimizer, "gradients": use.gradients, "total": use.total}
    return {"method": method, "trainable": use.trained // FLOAT32, "ratio": use.trained / weights} | sizes


def in_columns_of_the_paper(rows: Sequence[Mapping]) -> list[dict]:
    """The rows in the form of Table 14: numbers in millions, ratio in percent, sizes in MB, which in the paper are 2^20 bytes."""
    sizes = {"Weights": "weights", "Optimizer State": "optimizer", "Gradient": "gradients", "Total": "total"}
    return [
        {"Method": row["method"], "Trainable Parameter (M)": row["trainable"] / 1e6, "Trainable Ratio (%)": 100 * row["ratio"]}
        | {f"{title} Memory (MB)": row[name] / 2**20 for title, name in sizes.items()}
        for row in rows
    ]


def draw_memory(rows: Sequence[Mapping]) -> Figure:
    """A bar for every method, made of weights, gradients and optimizer state (CERSA, Fig. 1)."""
    figure, [axes] = new_figure(9, 1 + 0.4 * len(rows))
    left, names = [0.0] * len(rows), [row["method"] for row in rows]
    for name, title in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer state")):
        sizes = [row[name] / 2**20 for row in rows]
        axes.barh(names, sizes, left=left, label=title)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for number, total in enumerate(left):
        axes.text(total, number, f" {total:.1f}", va="center", fontsize=8)
    axes.set(xlabel="MiB", title="memory of training, without activations", xlim=(0, 1.12 * max(left)))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return figure
