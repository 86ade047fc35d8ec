"""Injection into whole models: which layers, all or nothing, and the ways back."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaLinear, ConfigError, NonFiniteError
from cersa_diffusion.config import svfit_config, svft_config
from cersa_diffusion.functional import Decomposition
from cersa_diffusion.layers.kinds import build_layer
from cersa_diffusion.weights.stored import FinestWeight

from .conftest import DEVICE, frozen_parameters, raises, randn, train


def test_only_cores_train_and_frozen_factors_do_not_move(network):
    cersa.inject_cersa(network, CersaConfig(alpha=0.9), show_progress=False)
    frozen = {name: tensor.clone() for name, tensor in frozen_parameters(network).items()}
    biases = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {f"{i}.cores.default.D" for i in (0, 2, 4)}
    train(network)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_parameters(network).items())
    assert all(torch.equal(network.get_parameter(name), bias) for name, bias in biases.items())


def test_report_counts_what_is_there(network):
    report = cersa.inject_cersa(network, CersaConfig(alpha=0.9, beta=0.6, rank_multiple=2), show_progress=False)
    layers = [module for module in network.modules() if isinstance(module, CersaLinear)]
    assert [row.kept_rank for row in report.layers] == [layer.kept_rank for layer in layers]
    assert report.trainable_parameters == sum(p.numel() for p in cersa.trainable_parameters(network))
    bases = [tensor for name, tensor in frozen_parameters(network).items() if not name.endswith("bias")]
    assert report.frozen_parameters == sum(tensor.numel() for tensor in (*bases, *network.buffers()))
    assert all(row.kept_energy >= 0.9 and row.core_rank < row.kept_rank for row in report.layers)


def test_alpha_one_leaves_the_output(network):
    x = randn(8, 48)
    expected = network(x)
    cersa.inject_cersa(network, CersaConfig(alpha=1.0), show_progress=False)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [("all-linear", None, "024"), (["2"], None, "2"), (r"[02]", None, "02"), ("all-linear", ["0", "4"], "2")],
)
def test_targets(network, targets, excluded, expected):
    config = CersaConfig(target_modules=targets, exclude_modules=excluded)
    report = cersa.inject_cersa(network, config, show_progress=False)
    assert [row.name for row in report.layers] == list(expected)


def test_targets_that_match_nothing_list_what_could_have(network):
    with raises(ConfigError, "to_q", "0", "2", "4"):
        cersa.inject_cersa(network, CersaConfig(target_modules=["to_q"]), show_progress=False)


def test_injecting_twice_is_refused(network):
    cersa.inject_cersa(network, CersaConfig(), show_progress=False)
    with raises(ConfigError, "3", "CERSA"):
        cersa.inject_cersa(network, CersaConfig(), show_progress=False)


def test_a_damaged_weight_names_its_layer_and_leaves_the_model(network):
    network[4].weight.data[0, 0] = torch.nan
    before = copy.deepcopy(network.state_dict())
    with raises(NonFiniteError, "4"):
        cersa.inject_cersa(network, CersaConfig(), show_progress=False)
    assert not any(isinstance(module, CersaLinear) for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) or "4.weight" in name for name, tensor in network.state_dict().items())


def test_shared_and_meta_weights_are_refused():
    tied = nn.ModuleDict({"embedding": nn.Embedding(9, 6), "head": nn.Linear(6, 9)})
    tied["head"].weight = tied["embedding"].weight
    with raises(ConfigError, "head", "embedding.weight"):
        cersa.inject_cersa(tied, CersaConfig(), show_progress=False)
    with raises(ConfigError, "0", "meta"):
        cersa.inject_cersa(nn.Sequential(nn.Linear(3, 3, device="meta")), CersaConfig(), show_progress=False)


def test_zero_and_rank_deficient_weights(network):
    network[0].weight.data.zero_()
    network[2].weight.data[:, 1:] = 0
    expected = network(randn(4, 48, generator=torch.Generator().manual_seed(0)))
    report = cersa.inject_cersa(network, CersaConfig(alpha=1.0, rank_multiple=1), show_progress=False)
    assert [row.kept_rank for row in report.layers][:2] == [1, 1]
    actual = network(randn(4, 48, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_merge_gives_plain_layers_with_the_same_output(trained):
    _, model = trained
    x = randn(8, 48)
    expected = model(x)
    cersa.merge(model)
    assert {type(module) for module in model if not isinstance(module, nn.GELU)} == {nn.Linear}
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_restore_base_is_bit_for_bit(network):
    before = copy.deepcopy(network)
    cersa.inject_cersa(network, CersaConfig(alpha=0.5), keep_base=True, show_progress=False)
    train(network)
    cersa.restore_base(network)
    assert str(network) == str(before)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.state_dict().items())


def test_restore_base_without_the_base_says_so(trained):
    with raises(ConfigError, "keep_base"):
        cersa.restore_base(trained[1])
    assert isinstance(trained[1][0], CersaLinear)


def test_attention_that_reads_its_own_weight_is_left_alone():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(DEVICE)
    report = cersa.inject_cersa(model, CersaConfig(), show_progress=False)
    assert [row.name for row in report.layers] == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("settings", "kept", "trained", "offset"),
    [
        ({"rank": 5}, 5, 25, 0),
        ({"rank": 1000}, 24, 576, 0),
        ({"rank": 5, "core": "diagonal", "residual": "keep"}, 5, 5, 0),
        ({"alpha": 0.95, "beta": 0.5, "rank_multiple": 2, "block": "bottom"}, None, None, None),
    ],
)
def test_settings_of_ranks_and_cores(network, settings, kept, trained, offset):
    cersa.inject_cersa(network, CersaConfig(**settings), show_progress=False)
    layer, core = network[4], network[4].cores["default"]
    if kept is None:
        assert core.offset == layer.kept_rank - core.rank > 0
    else:
        assert (layer.kept_rank, core.offset) == (kept, offset)
        assert sum(parameter.numel() for parameter in core.parameters()) == trained
    train(network, steps=2)
    assert layer.weight_change().abs().max() > 0


def test_svfit_and_svft_count_their_parameters_as_in_the_papers(network):
    first, second, third = network, copy.deepcopy(network), copy.deepcopy(network)
    x = randn(8, 48)
    expected = network(x)
    report = cersa.inject_cersa(first, svfit_config(rank=30), show_progress=False)
    assert [row.core_parameters for row in report.layers] == [30, 30, 24]
    torch.testing.assert_close(first(x), expected, rtol=1e-4, atol=1e-5)
    # SVFT-plain trains p values and the gate, banded p (2 d + 1) - d (d + 1) and the gate.
    plain = cersa.inject_cersa(second, svft_config(), show_progress=False)
    assert [row.core_parameters for row in plain.layers] == [41, 41, 25]
    banded = cersa.inject_cersa(third, svft_config("top_k", off_diagonals=2), show_progress=False)
    assert [row.core_parameters for row in banded.layers] == [p * 5 - 6 + 1 for p in (40, 40, 24)]


def test_top_k_of_a_layer_that_keeps_fewer_components_names_the_layer(network):
    network[2].weight.data[:, 1:] = 0
    with raises(ConfigError, "2", "sparse_pattern", "top_k", "1", "40", "exclude_modules", "banded", "random"):
        cersa.inject_cersa(network, svft_config("top_k"), show_progress=False)
    assert not any(isinstance(module, CersaLinear) for module in network.modules())


def test_unprofitable_layers_can_be_left_dense(network):
    network[4].weight.data.copy_(torch.linalg.qr(randn(64, 24)).Q.T)  # flat spectrum: every component counts
    report = cersa.inject_cersa(network, CersaConfig(alpha=0.9, unprofitable="skip"), show_progress=False)
    assert report.skipped == ["4"] and isinstance(network[4], nn.Linear) and "1 left dense" in str(report)
    assert not network[4].weight.requires_grad
    flat = nn.Sequential(nn.Linear(24, 24)).to(DEVICE)
    flat[0].weight.data.copy_(torch.eye(24))
    with raises(ConfigError, "unprofitable", "alpha"):
        cersa.inject_cersa(flat, CersaConfig(unprofitable="skip"), show_progress=False)
    assert isinstance(flat[0], nn.Linear) and flat[0].weight.requires_grad


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 asks for a driver for fake tensors of a GPU as well")
def test_the_residual_is_where_the_weight_is():
    """Bases from the cache come on the CPU; on fake tensors, whose devices are checked as those of a GPU."""
    with FakeTensorMode():
        linear = nn.Linear(8, 6, device="cuda")
        factors = Decomposition(torch.empty(6, 6), torch.empty(6), torch.empty(6, 8))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cersa_diffusion.layers.kinds.base_entries", lambda weight: ())
            layer = build_layer(linear, factors, 6, FinestWeight(linear.weight), dtype=linear.weight.dtype, keep_residual=True)
        assert layer.R.device == layer.U.device == linear.weight.device != factors.U.device


def test_a_model_that_looks_at_the_dtype_of_its_layers():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 20}
    model = T5EncoderModel(T5Config(**sizes)).eval().to(DEVICE)
    ids = torch.arange(6, device=DEVICE)[None]
    with torch.no_grad():
        before = model(ids).last_hidden_state
        cersa.inject_cersa(model, CersaConfig(alpha=1.0), show_progress=False)
        assert torch.allclose(model(ids).last_hidden_state, before, atol=1e-5)


class QuantisedTensor(torch.Tensor):
    """As of torchao: claims a floating dtype, and its numbers are not in its storage."""


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.zeros(6, 8).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(6, 8).to(torch.int8), "int8"),
        (torch.zeros(6, 8).as_subclass(QuantisedTensor), "QuantisedTensor"),
    ],
)
def test_quantised_weights_are_refused_by_name(weight, named):
    model = nn.Sequential(nn.Linear(8, 6))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with raises(ConfigError, "layer 0", named):
        cersa.inject_cersa(model, CersaConfig(), show_progress=False)
    assert type(model[0]) is nn.Linear
