"""How far fine-tuning rotated the principal subspaces of the weights: psi (CERSA, Eq. 3), Table 16, Fig. 11 and 12."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cersa_diffusion.analysis.kinds import paper_kind
from cersa_diffusion.analysis.models import LayerPair
from cersa_diffusion.analysis.output import Figure, check_shares, grouped, new_figure
from cersa_diffusion.analysis.subspaces import resolved_bases, similarity_grid
from cersa_diffusion.functional import energy_rank

# Points per axis of a grid in the CSV file; the picture shows every entry.
GRID_POINTS = 16
# Lower limit of the drawn 1 - psi: about the rounding error of float32 weights.
SMALLEST = 1e-7
SIDES = ("output", "input")


@dataclass(frozen=True)
class LayerSimilarity:
    """Similarity of the subspaces of a layer before and after fine-tuning.

    Attributes:
        name: name of the layer.
        kind: name of the layer in the paper.
        alpha: share of the energy that the compared subspaces hold.
        ranks: dimensions of these subspaces, before and after.
        resolved: numbers of singular values above the rounding errors, before and after; a truncated weight has no more.
        output: psi of the output subspaces (U).
        input: psi of the input subspaces (V).
        grids: psi of the leading i (rows, before) and j (columns, after) vectors, of U and of V; None if not requested.
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
        pairs: what `cersa_diffusion.analysis.models.open_pair` returned.
        alpha: share of the energy that the subspaces hold (0.95 in the paper).
        grids_of: names of the layers whose heat maps are requested.
        show_progress: show a progress bar.

    Raises:
        ConfigError: alpha lies outside (0, 1].
    """
    check_shares("alphas", [alpha])
    similarities = []
    for pair in tqdm(pairs, "layers", disable=not show_progress):
        before, after = resolved_bases(pair.before()), resolved_bases(pair.after())
        resolved = before.U.shape[1], after.U.shape[1]
        ranks = tuple(min(energy_rank(bases.s, alpha), bases.U.shape[1]) for bases in (before, after))
        grids = similarity_grid(before.U, after.U).cpu(), similarity_grid(before.V, after.V).cpu()
        psi = (float(grid[ranks[0] - 1, ranks[1] - 1]) for grid in grids)
        requested = grids if pair.name in grids_of else None
        similarities.append(LayerSimilarity(pair.name, paper_kind(pair.name), alpha, ranks, resolved, *psi, requested))
    return similarities


def middle_and_ends(pairs: Sequence[LayerPair]) -> list[str]:
    """The first, middle and last layer of every kind, whose heat maps the paper shows; the pairs are in model order."""
    by_kind = grouped((pair.name for pair in pairs), paper_kind).values()
    return [name for names in by_kind for name in dict.fromkeys((names[0], names[(len(names) - 1) // 2], names[-1]))]


def similarity_rows(similarities: Sequence[LayerSimilarity]) -> list[dict]:
    """A row for every layer."""
    return [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "alpha": layer.alpha,
            "rank_before": layer.ranks[0],
            "rank_after": layer.ranks[1],
            "resolved_before": layer.resolved[0],
            "resolved_after": layer.resolved[1],
            "psi_output": layer.output,
            "psi_input": layer.input,
        }
        for layer in similarities
    ]


def kind_rows(similarities: Sequence[LayerSimilarity]) -> list[dict]:
    """A row for every kind of layer, as in Table 16: mean and lowest psi of the output and of the input subspaces."""
    rows = []
    for kind, layers in grouped(similarities, attrgetter("kind")).items():
        row = {"kind": kind, "layers": len(layers)}
        for side in SIDES:
            values = [getattr(layer, side) for layer in layers]
            row |= {f"psi_{side}": statistics.fmean(values), f"psi_{side}_lowest": min(values)}
        rows.append(row)
    return rows


def grid_rows(similarities: Sequence[LayerSimilarity], points: int = GRID_POINTS) -> list[dict]:
    """The heat maps as rows, at evenly spaced dimensions i and j."""
    rows = []
    for layer in similarities:
        for side, grid in zip(SIDES, layer.grids or (), strict=False):
            dimensions = [torch.linspace(1, size, min(points, size)).round().long().tolist() for size in grid.shape]
            rows += [
                {"layer": layer.name, "kind": layer.kind, "side": side, "i": i, "j": j, "psi": float(grid[i - 1, j - 1])}
                for i, j in itertools.product(*dimensions)
            ]
    return rows


def draw_grids(similarities: Sequence[LayerSimilarity], side: str) -> Figure:
    """Heat maps of psi, a line for every kind and a panel for every layer, coloured by log(1 - psi) (CERSA, Fig. 11 and 12).

    Args:
        similarities: at least one with grids.
        side: "output" (U) or "input" (V).
    """
    from matplotlib.colors import LogNorm

    shown = [layer for layer in similarities if layer.grids is not None]
    by_kind = grouped(shown, attrgetter("kind"))
    columns = max(map(len, by_kind.values()))
    distances = {layer.name: (1 - layer.grids[SIDES.index(side)]).clamp_min(SMALLEST) for layer in shown}
    lowest = min(float(distance.min()) for distance in distances.values())
    scale = LogNorm(lowest, max(10 * lowest, *(float(distance.max()) for distance in distances.values())))
    letter = "U" if side == "output" else "V"
    title = f"{side} subspaces ({letter}) before and after: 1 - psi (dark: similar)"
    figure, panels = new_figure(1.5 + 3.1 * columns, 0.7 + 3 * len(by_kind), title, lines=len(by_kind), columns=columns)
    for number, layers in enumerate(by_kind.values()):
        line = panels[number * columns : (number + 1) * columns]
        for panel in line[len(layers) :]:
            panel.axis("off")
        for panel, layer in zip(line, layers, strict=False):
            distance = distances[layer.name]
            edges = (0.5, distance.shape[0] + 0.5, 0.5, distance.shape[1] + 0.5)
            image = panel.imshow(
                distance.T.numpy(), norm=scale, origin="lower", extent=edges, aspect="auto", interpolation="nearest"
            )
            panel.set_title(f"{layer.kind}: {layer.name}"[-44:], fontsize=7)
            panel.set(xlabel="i, before", ylabel="j, after")
    figure.colorbar(image, ax=panels, label="1 - psi")
    return figure
