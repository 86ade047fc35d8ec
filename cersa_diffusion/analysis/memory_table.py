"""What every method keeps in memory while it trains a model, in the columns of the paper's Table 14, without training it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.analysis.spectra import check_alphas
from cersa_diffusion.config import CersaConfig, svfit_config, svft_config
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.layers.model import check_layers, match_targets
from cersa_diffusion.memory.budget import dense_layers, untouched_bytes
from cersa_diffusion.memory.cost import FLOAT32, OPTIMIZERS, MemoryUse, full_memory, lora_memory
from cersa_diffusion.memory.plan import plan_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Targets = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class TableSettings:
    """The rows of the table; the defaults are those of Table 14.

    Args:
        lora_ranks: of LoRA (and PiSSA, which takes the same).
        svfit_rank: singular values that SVFit trains.
        off_diagonals: of SVFT's band, on either side.
        alphas: of CERSA, beta = alpha.
        optimizer: whose state is counted.
        weight_dtype: compute dtype of the frozen weights; None: as they are.

    Raises:
        ConfigError: a value out of range.
    """

    lora_ranks: Sequence[int] = (8, 32)
    svfit_rank: int = 768
    off_diagonals: int = 2
    alphas: Sequence[float] = (0.95, 0.92, 0.9, 0.85, 0.8)
    optimizer: str = "adamw"
    weight_dtype: torch.dtype | None = None

    def __post_init__(self):
        check_alphas(self.alphas)
        if any(rank < 1 for rank in self.lora_ranks):
            raise ConfigError(f"lora_ranks is {list(self.lora_ranks)}, expected at least 1 each")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}, expected one of {sorted(OPTIMIZERS)}")


def memory_rows(
    components: Mapping[str, nn.Module], targets: Targets, settings: TableSettings | None = None, *, show_progress: bool = True
) -> list[dict]:
    """A row for every method, in bytes; activations and the data are left out, as in the paper.

    Args:
        components: the models by name, dense; left as they are.
        targets: component -> the layers that are trained, as `match_targets` takes them.
        settings: which rows.
        show_progress: show a bar while layers are decomposed.

    Returns:
        Rows with "method", "trainable" (numbers), "ratio" (share of the weights' bytes that is trained), "weights",
        "optimizer", "gradients" and "total" (bytes). "full" trains every parameter, "full, target layers" only their weights.

    Raises:
        ConfigError: nothing matches, or a target cannot be decomposed.
        NonFiniteError: NaN or infinity in a weight.
    """
    settings = settings or TableSettings()
    linears = {
        f"{component}.{name}": layer
        for component, model in components.items()
        for name, layer in match_targets(model, targets[component]).items()
    }
    for component, model in components.items():
        check_layers(
            model, {name.partition(".")[2]: layer for name, layer in linears.items() if name.startswith(f"{component}.")}
        )
    uses = {"full": _everything(components, settings.optimizer)}
    uses |= _dense_methods(components, linears, settings)
    # SVFT keeps everything: from its decompositions in the cache the others are cut.
    bases = {f"SVFT d={settings.off_diagonals}": lambda own: svft_config("banded", settings.off_diagonals, target_modules=own)}
    bases[f"SVFit r={settings.svfit_rank}"] = lambda own: svfit_config(settings.svfit_rank, target_modules=own)
    for alpha in settings.alphas:
        bases[f"CERSA alpha={alpha:g}"] = lambda own, alpha=alpha: CersaConfig(alpha=alpha, target_modules=own)
    for title, config in bases.items():
        plan = plan_memory(
            components,
            {name: config(own) for name, own in targets.items()},
            optimizer=settings.optimizer,
            weight_dtype=settings.weight_dtype,
            show_progress=show_progress,
        )
        uses[title] = plan.totals()["whole_model"]["cersa"]
    return [_row(method, use) for method, use in uses.items()]


def _everything(components: Mapping[str, nn.Module], optimizer: str) -> MemoryUse:
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
    layers, own = dense_layers(linears, settings.weight_dtype, None).values(), list(linears.values())
    untouched, untouched_full = (
        sum(untouched_bytes(components, own, dtype).values()) for dtype in (settings.weight_dtype, torch.float32)
    )
    full = sum((full_memory(layer, settings.optimizer) for layer in layers), MemoryUse(untouched_full))
    lora = {
        f"LoRA r={rank}": sum((lora_memory(layer, rank, settings.optimizer) for layer in layers), MemoryUse(untouched))
        for rank in settings.lora_ranks
    }
    return {"full, target layers": full} | lora


def _row(method: str, use: MemoryUse) -> dict:
    weights = use.frozen + use.trained
    return {
        "method": method,
        "trainable": use.trained // FLOAT32,
        "ratio": use.trained / weights,
        "weights": weights,
        "optimizer": use.optimizer,
        "gradients": use.gradients,
        "total": use.total,
    }


def in_columns_of_the_paper(rows: Sequence[Mapping]) -> list[dict]:
    """The rows as Table 14 has them: numbers in millions, ratio in percent, sizes in MB, by which the paper means 2^20 bytes."""
    return [
        {
            "Method": row["method"],
            "Trainable Parameter (M)": row["trainable"] / 1e6,
            "Trainable Ratio (%)": 100 * row["ratio"],
            "Weights Memory (MB)": row["weights"] / 2**20,
            "Optimizer State Memory (MB)": row["optimizer"] / 2**20,
            "Gradient Memory (MB)": row["gradients"] / 2**20,
            "Total Memory (MB)": row["total"] / 2**20,
        }
        for row in rows
    ]


def draw_memory(rows: Sequence[Mapping]) -> "Figure":
    """A bar for every method, of weights, gradients and optimizer state (CERSA, Fig. 1)."""
    figure = new_figure(9, 1 + 0.4 * len(rows))
    axes, left = figure.subplots(), [0.0] * len(rows)
    names = [row["method"] for row in rows]
    for part, title in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer state")):
        sizes = [row[part] / 2**20 for row in rows]
        axes.barh(names, sizes, left=left, label=title)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for number, total in enumerate(left):
        axes.text(total, number, f" {total:.1f}", va="center", fontsize=8)
    axes.set(xlabel="MiB", title="memory of training, without activations", xlim=(0, 1.12 * max(left)))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return figure
