"""The memory plan against what tensors really occupy, what autograd really keeps, and the paper's formulas."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.config import LayerRanks, svfit_config, svft_config
from cersa_diffusion.layers.model import match_targets
from cersa_diffusion.memory.cost import LayerInput, adamw8bit_bytes, is_profitable
from cersa_diffusion.memory.plan import METHODS, MemoryUse, layer_kind, plan_memory
from cersa_diffusion.memory.plot import compression_rate, plot_plan
from cersa_diffusion.memory.tokens import count_tokens
from cersa_diffusion.pipelines.tokens import pipeline_tokens
from cersa_diffusion.weights.cache import DecompositionCache

from ..conftest import DEVICE, raises, randn

LORA_RANK = 5
CONFIG = CersaConfig(alpha=0.9, beta=0.7)
# Every kind of core, with and without the residual: the table of docs/method.md.
VARIANTS = {
    "diagonal": CersaConfig(alpha=0.9, beta=0.7, core="diagonal"),
    "bottom": CersaConfig(alpha=0.9, beta=0.7, block="bottom"),
    "one rank": CersaConfig(rank=7),
    "residual": CersaConfig(alpha=0.6, residual="keep"),
    "svfit": svfit_config(rank=9),
    "svft": svft_config(),
    "svft banded": svft_config("banded", 2),
    "svft random": svft_config("random", 100),
    "svft top-k": svft_config("top_k", 1),
}
REAL_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}


@pytest.fixture
def mixed(network) -> nn.Module:
    """The small network with what no method touches: a norm, a convolution, and a buffer of integers."""
    model = nn.Sequential(nn.Unflatten(1, (3, 16)), nn.Conv1d(3, 3, 1), nn.Flatten(), nn.LayerNorm(48), *network)
    model.register_buffer("positions", torch.arange(7))
    return model


class Attention(nn.Module):
    """Three layers that are given the same tensor, one of them as a view, one that is given its own, one that never runs."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, 20, bias=bias) for bias in (True, True, False))
        self.to_out = nn.ModuleList([nn.Linear(20, 24)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.to_out[0](self.to_q(x) + self.to_k(x) + self.to_v(x.view(-1, 24)).view(*x.shape[:-1], 20))


def prepare(model: nn.Module, method: str, dtype: torch.dtype, config: CersaConfig = CONFIG) -> None:
    """What the trainer does to a model."""
    names = list(match_targets(model, config.target_modules))
    if method == "cersa":
        cersa.inject_cersa(model, config, show_progress=False)
    elif method == "lora":
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names), model)
    else:
        model.requires_grad_(False)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
    if method != "full":
        model.to(dtype)
        cast_training_params(model, dtype=torch.float32)


def occupied(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured(model: nn.Module, optimizer: str, dtype: torch.dtype = torch.float32) -> MemoryUse:
    """What the tensors of a prepared model occupy after a step, all but activations."""
    trained = cersa.trainable_parameters(model.to(DEVICE))
    steps = REAL_OPTIMIZERS[optimizer](trained, lr=1e-3)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(randn(4, 48)).float().square().mean().backward()
    steps.step()
    return MemoryUse(
        frozen=occupied([p for p in model.parameters() if not p.requires_grad]) + occupied(model.buffers()),
        trained=occupied(trained),
        gradients=occupied(p.grad for p in trained),
        optimizer=occupied(t for state in steps.state.values() for t in state.values() if isinstance(t, torch.Tensor)),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", REAL_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors_after_a_step(mixed, method, optimizer, dtype):
    plan = plan_memory(mixed, CONFIG, lora_rank=LORA_RANK, optimizer=optimizer, weight_dtype=dtype, show_progress=False)
    prepare(mixed, method, dtype)
    assert plan.totals()["whole_model"][method] == measured(mixed, optimizer, dtype)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("optimizer", REAL_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_every_kind_of_core(mixed, config, optimizer, dtype):
    plan = plan_memory(mixed, config, optimizer=optimizer, weight_dtype=dtype, show_progress=False)
    prepare(mixed, "cersa", dtype, config)
    assert plan.totals()["whole_model"]["cersa"] == measured(mixed, optimizer, dtype)


def kept_by_autograd(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes that a forward pass saves for the backward pass, every storage once, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32),
    ):
        model(x.clone())  # not a leaf, as inside a model: autocast would keep one cast of a leaf for all layers
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_are_what_autograd_keeps(method, dtype):
    check_activations(method, dtype, CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CersaConfig(alpha=0.9), *VARIANTS.values()], ids=["alpha", *VARIANTS])
def test_saved_activations_of_every_kind_of_core(dtype, config):
    check_activations("cersa", dtype, config)


def check_activations(method: str, dtype: torch.dtype, config: CersaConfig) -> None:
    model, x = nn.Sequential(nn.Linear(48, 40)).to(DEVICE), randn(3, 11, 48).requires_grad_()
    tokens = {"model.0": LayerInput(33)}
    plan = plan_memory(model, config, lora_rank=LORA_RANK, weight_dtype=dtype, tokens=tokens, show_progress=False)
    prepare(model, method, dtype, config)
    assert plan.layers[0].memory[method].activations == kept_by_autograd(model, x, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_of_several_layers_is_kept_once_in_float32(method, dtype):
    model, x = Attention().to(DEVICE), randn(2, 7, 24).requires_grad_()
    tokens = count_tokens(model, lambda: model(x))
    plan = plan_memory(model, CONFIG, lora_rank=LORA_RANK, weight_dtype=dtype, tokens=tokens, show_progress=False)
    prepare(model, method, dtype)
    assert plan.totals()["target_layers"][method].activations == kept_by_autograd(model, x, dtype)


def test_tokens_are_counted_with_and_without_data():
    model, x = Attention().to(DEVICE), randn(2, 7, 24)
    tokens = count_tokens(model, lambda: model(x))
    assert {name: given.rows for name, given in tokens.items()} == {
        "model.to_q": 14, "model.to_k": 14, "model.to_v": 14, "model.to_out.0": 14, "model.unused": 0,
    }  # fmt: skip
    assert tokens["model.to_q"] == tokens["model.to_k"] == tokens["model.to_v"] != tokens["model.to_out.0"]

    def without_data():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.zeros(2, 7, 24, device=DEVICE))

    assert count_tokens({"model": model}, without_data) == tokens
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Sequential(nn.Linear(6, 6))
    assert count_tokens(layer, lambda: layer(layer(torch.zeros(5, 6)))) == {"model.0": LayerInput(10)}


def test_an_input_kept_by_a_layer_that_is_no_target_counts():
    model, x = Attention().to(DEVICE), randn(2, 7, 24)
    tokens = count_tokens(model, lambda: model(x))
    plan = plan_memory(model, CersaConfig(target_modules=["to_k", "to_v"]), tokens=tokens, show_progress=False)
    assert [layer.memory["full"].activations for layer in plan.layers] == [14 * 24 * 4, 0]


def test_pipeline_tokens_are_those_of_a_real_pass(base_path):
    from cersa_diffusion.pipelines.open import load_base

    pipeline = load_base(str(base_path))
    unet, text_encoder, length = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer.model_max_length

    @torch.no_grad()
    def real():
        states = text_encoder(torch.zeros(1, length, dtype=torch.long))[0].repeat(2, 1, 1)
        unet(torch.zeros(2, unet.config.in_channels, 4, 4), torch.zeros(2, dtype=torch.long), states)

    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    tokens = pipeline_tokens(pipeline, 2, 4 * factor)
    assert tokens == count_tokens({"unet": unet, "text_encoder": text_encoder}, real)
    states = {name: given for name, given in tokens.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(set(states.values())) == 1 and {given.rows for given in states.values()} == {2 * length}
    for batch, resolution, named in (
        (0, 64, "batch 0"),
        (1, 4 * factor + 1, f"resolution {4 * factor + 1}"),
        (1, 0, "resolution 0"),
    ):
        with raises(ConfigError, *named.split()):
            pipeline_tokens(pipeline, batch, resolution)


# Method -> Table 1's total for weights, gradients and two moments, and what ours holds beside it. Every trained tensor has a step
# counter; CERSA and SVFit train a change beside the singular values, SVFT has a gate and needs to know where its entries are
# (two 64-bit indices each). Table 1 writes 2 m n for the whole U and V, which is exact for square layers.
TABLE_1 = {
    "full": lambda m, n, r: (4 * m * n, 1),
    "cersa": lambda m, n, r: (m * r + n * r + 4 * r * r, r + 1),
    "lora": lambda m, n, r: (m * n + 4 * m * r + 4 * n * r, 2),
    "pissa": lambda m, n, r: (m * n + 4 * m * r + 4 * n * r, 2),
    "svfit": lambda m, n, r: (2 * m * n + m + 3 * r, r + 1),
    "svft": lambda m, n, e: (2 * m * n + 4 * e, m + 4 * e + 4 + 2),
}


@pytest.mark.parametrize("method", TABLE_1)
@pytest.mark.parametrize(("m", "n"), [(48, 48), (64, 48), (24, 48)])
def test_measured_bytes_are_those_of_table_1(method, m, n):
    if method.startswith("svf") and m != n:
        pytest.skip("Table 1 counts these for square layers")
    model, trained = nn.Sequential(nn.Linear(n, m, bias=False)), 6
    if method in ("lora", "pissa"):
        start = "pissa" if method == "pissa" else True
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=trained, lora_alpha=6, target_modules=["0"], init_lora_weights=start), model)
    elif method == "svfit":  # as the table counts it: no residual, all components kept, some trained
        every = CersaConfig(core="diagonal")
        cersa.inject_cersa(model, every, ranks={"0": LayerRanks(min(m, n), trained)}, show_progress=False)
    elif method == "svft":
        cersa.inject_cersa(model, svft_config("banded", 2), show_progress=False)
        trained = model[0].cores["default"].values.numel()
        assert trained == sum(len(torch.diagonal(torch.empty(n, n), offset)) for offset in range(-2, 3))
    elif method == "cersa":
        cersa.inject_cersa(model, CersaConfig(rank=trained), show_progress=False)
    formula, beside = TABLE_1[method](m, n, trained)
    assert measured(model, "adamw").total == 4 * (formula + beside)


def test_svfit_costs_less_than_table_1_says():
    # The other components stay together in the dense residual, instead of as singular vectors.
    m = n = 48
    model, r = nn.Sequential(nn.Linear(n, m, bias=False)), 6
    cersa.inject_cersa(model, svfit_config(rank=r), show_progress=False)
    assert measured(model, "adamw").total == 4 * (m * n + m * r + n * r + r + 4 * r + 1) < 4 * (2 * m * n + m + 3 * r)


def test_8_bit_states_follow_bitsandbytes():
    assert adamw8bit_bytes(63, 65) == 2 * 4 * 4095  # under 4,096 numbers: 32-bit
    assert adamw8bit_bytes(64, 64) == 2 * (4096 + 16 * 4)
    assert adamw8bit_bytes(65, 65) == 2 * (4225 + 17 * 4)


def test_a_layer_is_marked_where_factors_are_no_smaller(network):
    for m, n in ((5, 5), (4, 9), (12, 3)):
        for k in range(1, min(m, n) + 1):
            for r in range(1, k + 1):
                numbers = torch.empty(m, k).numel() + torch.empty(k, n).numel() + torch.empty(r, r).numel()
                assert is_profitable(m, n, LayerRanks(k, r), CersaConfig()) == (numbers < torch.empty(m, n).numel())
    nn.init.orthogonal_(network[4].weight)  # a flat spectrum: almost all of it is kept
    plan = plan_memory(network, CONFIG, show_progress=False)
    assert [layer.unprofitable for layer in plan.layers] == [False, False, True] and all(layer.factored for layer in plan.layers)
    assert "1 of 3 layers are marked" in str(plan)


def test_layers_that_are_skipped_stay_dense_and_frozen(network):
    nn.init.orthogonal_(network[4].weight)
    config = dataclasses.replace(CONFIG, unprofitable="skip")
    plan = plan_memory(network, config, tokens={f"model.{i}": LayerInput(9) for i in (0, 2, 4)}, show_progress=False)
    report = cersa.inject_cersa(network, config, show_progress=False)
    assert [layer.name for layer in plan.layers if not layer.factored] == ["model.4"] and report.skipped == ["4"]
    total = plan.totals()["whole_model"]["cersa"]
    assert total.frozen + total.trained == occupied(network.parameters()) + occupied(network.buffers())
    assert plan.layers[2].memory["cersa"].activations == 0 and "1 of them stay dense and frozen" in str(plan)


def test_ranks_are_those_of_the_injection_which_finds_its_decompositions(network, tmp_path, monkeypatch):
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path))
    plan = plan_memory({"net": network}, {"net": CONFIG}, show_progress=False)
    assert DecompositionCache.default().info().entries == 3
    monkeypatch.setattr("cersa_diffusion.weights.cache.decompose", None)
    report = cersa.inject_cersa(network, CONFIG, show_progress=False)
    planned = [(layer.name, layer.kept_rank, layer.core_rank) for layer in plan.layers]
    assert planned == [(f"net.{row.name}", row.kept_rank, row.core_rank) for row in report.layers]


def test_planning_leaves_the_model_alone(mixed):
    before = copy.deepcopy(mixed.state_dict())
    plan_memory(mixed, CONFIG, show_progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixed.state_dict().items())
    assert all(parameter.requires_grad for parameter in mixed.parameters())


def test_kinds_of_layers():
    names = ("mid.attn1.to_q", "attn.to_out.0", "ff.net.2", "ff.net.0.proj", "0", "time_emb.linear_1")
    assert [layer_kind(name) for name in names] == ["to_q", "to_out.0", "net.2", "proj", "0", "linear_1"]


def test_the_report_says_plainly_when_cersa_costs_more(network):
    for alpha, more in ((1.0, True), (0.3, False)):
        plan = plan_memory(network, CersaConfig(alpha=alpha), lora_rank=4, show_progress=False)
        targets = plan.totals()["target_layers"]
        assert (targets["cersa"].total > targets["lora"].total) is more
        assert ("CERSA costs MORE memory than LoRA" in str(plan)) is more
        assert "activations are not counted" in str(plan)


def test_markdown_holds_the_cells_of_the_text(network):
    plan = plan_memory(network, CONFIG, optimizer="adamw8bit", show_progress=False)
    rows = [line for line in plan.to_markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:5]}) == 1 and rows[1].startswith("|---")
    cells = {cell.strip() for line in rows for cell in line.split("|")} - {""}
    assert all(cell in str(plan) for cell in cells if not cell.startswith("--"))
    assert "not measured" in str(plan)


def test_dictionary_is_json_and_adds_up(network):
    values = json.loads(json.dumps(plan_memory(network, CONFIG, lora_rank=3, show_progress=False).to_dict()))
    for method in METHODS:
        total = sum(layer["memory"][method]["total"] for layer in values["layers"])
        assert values["totals"]["target_layers"][method]["total"] == total
        assert values["totals"]["whole_model"][method]["total"] == total + values["untouched"][method]
    assert (values["lora_rank"], values["optimizer"], values["weight_dtype"]) == (3, "adamw", "as loaded")


def test_compression_rate_and_plot(network, tmp_path):
    plan = plan_memory(network, CONFIG, show_progress=False)
    numbers = [(40, 48, 3), (64, 40, 5), (24, 64, 7)]
    expected = sum(m * r + n * r + 4 * r * r for m, n, r in numbers) / sum(m * n for m, n, _ in numbers)
    assert compression_rate(plan.layers, [3, 5, 7]) == pytest.approx(expected)
    plot_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for path in (tmp_path / "none" / "plan.png", tmp_path / "plan.nothing"):
        with raises(ConfigError, str(path), ".png"):
            plot_plan(plan, path)


def test_plot_without_matplotlib_names_the_extra(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plan = plan_memory(network, CONFIG, show_progress=False)
    with raises(ConfigError, "matplotlib", "cersa-diffusion[plot]"):
        plot_plan(plan, tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": "lion"}, "optimizer 'lion' 'adamw'"),
        ({"lora_rank": 0}, "lora_rank 0"),
        ({"tokens": {"model.0": LayerInput(3)}}, "tokens model.2 count_tokens"),
        ({"config": {"unet": CONFIG}}, "['unet'] ['model'] CersaConfig"),
    ],
)
def test_settings_that_cannot_be_planned_are_refused(network, settings, named):
    with raises(ConfigError, *named.split()):
        plan_memory(network, **({"config": CONFIG, "show_progress": False} | settings))
