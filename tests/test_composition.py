"""Several adapters on one model, in core space."""

import copy

import pytest
import torch

import cersa_diffusion as cersa
from cersa_diffusion import ConfigError

from .conftest import train


@pytest.fixture
def two(trained):
    """A model with two trained adapters, "default" and "second"."""
    model = trained[1]
    cersa.add_adapter(model, "second")
    cersa.set_adapters(model, "second")
    train(model, steps=10, learning_rate=3e-3)
    return model


def change(model):
    return model[2].weight_change()


def test_adding_trains_only_the_new_adapter(trained):
    model = trained[1]
    cersa.add_adapter(model, "second")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"{i}.cores.second.D" for i in (0, 2, 4)}
    before = model[0].cores["default"].D.clone()
    train(model)
    assert torch.equal(model[0].cores["default"].D, before) and model[0].cores["second"].D.abs().max() > 0


def test_switching_and_mixing_is_linear_in_the_cores(two):
    cersa.set_adapters(two, "default")
    first = change(two)
    cersa.set_adapters(two, ["second"])
    second = change(two)
    assert cersa.active_adapters(two) == {"second": 1.0} and cersa.adapter_names(two) == ["default", "second"]
    cersa.set_adapters(two, ["default", "second"], [0.5, -2.0])
    torch.testing.assert_close(change(two), 0.5 * first - 2 * second)
    cersa.set_adapters(two, ["default", "second"], 0.25)
    torch.testing.assert_close(change(two), 0.25 * (first + second))


def test_disable_and_enable_keep_the_strengths(two):
    x = torch.randn(4, 48)
    cersa.set_adapters(two, ["default", "second"], [0.5, 0.25])
    expected = two(x)
    cersa.disable_adapters(two)
    assert torch.equal(change(two), torch.zeros_like(change(two))) and cersa.active_adapters(two) == {}
    disabled = two(x)
    cersa.enable_adapters(two)
    assert torch.equal(two(x), expected) and not torch.allclose(disabled, expected)
    cersa.set_adapters(two, [])
    assert torch.equal(two(x), disabled)


def test_delete(two):
    cersa.set_adapters(two, "default")
    expected = change(two)
    cersa.delete_adapters(two, "second")
    assert cersa.adapter_names(two) == ["default"] and torch.equal(change(two), expected)
    cersa.add_adapter(two, "second")
    cersa.delete_adapters(two, ["default", "second"])
    assert cersa.adapter_names(two) == [] and two(torch.randn(2, 48)).shape == (2, 24)


def test_mistakes_name_what_is_there_and_change_nothing(two):
    before = copy.deepcopy(two.state_dict())
    active = cersa.active_adapters(two)
    for mistake in (
        lambda: cersa.set_adapters(two, ["default", "third"]),
        lambda: cersa.delete_adapters(two, ["default", "third"]),
        lambda: cersa.add_adapter(two, "fourth", like="third"),
    ):
        with pytest.raises(ConfigError, match=r"'third', this model has \['default', 'second'\]"):
            mistake()
    with pytest.raises(ConfigError, match="already on this model"):
        cersa.add_adapter(two, "second")
    with pytest.raises(ConfigError, match="2 adapters and 1 weights"):
        cersa.set_adapters(two, ["default", "second"], [1.0])
    assert cersa.active_adapters(two) == active and two.state_dict().keys() == before.keys()


def test_each_adapter_saves_its_own_file(two, trained, tmp_path):
    base = trained[0]
    for name in ("default", "second"):
        cersa.save_adapter(two, tmp_path / f"{name}.safetensors", adapter_name=name, dtype=torch.float32)
        cersa.load_adapter(base, tmp_path / f"{name}.safetensors", adapter_name=name, show_progress=False)
    cersa.set_adapters(two, ["default", "second"], [0.7, 0.3])
    cersa.set_adapters(base, ["default", "second"], [0.7, 0.3])
    torch.testing.assert_close(change(base), change(two), rtol=1e-4, atol=1e-6)
