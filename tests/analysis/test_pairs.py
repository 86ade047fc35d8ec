"""Subspace similarity and intruder dimensions of whole checkpoints, planted and found again."""

import copy

import pytest
import torch
from torch import nn

from cersa_diffusion import ConfigError
from cersa_diffusion.analysis.intruders import draw_intruders, intruder_rows, intruder_totals
from cersa_diffusion.analysis.models import open_pair
from cersa_diffusion.analysis.similarity import (
    draw_grids,
    grid_rows,
    kind_rows,
    layer_similarities,
    middle_and_ends,
    similarity_rows,
)
from cersa_diffusion.layers.model import cersa_layers

from ..conftest import DEVICE, raises


def psi(A: torch.Tensor, B: torch.Tensor) -> float:
    """Eq. 3 by projectors: the trace of their product."""
    return float(((A @ A.T) * (B @ B.T)).sum()) / min(A.shape[1], B.shape[1])


def leading(weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    U, s, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= alpha * s.square().sum())
    return U[:, :k], Vh[:k].T


@pytest.fixture
def moved(network) -> nn.Module:
    model = copy.deepcopy(network)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight += 0.1 * layer.weight.std() * torch.randn_like(layer.weight)
    return model


def test_figures_are_those_of_equation_3(network, moved):
    pairs = open_pair(network, moved)
    found = layer_similarities(pairs, 0.9, grids_of=["2"], show_progress=False)
    for own, pair in zip(found, pairs, strict=True):
        (U, V), (U_moved, V_moved) = leading(pair.before(), 0.9), leading(pair.after(), 0.9)
        assert own.ranks == (U.shape[1], U_moved.shape[1])
        assert own.output == pytest.approx(psi(U, U_moved)) and own.input == pytest.approx(psi(V, V_moved))
        assert 0.5 < own.output < 1
    rows, (row, *_) = similarity_rows(found), kind_rows(found)
    assert rows[0]["psi_output"] == row["psi_output"] == row["psi_output_lowest"]  # each of its own kind
    assert [own.grids is not None for own in found] == [False, True, False]
    U = [torch.linalg.svd(weight.double()).U for weight in (pairs[1].before(), pairs[1].after())]
    for entry in grid_rows(found, points=5):
        if entry["side"] == "output":
            assert entry["psi"] == pytest.approx(psi(U[0][:, : entry["i"]], U[1][:, : entry["j"]]))


def test_a_checkpoint_with_itself_is_one(network):
    found = layer_similarities(open_pair(network, network), 0.95, grids_of=["0", "2", "4"], show_progress=False)
    assert all(own.output == pytest.approx(1) and own.input == pytest.approx(1) for own in found)
    # Only the diagonal and what holds all of the other are alike in any case: everything nested is.
    assert all(torch.allclose(grid, torch.ones_like(grid)) for own in found for grid in own.grids)
    assert draw_grids(found, "input").axes


def test_training_inside_the_principal_subspace_stays_in_it(trained):
    """What CERSA holds by construction: the subspace of the adapted weight is that of the kept components."""
    base, model = trained
    for own, layer in zip(
        layer_similarities(open_pair(base, model), 1.0, show_progress=False),
        cersa_layers(model).values(),
        strict=True,
    ):
        assert own.resolved[1] == layer.kept_rank == own.ranks[1]
        assert own.output == pytest.approx(1) and own.input == pytest.approx(1)
    found = layer_similarities(open_pair(base, model), 0.8, grids_of=["0"], show_progress=False)
    assert found[0].grids[0].shape == found[0].resolved


def test_heat_maps_are_those_of_the_first_middle_and_last_layer(model_path):
    pairs = open_pair(model_path("vit"), model_path("vit"), r".*\.(q|k)_proj")
    names = middle_and_ends(pairs)
    assert len(names) == 4 and names[0].endswith("0.attention.q_proj") and names[1].endswith("1.attention.q_proj")
    found = layer_similarities(pairs, grids_of=names, show_progress=False)
    figure = draw_grids(found, "output")
    assert [panel.get_title()[:1] for panel in figure.axes[:4]] == ["Q", "Q", "K", "K"]
    assert {own.kind for own in found} == {"Q", "K"}


def test_planted_intruders_are_found(network):
    """A new direction with the largest singular value in one layer; the others are turned in sign, which is nothing new."""
    model = copy.deepcopy(network)
    with torch.no_grad():
        weight = model[2].weight  # 64 x 40: of 64 output dimensions 24 are free
        U = torch.linalg.svd(weight.double()).U
        weight += 3 * torch.outer(U[:, 50], torch.nn.functional.normalize(torch.ones(40, device=DEVICE), dim=0).double()).float()
        model[4].weight.neg_()
    pairs = open_pair(network, model)
    rows = intruder_rows(pairs, (0.3, 0.6), leading=4, show_progress=False)
    counts = {(row["layer"], row["threshold"]): row["intruders"] for row in rows}
    assert counts["2", 0.6] >= 1 and counts["0", 0.6] == counts["4", 0.6] == 0
    assert next(row["lowest_cosine"] for row in rows if row["layer"] == "2") < 0.3
    totals = intruder_totals(rows)
    assert totals[1]["intruders"] == sum(n for (_, threshold), n in counts.items() if threshold == 0.6)
    assert totals[1]["share"] == totals[1]["intruders"] / 12
    assert len(draw_intruders(rows).axes[0].lines) == 3


def test_bad_settings_are_refused(network):
    pairs = open_pair(network, network)
    with raises(ConfigError, "alphas", "1.5"):
        layer_similarities(pairs, 1.5)
    with raises(ConfigError, "thresholds", "2"):
        intruder_rows(pairs, (0.5, 2))
    with raises(ConfigError, "leading", "0"):
        intruder_rows(pairs, leading=0)
