"""The memory table against what tensors occupy after a step."""

import copy

import pytest
import torch
from torch import nn

from cersa_diffusion import CersaConfig, ConfigError, plan_memory, trainable_parameters
from cersa_diffusion.analysis.kinds import targets_by_component
from cersa_diffusion.analysis.memory_table import TableSettings, draw_memory, in_columns_of_the_paper, memory_rows
from cersa_diffusion.analysis.models import open_model
from cersa_diffusion.analysis.throughput import random_inputs
from cersa_diffusion.methods.settings import MethodSettings
from cersa_diffusion.methods.table import make_method

from ..conftest import raises

TABLE = TableSettings(lora_ranks=(3, 5), svfit_rank=9, off_diagonals=1, alphas=(0.9, 0.5))
METHODS = {
    "full": MethodSettings(method="full"),
    "full, target layers": MethodSettings(method="full"),
    "LoRA r=3": MethodSettings(method="lora", rank=3),
    "LoRA r=5": MethodSettings(method="lora", rank=5),
    "SVFT d=1": MethodSettings(method="svft", off_diagonals=1),
    "SVFit r=9": MethodSettings(method="svfit", svfit_rank=9),
    "CERSA alpha=0.9": MethodSettings(alpha=0.9, rank_multiple=1),
    "CERSA alpha=0.5": MethodSettings(alpha=0.5, rank_multiple=1),
}


def occupied(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(model: nn.Module, inputs: dict) -> dict:
    """What the tensors of a prepared model occupy after a step of AdamW."""
    trained = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained)
    model(**inputs)[0].square().mean().backward()
    # A parameter that this forward pass leaves out still is given a gradient by a training that uses it.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    sizes = {
        "weights": occupied([*model.parameters(), *model.buffers()]),
        "optimizer": occupied(t for state in optimizer.state.values() for t in state.values()),
        "gradients": occupied(parameter.grad for parameter in trained),
    }
    return {"trainable": sum(p.numel() for p in trained)} | sizes | {"total": sum(sizes.values())}


@pytest.mark.parametrize("name", ["bert", "vit", "deberta-v3"])
def test_every_row_is_what_a_step_occupies(name, model_path):
    components = open_model(model_path(name)).components
    model, targets = components["model"], targets_by_component(components, None, "QKV")
    rows = {row["method"]: row for row in memory_rows(components, targets, TABLE, show_progress=False)}
    assert list(rows) == list(METHODS)
    for title, settings in METHODS.items():
        own = copy.deepcopy(model).train()
        make_method(settings, {"model": None} if title == "full" else targets).prepare("model", own)
        found = measured(own, random_inputs(own, 2))
        assert {part: rows[title][part] for part in found} == found, title
    assert not any(hasattr(module, "cores") for module in model.modules())


def test_rows_of_cersa_are_those_of_the_plan_for_exact_ranks(network):
    settings = TableSettings(alphas=(0.8,), optimizer="adafactor", weight_dtype=torch.bfloat16)
    rows = {row["method"]: row for row in memory_rows({"model": network}, {"model": "all-linear"}, settings, show_progress=False)}
    plan = plan_memory(
        network, CersaConfig(alpha=0.8, rank_multiple=1), optimizer="adafactor", weight_dtype=torch.bfloat16, show_progress=False
    ).totals()["whole_model"]
    assert rows["CERSA alpha=0.8"]["total"] == plan["cersa"].total
    assert rows["LoRA r=32"]["total"] == plan["lora"].total
    assert rows["full, target layers"]["total"] == plan["full"].total


def test_columns_of_the_paper_add_up(network):
    rows = memory_rows({"model": network}, {"model": "all-linear"}, show_progress=False)
    for row in in_columns_of_the_paper(rows):
        parts = [row[f"{part} Memory (MB)"] for part in ("Weights", "Optimizer State", "Gradient")]
        assert row["Total Memory (MB)"] == pytest.approx(sum(parts))
    full = in_columns_of_the_paper(rows)[0]
    assert (
        full["Trainable Ratio (%)"] == 100
        and full["Trainable Parameter (M)"] == sum(p.numel() for p in network.parameters()) / 1e6
    )
    assert next(patch.get_width() for patch in draw_memory(rows).axes[0].patches) == full["Weights Memory (MB)"]


def test_bad_settings_are_refused():
    with raises(ConfigError, "lora_ranks"):
        TableSettings(lora_ranks=(0,))
    with raises(ConfigError, "alphas", "0"):
        TableSettings(alphas=(0,))
    with raises(ConfigError, "optimizer", "lion"):
        TableSettings(optimizer="lion")
