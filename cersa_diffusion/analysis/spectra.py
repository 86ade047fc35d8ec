"""Where the ranks are: rank by layer and kind at several alphas (CERSA, Fig. 3), and compression against alpha (Fig. 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cersa_diffusion.analysis.kinds import paper_kind, targets_by_component
from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank
from cersa_diffusion.memory.plan import MemoryPlan, plan_memory
from cersa_diffusion.memory.plot import PLOTTED_ALPHAS, compression_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_ALPHAS = tuple(round(0.80 + 0.01 * step, 2) for step in range(16))


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of a layer.

    Attributes:
        name: "component.layer name".
        kind: what the paper calls it, behind its component where there are several.
        depth: its number among the layers of its kind.
        out_features: m.
        in_features: n.
        values: (p,) float64, descending.
    """

    name: str
    kind: str
    depth: int
    out_features: int
    in_features: int
    values: Tensor


def layer_spectra(
    components: Mapping[str, nn.Module],
    target_modules: list[str] | None = None,
    *,
    default: str = "all",
    show_progress: bool = True,
) -> list[LayerSpectrum]:
    """Decomposes the target layers, through the on-disk cache.

    Args:
        components: the models by name, dense.
        target_modules, default: as `cersa_diffusion.analysis.kinds.targets_by_component`.
        show_progress: show a bar with layer names.

    Raises:
        ConfigError: nothing matches, or a target cannot be decomposed.
        NonFiniteError: NaN or infinity in a weight.
    """
    plan = _plan(components, target_modules, default, show_progress)
    spectra, seen = [], {}
    for layer in plan.layers:
        component, _, own = layer.name.partition(".")
        kind = paper_kind(own, components[component])
        kind = kind if len(components) == 1 else f"{component} {kind}"
        seen[kind] = seen.get(kind, -1) + 1
        values = plan.spectra[layer.name]
        spectra.append(LayerSpectrum(layer.name, kind, seen[kind], layer.out_features, layer.in_features, values))
    return spectra


def _plan(components: Mapping[str, nn.Module], target_modules: list[str] | None, default: str, progress: bool) -> MemoryPlan:
    targets = targets_by_component(components, target_modules, default)
    configs = {name: CersaConfig(target_modules=own) for name, own in targets.items()}
    return plan_memory(components, configs, show_progress=progress)


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises ConfigError for an energy share outside (0, 1]."""
    wrong = [alpha for alpha in alphas if not 0 < alpha <= 1]
    if wrong or not alphas:
        raise ConfigError(f"alphas: {wrong[0] if wrong else 'none are given'}, expected shares in (0, 1]")


def rank_rows(spectra: Sequence[LayerSpectrum], alphas: Sequence[float] = PLOTTED_ALPHAS) -> list[dict]:
    """A row for every layer and alpha: the rank k that keeps this share of the energy, and k over the full rank.

    Args:
        spectra: of `layer_spectra`.
        alphas: shares of the energy.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    check_alphas(alphas)
    rows = []
    for layer in spectra:
        for alpha in alphas:
            rank, full = energy_rank(layer.values, alpha), len(layer.values)
            shape = {"m": layer.out_features, "n": layer.in_features}
            place = {"layer": layer.name, "kind": layer.kind, "depth": layer.depth}
            rows.append(place | shape | {"alpha": alpha, "rank": rank, "share": rank / full})
    return rows


def draw_ranks(rows: Sequence[Mapping]) -> "Figure":
    """A panel for every kind of layer, in it a curve for every alpha over the depth (CERSA, Fig. 3)."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    alphas = sorted({row["alpha"] for row in rows}, reverse=True)
    columns = min(6, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = new_figure(1.5 + 3 * columns, 0.8 + 2.8 * lines, "components that keep a share alpha of the energy")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for panel, kind in zip(panels, kinds, strict=False):
        for number, alpha in enumerate(alphas):
            own = [row for row in rows if row["kind"] == kind and row["alpha"] == alpha]
            panel.plot(
                [row["depth"] for row in own], [row["rank"] for row in own], marker=".", color=f"C{number}", label=f"{alpha:g}"
            )
        full = max(min(row["m"], row["n"]) for row in rows if row["kind"] == kind)
        panel.axhline(full, color="gray", linestyle=":")
        panel.set(title=kind, xlabel="layer")
        panel.set_xlim(-0.5, max(row["depth"] for row in rows if row["kind"] == kind) + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(kinds) :]:
        panel.axis("off")
    # After all curves: the axis is shared.
    panels[0].set_ylim(bottom=0)
    for line in range(lines):
        panels[line * columns].set_ylabel("rank (dotted: full)")
    figure.legend(*panels[0].get_legend_handles_labels(), title="alpha", loc="outside right center")
    return figure


def compression_rows(
    name: str, spectra: Sequence[LayerSpectrum], alphas: Sequence[float] = CURVE_ALPHAS, lora_rank: int = 32
) -> list[dict]:
    """Training memory in numbers over that of the dense weights, ``c = sum(m r + n r + 4 r^2) / sum(m n)`` (section 3.4).

    Args:
        name: what the curve is called.
        spectra: the layers that are trained.
        alphas: shares of the energy, beta = alpha.
        lora_rank: of the LoRA on the same layers that the rows are compared with, ``c = 1 + 4 r sum(m + n) / sum(m n)``.

    Raises:
        ConfigError: a share outside (0, 1], or a rank below 1.
    """
    check_alphas(alphas)
    if lora_rank < 1:
        raise ConfigError(f"lora_rank is {lora_rank}, expected at least 1")
    dense = sum(layer.out_features * layer.in_features for layer in spectra)
    lora = 1 + 4 * lora_rank * sum(layer.out_features + layer.in_features for layer in spectra) / dense
    return [
        {
            "model": name,
            "layers": len(spectra),
            "alpha": alpha,
            "compression": compression_rate(spectra, [energy_rank(layer.values, alpha) for layer in spectra]),
            "lora": lora,
        }
        for alpha in alphas
    ]


def draw_compression(rows: Sequence[Mapping], lora_rank: int) -> "Figure":
    """A curve for every model and set of layers, LoRA dashed in the same colour (CERSA, Fig. 7)."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = sorted((row for row in rows if row["model"] == name), key=lambda row: row["alpha"])
        axes.plot([row["alpha"] for row in own], [row["compression"] for row in own], color=f"C{number}", label=name)
        axes.axhline(own[0]["lora"], color=f"C{number}", linestyle="--", label=f"{name}, LoRA r={lora_rank}")
    axes.axhline(1, color="gray", linestyle=":", label="dense weights alone")
    axes.set(xlabel="alpha = beta", ylabel="c", title="weights, gradients and optimizer state over the dense weights")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
