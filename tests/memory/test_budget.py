"""The memory budget: never above it, as much energy as it can hold, and the same ranks in plan, injection and trainer."""

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaLinear, ConfigError
from cersa_diffusion.config import LayerRanks
from cersa_diffusion.functional import energy_rank, kept_energy
from cersa_diffusion.memory.budget import TargetLayer, allocate
from cersa_diffusion.memory.cost import DenseLayer, LayerInput, cersa_memory
from cersa_diffusion.memory.plan import choose_ranks, plan_memory

from ..conftest import raises, randn, train

UNTOUCHED = {"net.conv": 100}


@st.composite
def target_layers(draw, most=4, widest=9, **fixed) -> list[TargetLayer]:
    """Layers of one model: any shapes, some alike in repeated blocks, spectra with ties, zeros and widely different sizes."""
    options = {
        "beta": st.none() | st.sampled_from([0.3, 0.8]),
        "unprofitable": st.sampled_from(["factor", "skip"]),
        "rank_multiple": st.sampled_from([1, 2, 3, 8]),
    }
    config = CersaConfig(memory_budget=1, **{name: draw(options[name]) for name in options if name not in fixed} | fixed)
    layers = []
    for number in range(draw(st.integers(1, most))):
        like = draw(st.sampled_from([None, *layers]))
        sides = (like.dense.out_features, like.dense.in_features) if like else None
        m, n = sides or draw(st.tuples(st.integers(1, widest), st.integers(1, widest)))
        value = st.sampled_from([0.0, 1.0, 2.0]) | st.floats(1e-3, 1e3)
        spectrum = sorted(draw(st.lists(value, min_size=min(m, n), max_size=min(m, n))), reverse=True)
        dense = DenseLayer(
            m, n, draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.bfloat16])), rows=draw(st.integers(0, 3))
        )
        group = like.group if like else f"block of {number}"
        layers.append(TargetLayer(f"net.{number}", dense, config, torch.tensor(spectrum, dtype=torch.float64), group))
    return layers


def bytes_of(layers: list[TargetLayer], ranks: list[LayerRanks | None], optimizer: str = "adamw") -> int:
    sizes = [
        layer.dense.dense_bytes() if own is None else cersa_memory(layer.dense, own, layer.config, optimizer).total
        for layer, own in zip(layers, ranks, strict=True)
    ]
    return sum(sizes) + sum(UNTOUCHED.values())


def energy_of(layers: list[TargetLayer], ranks: list[LayerRanks | None], energy: str = "product") -> float:
    """What `allocate` makes as large as possible; of the product the logarithm."""
    shares = [1.0 if own is None else kept_energy(layer.spectrum, own.kept) for layer, own in zip(layers, ranks, strict=True)]
    if energy == "product":
        return sum(map(math.log, shares))
    return sum(
        share * (1.0 if energy == "sum" else float(own.spectrum.square().sum()))
        for share, own in zip(shares, layers, strict=True)
    )


def smallest(layers: list[TargetLayer], optimizer: str = "adamw") -> int:
    with pytest.raises(ConfigError) as error:
        allocate(layers, UNTOUCHED, 1, optimizer=optimizer)
    return int(re.search(r"smallest possible is (\d+)", str(error.value))[1])


@settings(max_examples=150)
@given(
    target_layers(),
    st.sampled_from(["adamw", "adamw8bit", "adafactor", "sgd"]),
    st.sampled_from(["product", "sum", "absolute"]),
    st.data(),
)
def test_never_above_the_budget_and_a_larger_one_never_keeps_less(layers, optimizer, energy, data):
    least = smallest(layers, optimizer)
    budgets = sorted(data.draw(st.lists(st.integers(least, 4 * least), min_size=1, max_size=4)))
    kept = []
    for budget in [least, *budgets]:
        ranks = list(allocate(layers, UNTOUCHED, budget, optimizer=optimizer, energy=energy).values())
        assert bytes_of(layers, ranks, optimizer) <= budget
        for layer, own in zip(layers, ranks, strict=True):
            assert own is not None or layer.config.unprofitable == "skip"
            if own is not None:
                multiple, full = layer.config.rank_multiple, layer.full_rank
                assert 1 <= own.core <= own.kept <= full
                assert all(rank % multiple == 0 or rank == full for rank in own)
        by_group = {(layer.group, own) for layer, own in zip(layers, ranks, strict=True)}
        assert len(by_group) == len({layer.group for layer in layers})
        kept.append(energy_of(layers, ranks, energy))
    assert all(after >= before - 1e-9 * abs(before) - 1e-12 for before, after in itertools.pairwise(kept))


def grouped(layers: list[TargetLayer]) -> dict[object, list[TargetLayer]]:
    groups: dict[object, list[TargetLayer]] = {}
    for own in layers:
        groups.setdefault(own.group, []).append(own)
    return groups


def one_step_more(layers: list[TargetLayer], ranks: list[LayerRanks]) -> float:
    """The most that a single further step of a layer, or of layers with the same ranks, would bring."""
    chosen = {layer.group: own for layer, own in zip(layers, ranks, strict=True)}

    def gain(group: object, alike: list[TargetLayer]) -> float:
        own, more = chosen[group], min(chosen[group].kept + alike[0].config.rank_multiple, alike[0].full_rank)
        return energy_of(alike, [LayerRanks(more, own.core)] * len(alike)) - energy_of(alike, [own] * len(alike))

    return max(gain(group, alike) for group, alike in grouped(layers).items())


@settings(max_examples=60)
@given(target_layers(most=3, widest=5, beta=None, unprofitable="factor"), st.floats(1, 3))
def test_optimal_up_to_one_step(layers, generosity):
    budget = int(smallest(layers) * generosity)
    ranks = list(allocate(layers, UNTOUCHED, budget).values())
    multiple, groups = layers[0].config.rank_multiple, grouped(layers)
    possible = [{*range(multiple, alike[0].full_rank, multiple), alike[0].full_rank} for alike in groups.values()]
    every = [dict(zip(groups, kept, strict=True)) for kept in itertools.product(*possible)]
    choices = [[LayerRanks(kept[layer.group], kept[layer.group]) for layer in layers] for kept in every]
    best = max(energy_of(layers, own) for own in choices if bytes_of(layers, own) <= budget)
    assert energy_of(layers, ranks) >= best - one_step_more(layers, ranks) - 1e-9


@settings(max_examples=60)
@given(target_layers(beta=None, unprofitable="factor"), st.floats(0.05, 1))
def test_no_worse_than_one_alpha_for_all_layers(layers, alpha):
    config = CersaConfig(alpha=alpha, rank_multiple=layers[0].config.rank_multiple)
    kept = {g: max(config.kept_rank(layer.spectrum) for layer in alike) for g, alike in grouped(layers).items()}
    uniform = [LayerRanks(kept[layer.group], kept[layer.group]) for layer in layers]
    ranks = list(allocate(layers, UNTOUCHED, bytes_of(layers, uniform)).values())
    assert energy_of(layers, ranks) >= energy_of(layers, uniform) - one_step_more(layers, ranks) - 1e-9


def layer(name: str, spectrum: list[float], m: int | None = None, **settings) -> TargetLayer:
    p = len(spectrum)
    config = CersaConfig(memory_budget=1, **{"rank_multiple": 1} | settings)
    return TargetLayer(name, DenseLayer(m or p, p, False, torch.float32), config, torch.tensor(spectrum, dtype=torch.float64))


def test_ties_go_round_the_layers():
    flat = [layer(f"net.{number}", [1.0] * 6) for number in range(3)]
    budget = bytes_of(flat, [LayerRanks(3, 3), LayerRanks(3, 3), LayerRanks(2, 2)])
    assert [own.kept for own in allocate(flat, UNTOUCHED, budget).values()] == [3, 3, 2]


def test_no_bytes_for_components_without_energy():
    layers = [layer("net.zero", [0.0] * 4), layer("net.deficient", [3.0, 1.0, 0.0, 0.0]), layer("net.row", [2.0], m=1)]
    assert allocate(layers, UNTOUCHED, 10**6) == {
        "net.zero": LayerRanks(1, 1), "net.deficient": LayerRanks(2, 2), "net.row": LayerRanks(1, 1),
    }  # fmt: skip


def test_only_absolute_energy_knows_the_size_of_weights():
    large, small = layer("net.large", [30.0, 20.0, 10.0]), layer("net.small", [0.3, 0.2, 0.1])
    budget = bytes_of([large, small], [LayerRanks(2, 2), LayerRanks(2, 2)])
    assert [own.kept for own in allocate([large, small], UNTOUCHED, budget).values()] == [2, 2]
    assert [own.kept for own in allocate([large, small], UNTOUCHED, budget, energy="absolute").values()] == [2, 2]
    tight = bytes_of([large, small], [LayerRanks(3, 3), LayerRanks(1, 1)])
    assert [own.kept for own in allocate([large, small], UNTOUCHED, tight, energy="absolute").values()] == [3, 1]
    assert [own.kept for own in allocate([large, small], UNTOUCHED, tight).values()] == [2, 2]


def test_beta_bounds_what_is_trained():
    spectrum = [4.0, 2.0, 1.0, 0.5]
    (ranks,) = allocate([layer("net.0", spectrum, beta=0.9)], UNTOUCHED, 10**6).values()
    assert ranks == LayerRanks(4, energy_rank(torch.tensor(spectrum), 0.9)) == LayerRanks(4, 2)


def occupied(model: nn.Module) -> int:
    """Bytes of a model that was injected, its gradients and AdamW's state, after a step."""
    trained = cersa.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained)
    sum(parameter.sum() for parameter in trained).backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained), *states]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ranks_in(model: nn.Module) -> dict[str, LayerRanks]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CersaLinear)}
    return {name: LayerRanks(module.kept_rank, module.cores["default"].rank) for name, module in layers.items()}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.6}, {"beta": 0.6, "block": "bottom"}, {"core": "diagonal"}])
def test_injection_and_plan_come_to_the_same_and_fill_the_budget(network, settings):
    config = CersaConfig(memory_budget="20kB", rank_multiple=1, **settings)
    plan = plan_memory(network, config, show_progress=False)
    report = cersa.inject_cersa(network, config, show_progress=False)
    assert ranks_in(network) == {row.name.removeprefix("model."): LayerRanks(row.kept_rank, row.core_rank) for row in plan.layers}
    assert [row.kept_energy for row in report.layers] == [row.kept_energy for row in plan.layers]
    assert 0.95 * 20_000 < occupied(network) == plan.totals()["whole_model"]["cersa"].total <= 20_000


def test_components_share_one_budget(network):
    wide = copy.deepcopy(network)
    nn.init.orthogonal_(wide[2].weight)  # flat: what it needs, the others have to give
    components, config = {"unet": network, "text_encoder": wide}, CersaConfig(memory_budget=150_000)
    chosen = choose_ranks(components, config, show_progress=False)
    plan = plan_memory(components, dict.fromkeys(components, config), show_progress=False)
    for name, model in components.items():
        cersa.inject_cersa(model, config, ranks=chosen[name], show_progress=False)
        assert ranks_in(model) == chosen[name]
    assert {row.name: row.kept_rank for row in plan.layers} == {
        f"{component}.{name}": ranks.kept for component, layers in chosen.items() for name, ranks in layers.items()
    }
    sizes = [occupied(model) for model in components.values()]
    assert 120_000 < sum(sizes) == plan.totals()["whole_model"]["cersa"].total <= 150_000
    assert sizes[0] != pytest.approx(sizes[1], rel=0.05)


def test_conditions_of_training_count(network):
    config = CersaConfig(memory_budget=60_000, rank_multiple=1)
    tokens = {f"model.{name}": LayerInput(40) for name in "024"}
    for conditions in ({}, {"optimizer": "sgd"}, {"weight_dtype": torch.bfloat16}, {"tokens": tokens}):
        plan = plan_memory(network, config, show_progress=False, **conditions)
        chosen = choose_ranks(network, config, show_progress=False, **conditions)["model"]
        assert [row.kept_rank for row in plan.layers] == [ranks.kept for ranks in chosen.values()]
        assert 0.97 * 60_000 < plan.totals()["whole_model"]["cersa"].total <= 60_000
    with raises(ConfigError, "optimizer", "lion"):
        choose_ranks(network, config, optimizer="lion", show_progress=False)


def test_a_budget_that_cannot_be_met_names_the_smallest_and_leaves_the_model(network):
    model = nn.ModuleDict({"norm": nn.LayerNorm(5000), "net": network})
    before = copy.deepcopy(model.state_dict())
    with raises(ConfigError, "memory_budget", "model.norm.weight 0.020 MB", "model.norm.bias 0.020 MB") as error:
        cersa.inject_cersa(model, CersaConfig(memory_budget="41kB"), show_progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    least = int(re.search(r"smallest possible is (\d+)", str(error.value))[1])
    with raises(ConfigError, str(least)):
        cersa.inject_cersa(model, CersaConfig(memory_budget=least - 1), show_progress=False)
    cersa.inject_cersa(model, CersaConfig(memory_budget=least), show_progress=False)
    assert set(ranks_in(model).values()) == {LayerRanks(8, 8)} and occupied(model) == least


def test_layers_may_stay_dense_where_that_keeps_more(network):
    nn.init.orthogonal_(network[4].weight)
    config = CersaConfig(memory_budget=17_000, unprofitable="skip")
    plan = plan_memory(network, config, show_progress=False)
    report = cersa.inject_cersa(network, config, show_progress=False)
    assert report.skipped == ["4"] == [row.name.removeprefix("model.") for row in plan.layers if not row.factored]
    assert occupied(network) == plan.totals()["whole_model"]["cersa"].total <= 20_000
    row = plan.layers[2]
    assert (row.kept_rank, row.core_rank, row.kept_energy) == (24, 0, 1.0) and "stay dense" in str(plan)


def test_a_budget_for_the_dense_model_leaves_nothing_to_train(network):
    config = CersaConfig(memory_budget="1MB", unprofitable="skip")
    with raises(ConfigError, "3"):
        cersa.inject_cersa(network, config, show_progress=False)
    assert not ranks_in(network)


def test_the_plan_says_what_alpha_the_budget_amounts_to(network):
    plan = plan_memory({"net": network}, CersaConfig(memory_budget=60_000), show_progress=False)
    report = cersa.inject_cersa(network, CersaConfig(memory_budget=60_000), show_progress=False)
    for name, row in zip("024", report.layers, strict=True):
        assert plan.alpha_by_kind()[f"net {name}"] == dict.fromkeys(("mean", "lowest", "highest"), row.kept_energy)
        assert f"{row.kept_energy:.3f}" in str(plan)
    assert plan.to_dict()["alpha_by_kind"] == plan.alpha_by_kind() and plan.to_dict()["memory_budget"] == 60_000
    assert "The budget of 0.06 MiB chose the ranks" in str(plan)


def test_an_adapter_of_a_budget_loads_into_the_base(network, tmp_path):
    model = copy.deepcopy(network)
    cersa.inject_cersa(model, CersaConfig(memory_budget=60_000), show_progress=False)
    train(model)
    cersa.save_adapter(model, tmp_path / "a.safetensors", dtype=torch.float32)
    cersa.load_adapter(network, tmp_path / "a.safetensors", show_progress=False)
    assert ranks_in(network) == ranks_in(model)
    x = randn(7, 48)
    torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        ({"0": LayerRanks(1, 1)}, "2 4"),
        ({"0": LayerRanks(41, 1), "2": None, "4": None}, "0 40 48"),
        ({"0": LayerRanks(2, 3), "2": None, "4": None}, "0"),
        ({"0": LayerRanks(2, 0), "2": None, "4": None}, "0"),
    ],
)
def test_ranks_that_do_not_fit_the_model_are_refused(network, ranks, names):
    with raises(ConfigError, *names.split()):
        cersa.inject_cersa(network, CersaConfig(), ranks=ranks, show_progress=False)


def test_components_with_different_budgets_are_refused(network):
    configs = {"a": CersaConfig(memory_budget=1000), "b": CersaConfig()}
    with raises(ConfigError, "memory_budget"):
        choose_ranks({"a": network, "b": copy.deepcopy(network)}, configs, show_progress=False)


def test_choosing_without_a_budget_follows_alpha(network):
    chosen = choose_ranks(network, CersaConfig(alpha=0.8, beta=0.5), show_progress=False)["model"]
    cersa.inject_cersa(network, CersaConfig(alpha=0.8, beta=0.5), show_progress=False)
    assert chosen == ranks_in(network)
