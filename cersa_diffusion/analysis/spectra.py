"""Rank of every layer at several alphas (CERSA, Fig. 3), and compression against alpha (Fig. 7)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from torch import Tensor, nn

from cersa_diffusion.analysis.kinds import paper_kind, targets_by_component
from cersa_diffusion.analysis.output import Figure, check_shares, grouped, new_figure
from cersa_diffusion.config import CersaConfig
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import energy_rank
from cersa_diffusion.memory.plan import plan_memory
from cersa_diffusion.memory.plot import PLOTTED_ALPHAS, compression_rate

CURVE_ALPHAS = tuple(round(0.80 + 0.01 * step, 2) for step in range(16))


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of a layer.

    Attributes:
        name: "component.layer name".
        kind: name of the layer in the paper; with several components, "component kind".
        depth: number of the layer among the layers of its kind, from 0.
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
    """Decomposes the target layers, using the on-disk cache.

    Args:
        components: component name -> dense model.
        target_modules, default: as in `cersa_diffusion.analysis.kinds.targets_by_component`.
        show_progress: show a progress bar with layer names.

    Raises:
        ConfigError: no layer matches, or a target cannot be decomposed.
        NonFiniteError: a weight holds NaN or infinity.
    """
    targets = targets_by_component(components, target_modules, default)
    configs = {component: CersaConfig(target_modules=layers) for component, layers in targets.items()}
    plan = plan_memory(components, configs, show_progress=show_progress)
    spectra, depths = [], Counter()
    for layer in plan.layers:
        component, _, name = layer.name.partition(".")
        kind = paper_kind(name, components[component])
        kind = kind if len(components) == 1 else f"{component} {kind}"
        values = plan.spectra[layer.name]
        spectra.append(LayerSpectrum(layer.name, kind, depths[kind], layer.out_features, layer.in_features, values))
        depths[kind] += 1
    return spectra


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises ConfigError if there are no alphas or one of them lies outside (0, 1]."""
    check_shares("alphas", alphas)


def rank_rows(spectra: Sequence[LayerSpectrum], alphas: Sequence[float] = PLOTTED_ALPHAS) -> list[dict]:
    """A row for every layer and alpha: the rank k that keeps this share of the energy, and k divided by the full rank.

    Args:
        spectra: what `layer_spectra` returned.
        alphas: shares of the energy.

    Raises:
        ConfigError: a share lies outside (0, 1].
    """
    check_alphas(alphas)
    rows = []
    for layer in spectra:
        for alpha in alphas:
            rank, full = energy_rank(layer.values, alpha), len(layer.values)
            layer_columns = {"layer": layer.name, "kind": layer.kind, "depth": layer.depth}
            shape = {"m": layer.out_features, "n": layer.in_features}
            rows.append(layer_columns | shape | {"alpha": alpha, "rank": rank, "share": rank / full})
    return rows


def draw_ranks(rows: Sequence[Mapping]) -> Figure:
    """A panel for every kind of layer with a curve of the rank against the depth for every alpha (CERSA, Fig. 3)."""
    by_kind, by_curve = grouped(rows, itemgetter("kind")), grouped(rows, itemgetter("kind", "alpha"))
    alphas = sorted({row["alpha"] for row in rows}, reverse=True)
    columns = min(6, len(by_kind))
    lines = -(-len(by_kind) // columns)
    size, title = (1.5 + 3 * columns, 0.8 + 2.8 * lines), "components that keep a share alpha of the energy"
    figure, panels = new_figure(*size, title, lines=lines, columns=columns, sharey=True)
    for panel, (kind, of_kind) in zip(panels, by_kind.items(), strict=False):
        for number, alpha in enumerate(alphas):
            depths, ranks = zip(*((row["depth"], row["rank"]) for row in by_curve[kind, alpha]), strict=True)
            panel.plot(depths, ranks, marker=".", color=f"C{number}", label=f"{alpha:g}")
        panel.axhline(max(min(row["m"], row["n"]) for row in of_kind), color="gray", linestyle=":")
        panel.set(title=kind, xlabel="layer")
        panel.set_xlim(-0.5, max(row["depth"] for row in of_kind) + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(by_kind) :]:
        panel.axis("off")
    # Set after all curves are drawn, because the panels share this axis.
    panels[0].set_ylim(bottom=0)
    for panel in panels[::columns]:
        panel.set_ylabel("rank (dotted: full)")
    figure.legend(*panels[0].get_legend_handles_labels(), title="alpha", loc="outside right center")
    return figure


def compression_rows(
    name: str, spectra: Sequence[LayerSpectrum], alphas: Sequence[float] = CURVE_ALPHAS, lora_rank: int = 32
) -> list[dict]:
    """Training memory in numbers divided by that of the dense weights, ``c = sum(m r + n r + 4 r^2) / sum(m n)`` (section 3.4).

    Args:
        name: name of the curve.
        spectra: the trained layers.
        alphas: shares of the energy, with beta = alpha.
        lora_rank: rank of a LoRA on the same layers for comparison, ``c = 1 + 4 r sum(m + n) / sum(m n)``.

    Raises:
        ConfigError: a share lies outside (0, 1], or the rank is below 1.
    """
    check_alphas(alphas)
    if lora_rank < 1:
        raise ConfigError(f"lora_rank is {lora_rank}, expected at least 1")
    dense = sum(layer.out_features * layer.in_features for layer in spectra)
    lora = 1 + 4 * lora_rank * sum(layer.out_features + layer.in_features for layer in spectra) / dense
    rows = []
    for alpha in alphas:
        rate = compression_rate(spectra, [energy_rank(layer.values, alpha) for layer in spectra])
        rows.append({"model": name, "layers": len(spectra), "alpha": alpha, "compression": rate, "lora": lora})
    return rows


def draw_compression(rows: Sequence[Mapping], lora_rank: int) -> Figure:
    """A curve for every model and set of layers, and a dashed line in the same colour for LoRA (CERSA, Fig. 7)."""
    figure, [axes] = new_figure(8, 5)
    for number, (name, curve) in enumerate(grouped(rows, itemgetter("model")).items()):
        curve = sorted(curve, key=itemgetter("alpha"))
        axes.plot([row["alpha"] for row in curve], [row["compression"] for row in curve], color=f"C{number}", label=name)
        axes.axhline(curve[0]["lora"], color=f"C{number}", linestyle="--", label=f"{name}, LoRA r={lora_rank}")
    axes.axhline(1, color="gray", linestyle=":", label="dense weights alone")
    axes.set(xlabel="alpha = beta", ylabel="c", title="weights, gradients and optimizer state divided by the dense weights")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
