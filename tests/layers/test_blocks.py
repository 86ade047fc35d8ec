"""Equal layers of repeated blocks share their ranks: in the injection, the plan, a budget, and compressed checkpoints."""

import copy

import pytest
import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.config import LayerRanks
from cersa_diffusion.layers.blocks import block_groups, share_ranks
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.memory.plan import choose_ranks, plan_memory

from ..conftest import DEVICE, raises, randn


class Block(nn.Module):
    """A block of two layers; `inner` is a block of the same class inside it."""

    def __init__(self, width: int, inner: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.inner = Block(width) if inner else None

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return x if self.inner is None else self.inner(x)


class Model(nn.Module):
    """Three blocks of width 24 and one of width 16, between two layers outside blocks."""

    def __init__(self):
        super().__init__()
        self._repeated_blocks = ["Block"]
        self.first, self.last = nn.Linear(24, 24), nn.Linear(16, 16)
        self.blocks = nn.ModuleList([Block(24), Block(24), Block(24)])
        self.narrow, self.between = Block(16), nn.Linear(24, 16)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.narrow(self.between(x)))


@pytest.fixture
def model() -> Model:
    """Its weights have spectra that decay at different rates."""
    torch.manual_seed(0)
    model = Model()
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, nn.Linear)):
        U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight = nn.Parameter((U * s * torch.logspace(0, -0.4 * (1 + number % 4), len(s))) @ Vh)
    return model.to(DEVICE)


def ranks_in(model: nn.Module) -> dict[str, LayerRanks]:
    return {name: LayerRanks(layer.kept_rank, layer.cores["default"].rank) for name, layer in cersa_layers(model).items()}


def assert_uniform(ranks: dict[str, LayerRanks | None]) -> None:
    for place in ("up", "down"):
        assert len({ranks[f"blocks.{number}.{place}"] for number in range(3)}) == 1


@pytest.mark.parametrize("multiple", [1, 8])
def test_the_largest_ranks_of_equal_layers_are_taken(model, multiple):
    config = CersaConfig(alpha=0.9, beta=0.6, rank_multiple=multiple)
    alone = choose_ranks(model, config, show_progress=False)["model"]
    uniform = CersaConfig(alpha=0.9, beta=0.6, rank_multiple=multiple, uniform_blocks=True)
    plan = plan_memory(model, uniform, show_progress=False)
    cersa.inject_cersa(model, uniform, show_progress=False)
    ranks = ranks_in(model)
    assert ranks == {row.name.removeprefix("model."): LayerRanks(row.kept_rank, row.core_rank) for row in plan.layers}
    for name, own in ranks.items():
        alike = [f"blocks.{number}.{name.rpartition('.')[2]}" for number in range(3)] if name.startswith("blocks") else [name]
        assert own == (max(alone[other].kept for other in alike), max(alone[other].core for other in alike))
    assert ranks != alone


@pytest.mark.parametrize(("budget", "unprofitable"), [(60_000, "factor"), (34_000, "skip")])
def test_a_budget_gives_equal_layers_equal_ranks(model, budget, unprofitable):
    config = CersaConfig(memory_budget=budget, rank_multiple=2, uniform_blocks=True, unprofitable=unprofitable)
    plan = plan_memory(model, config, show_progress=False)
    chosen = choose_ranks(model, config, show_progress=False)["model"]
    assert_uniform(chosen)
    assert 0.8 * budget < plan.totals()["whole_model"]["cersa"].total <= budget
    assert any(ranks is None for ranks in chosen.values()) == (unprofitable == "skip")
    cersa.inject_cersa(model, config, show_progress=False)
    assert ranks_in(model) == {name: ranks for name, ranks in chosen.items() if ranks is not None}


def test_a_rank_of_the_caller_is_uniform_already(model):
    other = copy.deepcopy(model)
    cersa.inject_cersa(model, CersaConfig(rank=5, uniform_blocks=True), show_progress=False)
    cersa.inject_cersa(other, CersaConfig(rank=5), show_progress=False)
    assert ranks_in(model) == ranks_in(other) and set(ranks_in(model).values()) == {LayerRanks(5, 5)}


def test_an_adapter_of_uniform_blocks_loads_into_the_base(model, tmp_path):
    base = copy.deepcopy(model)
    cersa.inject_cersa(model, CersaConfig(alpha=0.9, uniform_blocks=True), show_progress=False)
    for core in cersa.trainable_parameters(model):
        core.data.normal_(std=0.1)
    cersa.save_adapter(model, tmp_path / "a.safetensors", dtype=torch.float32)
    cersa.load_adapter(base, tmp_path / "a.safetensors", show_progress=False)
    assert ranks_in(base) == ranks_in(model)
    x = randn(3, 24)
    torch.testing.assert_close(base(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_share_a_group_at_one_place_in_blocks_of_one_class_and_shape():
    model = nn.ModuleDict({"a": Block(8, inner=True), "b": Block(8, inner=True), "narrow": Block(4), "other": nn.Linear(8, 16)})
    model._repeated_blocks = ["Block"]
    shapes = {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    groups = block_groups(model, shapes)
    assert groups["a.up"] == groups["b.up"] != groups["a.down"]
    # The inner block is compiled as a part of the outer one.
    assert groups["a.inner.up"] == groups["b.inner.up"] != groups["a.up"]
    assert len({groups["a.up"], groups["narrow.up"], groups["other"]}) == 3
    ranks = {name: LayerRanks(number, 1) for number, name in enumerate(shapes, start=1)}
    assert share_ranks(ranks, groups)["a.up"] == ranks["b.up"] and share_ranks(ranks, groups)["other"] == ranks["other"]


@pytest.mark.parametrize(
    ("classes", "named"), [(None, "_repeated_blocks _no_split_modules"), (["Gone"], "Gone"), ([], "_repeated_blocks")]
)
def test_a_model_that_does_not_name_its_blocks_is_refused_before_any_work(model, classes, named):
    nameless = nn.Sequential(model)
    if classes is not None:
        nameless._repeated_blocks = classes
    with raises(ConfigError, "uniform_blocks", "Sequential", *named.split()):
        cersa.inject_cersa(nameless, CersaConfig(uniform_blocks=True), show_progress=False)
    assert not cersa_layers(nameless)
    nameless._repeated_blocks = ["Block"]
    cersa.inject_cersa(nameless, CersaConfig(uniform_blocks=True), show_progress=False)


def test_models_of_transformers_name_their_blocks_for_placement(model):
    model._repeated_blocks, model._no_split_modules = [], ["Block"]
    cersa.inject_cersa(model, CersaConfig(alpha=0.9, uniform_blocks=True), show_progress=False)
    assert_uniform(ranks_in(model))
