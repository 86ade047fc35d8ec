"""Ranks by layer, kind and alpha, and compression curves, against brute force on the weights."""

import math

import pytest
import torch
from torch import nn

from cersa_diffusion import ConfigError, NonFiniteError
from cersa_diffusion.analysis.kinds import paper_kind
from cersa_diffusion.analysis.models import open_model
from cersa_diffusion.analysis.spectra import compression_rows, draw_compression, draw_ranks, layer_spectra, rank_rows

from ..conftest import raises

ALPHAS = (0.3, 0.8, 0.95, 1.0)


def brute_force(weight: torch.Tensor, alpha: float) -> int:
    """The smallest rank whose best approximation leaves no more than 1 - alpha of the squared Frobenius norm."""
    U, s, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in range(1, len(s) + 1):
        lost = (weight.double() - (U[:, :rank] * s[:rank]) @ Vh[:rank]).square().sum() / weight.double().square().sum()
        if lost <= 1 - alpha + 1e-12:
            return rank
    return len(s)


def test_ranks_equal_brute_force(network):
    rows = rank_rows(layer_spectra({"model": network}, show_progress=False), ALPHAS)
    assert len(rows) == 3 * len(ALPHAS)
    for row in rows:
        weight = network.get_submodule(row["layer"].removeprefix("model.")).weight
        assert row["rank"] == brute_force(weight.detach(), row["alpha"])
        assert row["share"] == row["rank"] / min(weight.shape)


def test_kinds_and_depths_are_those_of_the_paper(model_path):
    rows = rank_rows(layer_spectra(open_model(model_path("vit")).components, show_progress=False), (0.9,))
    assert [row["kind"] for row in rows] == ["Q", "K", "V", "P", "UP", "DN"] * 2
    assert [row["depth"] for row in rows] == [0] * 6 + [1] * 6
    few = layer_spectra(open_model(model_path("vit")).components, ["QV"], show_progress=False)
    assert {layer.kind for layer in few} == {"Q", "V"}
    assert paper_kind("encoder.layer.0.attention.output.dense") == "P" and paper_kind("encoder.layer.0.output.dense") == "DN"
    assert paper_kind("down_blocks.0.attn1.to_q") == "to_q"


def test_compression_is_the_formula_of_section_3_4(network):
    spectra = layer_spectra({"model": network}, ["0"], show_progress=False)
    (row,) = compression_rows("small", spectra, (0.9,), lora_rank=4)
    m, n, r = 40, 48, brute_force(network[0].weight.detach(), 0.9)
    assert row["compression"] == pytest.approx((m * r + n * r + 4 * r * r) / (m * n))
    assert row["lora"] == pytest.approx((m * n + 4 * 4 * (m + n)) / (m * n))


def test_figures_have_the_curves(network, tmp_path):
    spectra = layer_spectra({"model": network}, show_progress=False)
    rows = rank_rows(spectra, ALPHAS)
    figure = draw_ranks(rows)
    drawn = [panel for panel in figure.axes if panel.lines]
    assert [panel.get_title() for panel in drawn] == ["0", "2", "4"]
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] >= max(row["rank"] for row in rows) for panel in drawn)
    ranks = {line.get_label(): line.get_ydata()[0] for line in drawn[1].lines if line.get_label()[0] != "_"}
    assert ranks == {f"{row['alpha']:g}": row["rank"] for row in rows if row["layer"] == "model.2"}
    curves = compression_rows("small", spectra)
    line = draw_compression(curves, 32).axes[0].lines[0]
    assert list(line.get_ydata()) == [row["compression"] for row in curves]


def test_bad_input_is_refused(network):
    spectra = layer_spectra({"model": network}, show_progress=False)
    with raises(ConfigError, "alphas", "1.2"):
        rank_rows(spectra, (0.9, 1.2))
    with raises(ConfigError, "alphas"):
        rank_rows(spectra, ())
    with raises(ConfigError, "lora_rank", "0"):
        compression_rows("small", spectra, lora_rank=0)
    with raises(ConfigError, "nn.Linear"):
        layer_spectra({"model": network}, ["to_q"], show_progress=False)
    broken = nn.Sequential(nn.Linear(4, 4))
    broken[0].weight.data[0, 0] = math.nan
    with raises(NonFiniteError, "0", "NaN"):
        layer_spectra({"model": broken}, show_progress=False)
