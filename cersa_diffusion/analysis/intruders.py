"""Intruder dimensions: leading singular vectors of a tuned weight that resemble no singular vector of the pre-trained weight.

Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv 2410.21228), algorithm 1.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter

from tqdm.auto import tqdm

from cersa_diffusion.analysis.kinds import paper_kind
from cersa_diffusion.analysis.models import LayerPair
from cersa_diffusion.analysis.output import Figure, check_shares, grouped, new_figure
from cersa_diffusion.analysis.subspaces import best_cosines, resolved_bases
from cersa_diffusion.errors import ConfigError

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def check_search(leading: int, thresholds: Sequence[float]) -> None:
    """Raises ConfigError if the number of vectors is below 1, or if a threshold lies outside (0, 1]."""
    if leading < 1:
        raise ConfigError(f"leading is {leading}, expected at least 1 singular vector to look at")
    check_shares("thresholds", thresholds, "cosines")


def intruder_rows(
    pairs: Sequence[LayerPair], thresholds: Sequence[float] = THRESHOLDS, *, leading: int = 10, show_progress: bool = True
) -> list[dict]:
    """A row for every layer and threshold.

    The leading left singular vectors of the tuned weight are compared with all those of the pre-trained weight. On both sides,
    vectors whose singular values do not exceed the rounding errors of the stored numbers are left out: they are arbitrary.

    Args:
        pairs: what `cersa_diffusion.analysis.models.open_pair` returned.
        thresholds: epsilon; a vector whose best cosine is smaller is an intruder.
        leading: k, the number of singular vectors of the tuned weight to look at.
        show_progress: show a progress bar.

    Returns:
        Rows with "layer", "kind", "threshold", "vectors" (the number looked at), "intruders", and "lowest_cosine" (the smallest
        of the best cosines of these vectors).

    Raises:
        ConfigError: `leading` is below 1, or a threshold lies outside (0, 1].
    """
    check_search(leading, thresholds)
    rows = []
    for pair in tqdm(pairs, "layers", disable=not show_progress):
        before, after = resolved_bases(pair.before()), resolved_bases(pair.after())
        cosines = best_cosines(before.U, after.U[:, :leading])
        for threshold in thresholds:
            row = {"layer": pair.name, "kind": paper_kind(pair.name), "threshold": threshold, "vectors": len(cosines)}
            rows.append(row | {"intruders": int((cosines < threshold).sum()), "lowest_cosine": float(cosines.min())})
    return rows


def draw_intruders(rows: Sequence[Mapping]) -> Figure:
    """Share of the vectors that are intruders: against the threshold by layer kind, and by layer at the middle threshold."""
    thresholds = sorted({row["threshold"] for row in rows})
    middle = thresholds[len(thresholds) // 2]
    figure, panels = new_figure(13, 4.5, columns=2)
    by_threshold, by_layer = panels
    for number, (kind, of_kind) in enumerate(grouped(rows, itemgetter("kind")).items()):
        style = {"color": f"C{number % 10}", "marker": ".", "label": kind}
        at = grouped(of_kind, itemgetter("threshold"))
        by_threshold.plot(thresholds, [_share(at[threshold]) for threshold in thresholds], **style)
        by_layer.plot([_share([row]) for row in at[middle]], **style)
    by_threshold.set(xlabel="threshold (cosine)", ylabel="share of the leading vectors", title="intruder dimensions")
    by_layer.set(xlabel="layer of this kind", title=f"by layer, threshold {middle:g}")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.set_ylim(-0.03, 1.03)
    figure.legend(*by_threshold.get_legend_handles_labels(), loc="outside right center")
    return figure


def _share(rows: Sequence[Mapping]) -> float:
    return sum(row["intruders"] for row in rows) / sum(row["vectors"] for row in rows)


def intruder_totals(rows: Sequence[Mapping]) -> list[dict]:
    """A row for every threshold: number and share of the intruders among the vectors of all layers."""
    totals = []
    for threshold, layers in grouped(rows, itemgetter("threshold")).items():
        intruders = sum(layer["intruders"] for layer in layers)
        totals.append({"threshold": threshold, "layers": len(layers), "intruders": intruders, "share": _share(layers)})
    return totals
