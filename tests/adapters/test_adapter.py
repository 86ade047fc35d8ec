"""Adapter files after training: the same weight change in other coordinates and dtypes, or a reason."""

import copy
import json
import os
import stat

import pytest
import safetensors
import scipy.linalg
import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import AdapterFormatError, BaseMismatchError, CersaConfig, CersaLinear, ConfigError, NonFiniteError
from cersa_diffusion.adapters.file import read_adapter_file
from cersa_diffusion.config import svfit_config, svft_config
from cersa_diffusion.functional import Decomposition, Pivots, decompose
from cersa_diffusion.layers.model import cersa_layers

from ..adapter_files import damage
from ..conftest import DEVICE, raises, randn, train, warns


@pytest.fixture
def adapter(trained, tmp_path):
    """(untouched network, trained network, adapter file)."""
    path = tmp_path / "adapter.safetensors"
    cersa.save_adapter(trained[1], path)
    return *trained, path


def change_errors(model: nn.Module, expected: nn.Module) -> list[float]:
    """Relative Frobenius error of every layer's weight change."""
    errors = []
    for name, layer in expected.named_modules():
        if isinstance(layer, CersaLinear):
            change = layer.weight_change()
            errors.append(float((model.get_submodule(name).weight_change() - change).norm() / change.norm()))
    assert errors
    return errors


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.005), (torch.float16, 0.01), (torch.bfloat16, 0.04)])
def test_weight_change_survives_a_base_of_another_dtype(adapter, dtype, limit):
    base, model, path = adapter
    base.to(dtype)
    cersa.load_adapter(base, path, show_progress=False)
    assert base[0].U.dtype == dtype
    assert max(change_errors(base, model)) <= limit


def test_weight_change_survives_other_singular_vectors(adapter, monkeypatch):
    base, model, path = adapter

    def other_solver(weight):
        U, s, Vh = decompose(weight)
        signs = torch.where(torch.arange(len(s), device=s.device) % 3 == 0, -1.0, 1.0).double()
        return Decomposition(U * signs, s, signs[:, None] * Vh)

    monkeypatch.setenv("CERSA_CACHE", "off")
    monkeypatch.setattr("cersa_diffusion.weights.cache.decompose", other_solver)
    cersa.load_adapter(base, path, show_progress=False)
    assert not torch.allclose(base[0].cores["default"].D, model[0].cores["default"].D)
    assert max(change_errors(base, model)) <= 0.005


def test_float32_storage_is_exact_to_rounding(trained, tmp_path):
    base, model = trained
    cersa.save_adapter(model, tmp_path / "a.safetensors", dtype=torch.float32)
    cersa.load_adapter(base, tmp_path / "a.safetensors", show_progress=False)
    assert max(change_errors(base, model)) <= 1e-5


def test_tiny_changes_do_not_drown_in_sixteen_bits(trained, tmp_path):
    base, model = trained
    for layer in (model[0], model[2], model[4]):
        layer.cores["default"].D.data.mul_(1e-7)
    cersa.save_adapter(model, tmp_path / "a.safetensors")
    cersa.load_adapter(base, tmp_path / "a.safetensors", show_progress=False)
    assert max(change_errors(base, model)) <= 0.005


def test_strength_scales_and_zero_is_the_truncated_base(adapter):
    base, model, path = adapter
    half, none = copy.deepcopy(base), copy.deepcopy(base)
    cersa.load_adapter(half, path, strength=0.5, show_progress=False)
    cersa.load_adapter(none, path, strength=0.0, show_progress=False)
    torch.testing.assert_close(half[2].weight_change() * 2, model[2].weight_change(), rtol=0.02, atol=1e-4)
    assert torch.equal(none[2].weight_change(), torch.zeros(64, 40, dtype=torch.float64, device=DEVICE))


def test_two_adapters_add_up_in_one_model(adapter):
    base, model, path = adapter
    cersa.load_adapter(base, path, adapter_name="a", show_progress=False)
    cersa.load_adapter(base, path, adapter_name="b", strength=-0.25, show_progress=False)
    torch.testing.assert_close(base[0].weight_change(), 0.75 * model[0].weight_change(), rtol=0.02, atol=1e-4)
    with raises(ConfigError, "'b'", "adapter_name"):
        cersa.load_adapter(base, path, adapter_name="b", show_progress=False)


def test_another_base_is_named_and_not_touched(adapter):
    base, _, path = adapter
    other = copy.deepcopy(base)
    torch.manual_seed(7)
    other[2].weight.data.copy_(torch.randn_like(other[2].weight))
    before = copy.deepcopy(other.state_dict())
    with raises(BaseMismatchError, path.name, "1 of 3 layers", "model.2", "allow_base_mismatch"):
        cersa.load_adapter(other, path, show_progress=False)
    with raises(BaseMismatchError, path.name, "1 of 3 layers", "model.4", "(8, 64)", "(24, 64)"):
        cersa.load_adapter(nn.Sequential(*base[:4], nn.Linear(64, 8)), path, show_progress=False)
    with raises(BaseMismatchError, path.name, "1 of 3 layers", "model.4") as missing:
        cersa.load_adapter(nn.Sequential(*base[:3]), path, show_progress=False)
    # The layer itself is not there: this is about neither its shape nor its weights.
    assert "shape" not in str(missing.value) and "allow_base_mismatch" not in str(missing.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_header_carries_settings_and_facts(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    cersa.save_adapter(trained[1], path, config={"model": {"alpha": 0.9}}, base_model={"name_or_path": "x"}, training={"seed": 3})
    header = read_header(path)
    assert header["training"] == {"seed": 3} and header["base_model"] == {"name_or_path": "x"}
    layers = header["layers"]
    assert layers["model.0"]["m"] == 40 and layers["model.0"]["k"] == trained[1][0].kept_rank
    assert header["config"] == {"model": {"alpha": 0.9}}


def test_settings_in_the_header_are_read_again(trained, tmp_path):
    path, config = tmp_path / "a.safetensors", CersaConfig(alpha=0.9, rank_multiple=16, uniform_blocks=True)
    cersa.save_adapter(trained[1], path, config={"model": config.to_dict()})
    written = read_header(path)["config"]["model"]
    assert (written["rank_multiple"], written["uniform_blocks"]) == (16, True)
    assert CersaConfig.from_dict(read_adapter_file(path).config["model"]) == config


def test_of_a_base_in_a_folder_the_file_has_the_name_alone(trained, tmp_path, monkeypatch):
    path, folder = tmp_path / "a.safetensors", tmp_path / "models" / "cats"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    written = {}
    for name in (str(folder), "models/cats", "./models/cats", "/no/longer/there/cats", "someone/cats", None):
        base = {"name_or_path": name, "revision": "v1"}
        cersa.save_adapter(trained[1], path, base_model=base)
        assert str(tmp_path).encode() not in path.read_bytes()
        written[name] = read_header(path)["base_model"]
        assert written[name].pop("revision") == "v1" and base["name_or_path"] == name
    assert written.pop("someone/cats") == {"name_or_path": "someone/cats"} and written.pop(None) == {"name_or_path": None}
    assert {base["name_or_path"] for base in written.values()} == {"cats"}


def test_file_follows_the_umask_and_saving_twice_gives_the_same_bytes(trained, tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    umask = os.umask(0o022)
    try:
        cersa.save_adapter(trained[1], first)
        cersa.save_adapter(trained[1], second)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(first.stat().st_mode) == 0o644
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_diverged_adapter_is_not_written_over_a_good_one(adapter):
    _, model, path = adapter
    good = path.read_bytes()
    model[2].cores["default"].D.data[0, 0] = torch.nan
    with raises(NonFiniteError, "model.2"):
        cersa.save_adapter(model, path)
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]


def read_header(path) -> dict:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["cersa"])


def test_tensors_and_header_that_do_not_fit_are_named_together(adapter):
    _, model, path = adapter
    damage(path, lambda header, tensors: (tensors.pop("model.2.rows"), tensors.update(extra=torch.zeros(1))))
    with raises(AdapterFormatError, path.name, "['model.2.rows']", "['extra']"):
        cersa.load_adapter(model, path, adapter_name="again")


def test_a_missing_file_and_an_adapter_that_is_not_there(network, tmp_path):
    with raises(AdapterFormatError, "nothing.safetensors", "pytorch_cersa_weights.safetensors"):
        cersa.load_adapter(network, tmp_path / "nothing.safetensors")
    with raises(ConfigError, "'default'", "inject"):
        cersa.save_adapter(network, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        CersaConfig(alpha=0.95, beta=0.6, block="bottom"),
        CersaConfig(rank=6, core="diagonal"),
        svfit_config(rank=12),
        svft_config("random", off_diagonals=1),
    ],
    ids=["bottom", "diagonal", "svfit", "svft"],
)
def test_every_setting_saves_and_loads(network, config, tmp_path):
    torch.manual_seed(2)
    model = copy.deepcopy(network)
    cersa.inject_cersa(model, config, show_progress=False)
    train(model)
    cersa.save_adapter(model, tmp_path / "a.safetensors")
    cersa.load_adapter(network, tmp_path / "a.safetensors", show_progress=False)
    assert max(change_errors(network, model)) <= 0.005
    x = randn(8, 48)
    torch.testing.assert_close(network(x), model(x), rtol=5e-3, atol=5e-3)
    cersa.restore_base(network)
    assert isinstance(network[0], nn.Linear)


def test_a_file_whose_pivots_are_those_of_a_pivoted_qr_loads_as_exactly(trained, tmp_path):
    """As earlier releases chose them."""
    base, model = trained
    for layer in cersa_layers(model).values():
        orders = [scipy.linalg.qr(basis.double().cpu().numpy(), mode="r", pivoting=True)[1] for basis in (layer.U.T, layer.Vh)]
        rows, columns = (torch.from_numpy(order[: layer.kept_rank]).long() for order in orders)
        assert not torch.equal(rows, layer.pivots(layer.kept_rank).rows)
        layer._pivots = {0: Pivots(rows, columns)}
    cersa.save_adapter(model, tmp_path / "a.safetensors", dtype=torch.float32)
    cersa.load_adapter(base, tmp_path / "a.safetensors", show_progress=False)
    assert max(change_errors(base, model)) <= 1e-5


def test_pivots_are_chosen_once_and_with_the_decomposition(trained, tmp_path, monkeypatch):
    _, model = trained

    def chosen_again(U, Vh):
        raise AssertionError("pivots were chosen again")

    monkeypatch.setattr("cersa_diffusion.layers.linear.choose_pivots", chosen_again)
    cersa.save_adapter(model, tmp_path / "a.safetensors")
    model.load_state_dict(model.state_dict())  # may bring other bases
    with raises(AssertionError, "pivots were chosen again"):
        cersa.save_adapter(model, tmp_path / "b.safetensors")


def trained_with(network: nn.Module, path, **settings) -> nn.Module:
    """Trained with exact ranks: rounded, those of different alphas would be equal in layers as small as these."""
    model = copy.deepcopy(network)
    cersa.inject_cersa(model, CersaConfig(rank_multiple=1, **settings), show_progress=False)
    train(model)
    cersa.save_adapter(model, path, dtype=torch.float32)
    return model


@pytest.mark.parametrize(("first", "second"), [({"alpha": 0.95}, {"alpha": 0.8}), ({"alpha": 0.8}, {"alpha": 0.95, "beta": 0.6})])
def test_adapters_of_different_alpha_on_one_model(network, first, second, tmp_path):
    """Exact where the second one's core lies within what the first one's layers keep; the truncated base is the first one's."""
    trained_with(network, tmp_path / "a.safetensors", **first)
    expected = trained_with(network, tmp_path / "b.safetensors", **second)
    model = copy.deepcopy(network)
    cersa.load_adapter(model, tmp_path / "a.safetensors", adapter_name="a", show_progress=False)
    truncated = [layer.effective_weight({}) for layer in cersa_layers(model).values()]
    with warns(UserWarning, "b.safetensors", "3 of 3 layers", "model.0"):
        cersa.load_adapter(model, tmp_path / "b.safetensors", adapter_name="b", show_progress=False)
    alone = {"b": 1.0}
    for name, layer in cersa_layers(expected).items():
        change = layer.weight_change()
        error = (model.get_submodule(name).weight_change(alone) - change).norm() / change.norm()
        assert error < 1e-5
    assert all(
        torch.equal(layer.effective_weight({}), base) for layer, base in zip(cersa_layers(model).values(), truncated, strict=True)
    )
    # Saved again it is the adapter that it was, with the truncation it was trained on.
    cersa.save_adapter(model, tmp_path / "c.safetensors", adapter_name="b", dtype=torch.float32)
    again = copy.deepcopy(network)
    cersa.load_adapter(again, tmp_path / "c.safetensors", show_progress=False)
    for name, layer in cersa_layers(expected).items():
        assert again.get_submodule(name).kept_rank == layer.kept_rank
        torch.testing.assert_close(again.get_submodule(name).effective_weight(), layer.effective_weight(), rtol=1e-4, atol=1e-5)
    cersa.delete_adapters(model, "b")
    assert cersa.adapter_names(model) == ["a"]


def test_an_adapter_that_changes_more_than_is_kept_is_refused(network, tmp_path):
    small = trained_with(network, tmp_path / "small.safetensors", alpha=0.8)
    large = trained_with(network, tmp_path / "large.safetensors", alpha=0.95)
    cersa.load_adapter(network, tmp_path / "small.safetensors", show_progress=False)
    with raises(ConfigError, "model.0", str(small[0].kept_rank), str(large[0].kept_rank)):
        cersa.load_adapter(network, tmp_path / "large.safetensors", adapter_name="large", show_progress=False)
    assert cersa.adapter_names(network) == ["default"]


def test_bases_are_saved_as_far_as_they_are_here(network, tmp_path):
    for name, settings in (("small", {"alpha": 0.8}), ("block", {"alpha": 0.95, "beta": 0.6})):
        trained_with(network, tmp_path / f"{name}.safetensors", **settings)
    cersa.load_adapter(network, tmp_path / "small.safetensors", adapter_name="small", show_progress=False)
    with warns(UserWarning, "block.safetensors", "3 of 3 layers", "model.0"):
        cersa.load_adapter(network, tmp_path / "block.safetensors", adapter_name="block", show_progress=False)
    cersa.save_adapter(network, tmp_path / "whole.safetensors", adapter_name="block", save_bases=True)
    saved = read_adapter_file(tmp_path / "whole.safetensors").layers
    for name, layer in cersa_layers(network).items():
        assert saved[f"model.{name}"].kept_rank == saved[f"model.{name}"].bases.U.shape[1] == layer.kept_rank
