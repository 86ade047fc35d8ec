"""How far fine-tuning turned the principal subspaces of the weights: psi (CERSA, Eq. 3), Table 16 and Fig. 11 and 12."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cersa_diffusion.analysis.kinds import paper_kind
from cersa_diffusion.analysis.models import LayerPair
from cersa_diffusion.analysis.output import new_figure
from cersa_diffusion.analysis.spectra import check_alphas
from cersa_diffusion.analysis.subspaces import resolved_rank, similarity_grid
from cersa_diffusion.functional import Decomposition, decompose, energy_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the grid in the CSV file; the picture has every entry.
GRID_POINTS = 16
# What 1 - psi is drawn as where it is less: rounding of float32 weights comes to about that.
SMALLEST = 1e-7


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity of the subspaces of a layer before and after fine-tuning.

    Attributes:
        name: the layer.
        kind: what the paper calls it.
        alpha: share of the energy that the compared subspaces hold.
        ranks: their dimensions, before and after.
        resolved: how many singular vectors stand out of rounding, before and after; a truncated weight has no more.
        output: psi of the output subspaces (U).
        input: psi of the input subspaces (V).
        grids: psi of the leading i (rows, before) and j (columns, after) vectors, of U and of V; None where not asked for.
    """

    name: str
    kind: str
    alpha: float
    ranks: tuple[int, int]
    resolved: tuple[int, int]
    output: float
    input: float
    grids: tuple[Tensor, Tensor] | None


def layer_similarities(
    pairs: Sequence[LayerPair], alpha: float = 0.95, *, grids_of: Sequence[str] = (), show_progress: bool = True
) -> list[LayerSimilarity]:
    """Compares the principal subspaces of every layer.

    Args:
        pairs: of `cersa_diffusion.analysis.models.open_pair`.
        alpha: share of the energy that the subspaces hold (the paper: .95).
        grids_of: names of the layers whose heat maps are wanted.
        show_progress: show a bar.

    Raises:
        ConfigError: alpha is outside (0, 1].
    """
    check_alphas([alpha])
    found = []
    for pair in tqdm(pairs, "layers", disable=not show_progress):
        weights = pair.before(), pair.after()
        factors = [decompose(weight) for weight in weights]
        resolved = [resolved_rank(own.s, tuple(weight.shape), weight.dtype) for own, weight in zip(factors, weights, strict=True)]
        ranks = [min(energy_rank(own.s, alpha), most) for own, most in zip(factors, resolved, strict=True)]
        bases = [_bases(own, most) for own, most in zip(factors, resolved, strict=True)]
        grids = tuple(similarity_grid(*sides).cpu() for sides in zip(*bases, strict=True))
        output, own_input = (float(grid[ranks[0] - 1, ranks[1] - 1]) for grid in grids)
        found.append(
            LayerSimilarity(
                name=pair.name,
                kind=paper_kind(pair.name),
                alpha=alpha,
                ranks=tuple(ranks),
                resolved=tuple(resolved),
                output=output,
                input=own_input,
                grids=grids if pair.name in grids_of else None,
            )
        )
    return found


def _bases(factors: Decomposition, rank: int) -> tuple[Tensor, Tensor]:
    return factors.U[:, :rank], factors.Vh[:rank].T


def middle_and_ends(pairs: Sequence[LayerPair]) -> list[str]:
    """The first, middle and last layer of every kind: those whose heat maps the paper shows.

    Args:
        pairs: in model order.
    """
    by_kind: dict[str, list[str]] = {}
    for pair in pairs:
        by_kind.setdefault(paper_kind(pair.name), []).append(pair.name)
    return [name for names in by_kind.values() for name in dict.fromkeys((names[0], names[(len(names) - 1) // 2], names[-1]))]


def similarity_rows(similarities: Sequence[LayerSimilarity]) -> list[dict]:
    """A row for every layer."""
    return [
        {
            "layer": own.name,
            "kind": own.kind,
            "alpha": own.alpha,
            "rank_before": own.ranks[0],
            "rank_after": own.ranks[1],
            "resolved_before": own.resolved[0],
            "resolved_after": own.resolved[1],
            "psi_output": own.output,
            "psi_input": own.input,
        }
        for own in similarities
    ]


def kind_rows(similarities: Sequence[LayerSimilarity]) -> list[dict]:
    """A row for every kind of layer, as Table 16 has them: mean psi of output and input subspaces, and the lowest."""
    rows = []
    for kind in dict.fromkeys(own.kind for own in similarities):
        alike = [own for own in similarities if own.kind == kind]
        row = {"kind": kind, "layers": len(alike)}
        for side in ("output", "input"):
            values = [getattr(own, side) for own in alike]
            row |= {f"psi_{side}": statistics.fmean(values), f"psi_{side}_lowest": min(values)}
        rows.append(row)
    return rows


def grid_rows(similarities: Sequence[LayerSimilarity], points: int = GRID_POINTS) -> list[dict]:
    """The heat maps as rows, at some evenly spaced dimensions i and j."""
    rows = []
    for own in similarities:
        for side, grid in zip(("output", "input"), own.grids or (), strict=False):
            sizes = [torch.linspace(1, size, min(points, size)).round().long().tolist() for size in grid.shape]
            rows += [
                {"layer": own.name, "kind": own.kind, "side": side, "i": i, "j": j, "psi": float(grid[i - 1, j - 1])}
                for i in sizes[0]
                for j in sizes[1]
            ]
    return rows


def draw_grids(similarities: Sequence[LayerSimilarity], side: str) -> "Figure":
    """Heat maps of psi, kinds in rows and layers in columns, in shades of the logarithm of 1 - psi (CERSA, Fig. 11 and 12).

    Args:
        similarities: at least one with grids.
        side: "output" (U) or "input" (V).
    """
    from matplotlib.colors import LogNorm

    shown: dict[str, list[LayerSimilarity]] = {}
    for own in similarities:
        if own.grids is not None:
            shown.setdefault(own.kind, []).append(own)
    number, columns = ("output", "input").index(side), max(map(len, shown.values()))
    distances = {own.name: (1 - own.grids[number]).clamp_min(SMALLEST) for layers in shown.values() for own in layers}
    lowest = min(float(distance.min()) for distance in distances.values())
    scale = LogNorm(lowest, max(10 * lowest, *(float(distance.max()) for distance in distances.values())))
    letter = "U" if side == "output" else "V"
    title = f"subspaces of the {side} ({letter}) before and after: 1 - psi (dark: alike)"
    figure = new_figure(1.5 + 3.1 * columns, 0.7 + 3 * len(shown), title)
    panels = figure.subplots(len(shown), columns, squeeze=False)
    for line, layers in zip(panels, shown.values(), strict=True):
        for panel in line[len(layers) :]:
            panel.axis("off")
        for panel, own in zip(line, layers, strict=False):
            distance = distances[own.name]
            edges = (0.5, distance.shape[0] + 0.5, 0.5, distance.shape[1] + 0.5)
            image = panel.imshow(
                distance.T.numpy(), norm=scale, origin="lower", extent=edges, aspect="auto", interpolation="nearest"
            )
            panel.set_title(f"{own.kind}: {own.name}"[-44:], fontsize=7)
            panel.set(xlabel="i, before", ylabel="j, after")
    figure.colorbar(image, ax=panels.ravel().tolist(), label="1 - psi")
    return figure
