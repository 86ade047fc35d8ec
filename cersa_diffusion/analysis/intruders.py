"""Intruder dimensions: leading singular vectors of a tuned weight that resemble none of the pre-trained one.

Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv 2410.21228), algorithm 1.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from cersa_diffusion.analysis.kinds import paper_kind
from cersa_diffusion.analysis.models import LayerPair
from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.analysis.subspaces import best_cosines, resolved_rank
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.functional import decompose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def check_search(leading: int, thresholds: Sequence[float]) -> None:
    """Raises ConfigError for a number of vectors below 1, or a threshold outside (0, 1]."""
    if leading < 1:
        raise ConfigError(f"leading is {leading}, expected at least 1 singular vector to look at")
    wrong = [threshold for threshold in thresholds if not 0 < threshold <= 1]
    if wrong or not thresholds:
        raise ConfigError(f"thresholds: {wrong[0] if wrong else 'none are given'}, expected cosines in (0, 1]")


def intruder_rows(
    pairs: Sequence[LayerPair],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    leading: int = 10,
    show_progress: bool = True,
) -> list[dict]:
    """A row for every layer and threshold.

    Left singular vectors are compared, with all that the pre-trained weight has; on either side those beyond the rounding of the
    stored numbers are left out, for they are arbitrary.

    Args:
        pairs: of `cersa_diffusion.analysis.models.open_pair`.
        thresholds: epsilon, cosines below which a vector is an intruder.
        leading: k, how many singular vectors of the tuned weight are looked at.
        show_progress: show a bar.

    Returns:
        Rows with "layer", "kind", "threshold", "vectors" (looked at), "intruders", and "lowest_cosine" (the least that one of
        these vectors comes to with its nearest).

    Raises:
        ConfigError: no vectors, or a threshold outside (0, 1].
    """
    check_search(leading, thresholds)
    rows = []
    for pair in tqdm(pairs, "layers", disable=not show_progress):
        weights = pair.before(), pair.after()
        bases = []
        for weight in weights:
            factors = decompose(weight)
            bases.append(factors.U[:, : resolved_rank(factors.s, tuple(weight.shape), weight.dtype)])
        cosines = best_cosines(bases[0], bases[1][:, :leading])
        for threshold in thresholds:
            place = {"layer": pair.name, "kind": paper_kind(pair.name), "threshold": threshold, "vectors": len(cosines)}
            rows.append(place | {"intruders": int((cosines < threshold).sum()), "lowest_cosine": float(cosines.min())})
    return rows


def draw_intruders(rows: Sequence[Mapping]) -> "Figure":
    """Share of the vectors that are intruders: over the threshold by kind of layer, and by layer at the middle threshold."""
    thresholds = sorted({row["threshold"] for row in rows})
    middle = thresholds[len(thresholds) // 2]
    figure = new_figure(13, 4.5)
    over, by_layer = figure.subplots(1, 2)
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        alike = [row for row in rows if row["kind"] == kind]
        style = {"color": f"C{number % 10}", "marker": ".", "label": kind}
        shares = [_share([row for row in alike if row["threshold"] == threshold]) for threshold in thresholds]
        over.plot(thresholds, shares, **style)
        by_layer.plot([_share([row]) for row in alike if row["threshold"] == middle], **style)
    over.set(xlabel="threshold (cosine)", ylabel="share of the leading vectors", title="intruder dimensions")
    by_layer.set(xlabel="layer of this kind", title=f"by layer, threshold {middle:g}")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    for axes in (over, by_layer):
        axes.set_ylim(-0.03, 1.03)
    figure.legend(*over.get_legend_handles_labels(), loc="outside right center")
    return figure


def _share(rows: Sequence[Mapping]) -> float:
    return sum(row["intruders"] for row in rows) / sum(row["vectors"] for row in rows)


def intruder_totals(rows: Sequence[Mapping]) -> list[dict]:
    """A row for every threshold: how many of the vectors of all layers are intruders."""
    totals = []
    for threshold in dict.fromkeys(row["threshold"] for row in rows):
        own = [row for row in rows if row["threshold"] == threshold]
        intruders, vectors = (sum(row[name] for row in own) for name in ("intruders", "vectors"))
        totals.append({"threshold": threshold, "layers": len(own), "intruders": intruders, "share": intruders / vectors})
    return totals
