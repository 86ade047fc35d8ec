"""Opening two checkpoints and pairing their layers: folders, files, adapters, results, and what does not fit."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import cersa_diffusion as cersa
from cersa_diffusion import BaseMismatchError, ConfigError, NonFiniteError
from cersa_diffusion.analysis.models import open_dense, open_pair

from ..conftest import raises

QKV = ["query", "key", "value"]


def changes(pairs) -> dict[str, torch.Tensor]:
    return {pair.name: pair.after().double() - pair.before().double() for pair in pairs}


def test_a_model_and_its_cersa_adapter(trained, tmp_path):
    base, model = trained
    cersa.save_adapter(model, tmp_path / "a.safetensors")
    found = {pair.name: pair.after() for pair in open_pair(base, tmp_path / "a.safetensors")}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, cersa.CersaLinear)}
    assert list(found) == list(layers)
    for name, layer in layers.items():
        assert torch.allclose(found[name], layer.effective_weight(), rtol=0, atol=2e-3 * float(layer.weight_change().abs().max()))
    # In memory as well, and the base is left as it was.
    assert all(torch.equal(pair.after(), layers[pair.name].effective_weight()) for pair in open_pair(base, model))
    assert all(type(layer) is not cersa.CersaLinear for layer in base.modules())


def test_cores_are_merged_where_a_model_of_its_own_is_looked_at(trained, model_path, tmp_path):
    _, model = trained
    expected = {n: m.effective_weight() for n, m in model.named_modules() if isinstance(m, cersa.CersaLinear)}
    dense = open_dense(copy.deepcopy(model))["model"]
    assert expected and all(torch.equal(dense.get_submodule(name).weight, weight) for name, weight in expected.items())
    cersa.compress(model_path("deberta-v3"), tmp_path / "compressed", alpha=0.9)
    names = {name for name, m in open_dense(model_path("deberta-v3"))["model"].named_modules() if type(m) is nn.Linear}
    assert {name for name, m in open_dense(tmp_path / "compressed")["model"].named_modules() if type(m) is nn.Linear} == names


def test_names_with_a_prefix_more_or_less(model_path, tmp_path):
    """A classifier that was saved whole, beside the model without a head that it started from."""
    folder = model_path("bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight += 0.5
    model.save_pretrained(tmp_path)
    moved = {name: float(change.abs().max()) for name, change in changes(open_pair(folder, tmp_path, QKV)).items()}
    assert len(moved) == 6 and sum(change > 0 for change in moved.values()) == 1
    assert max(moved, key=moved.get).endswith("layer.1.attention.self.query")


def test_an_architecture_whose_files_have_other_names_than_its_modules(model_path):
    pairs = open_pair(model_path("vit"), model_path("vit"), ["q_proj"])
    assert len(pairs) == 2 and not any(change.any() for change in changes(pairs).values())


def test_weights_without_a_configuration(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "before.safetensors")
    save_file({f"net.{name}": 2 * tensor for name, tensor in network.state_dict().items()}, tmp_path / "after.safetensors")
    pairs = open_pair(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    assert [pair.name for pair in pairs] == ["0", "2", "4"]
    assert all(torch.equal(pair.after(), 2 * pair.before()) for pair in pairs)
    assert len(open_pair(network, tmp_path / "after.safetensors")) == 3


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_peft(dora, model_path, tmp_path):
    folder = model_path("bert")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModel.from_pretrained(folder),
        LoraConfig(r=3, lora_alpha=6, target_modules=QKV, init_lora_weights=False, use_dora=dora),
    )
    model.save_pretrained(tmp_path)
    found = changes(open_pair(folder, tmp_path, QKV))
    expected = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    before = dict(AutoModel.from_pretrained(folder).named_modules())
    assert len(found) == 6
    for name, change in found.items():
        own = name.removeprefix("bert.")
        assert change.any() and torch.allclose(change, (expected[own].weight - before[own].weight).double(), atol=1e-6)
    with raises(BaseMismatchError, "6"):
        open_pair(model_path("vit"), tmp_path, ["q_proj"])


def test_a_lora_of_a_pipeline(base_path, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(base_path, safety_checker=None)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False))
    layers = {name: layer for name, layer in pipeline.unet.named_modules() if hasattr(layer, "lora_A")}
    expected = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict()
    )
    found = changes(open_pair(base_path, tmp_path, ["to_q"]))
    assert len(found) == len(expected)
    for name, change in expected.items():
        assert torch.allclose(found[f"unet.{name}"], change.double(), atol=1e-5)


def test_checkpoints_that_do_not_fit_are_named(network, model_path, tmp_path):
    smaller = nn.Sequential(*list(network)[:3])
    with raises(BaseMismatchError, "1", "3", "Sequential", "4"):
        open_pair(network, smaller)
    other = copy.deepcopy(network)
    other[2] = nn.Linear(40, 63)
    with raises(BaseMismatchError, "2", "Sequential", "(64, 40)", "(63, 40)"):
        open_pair(network, other)
    assert len(open_pair(network, other, exclude_modules=["2"])) == 2
    with torch.no_grad():
        other[2] = copy.deepcopy(network[2])
        other[2].weight[1, 1] = torch.nan
    with raises(NonFiniteError, "2", "Sequential", "NaN"):
        open_pair(network, other)
    with raises(ConfigError, "target_modules", "to_q", "Sequential"):
        open_pair(network, network, ["to_q"])
    with raises(ConfigError, "/no/such/folder"):
        open_pair(network, "/no/such/folder")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with raises(ConfigError, "broken.safetensors"):
        open_pair(network, tmp_path / "broken.safetensors")
    save_file({"bias": torch.zeros(3)}, tmp_path / "biases.safetensors")
    with raises(ConfigError, "biases.safetensors"):
        open_pair(network, tmp_path / "biases.safetensors")


def test_an_adapter_needs_the_model_it_belongs_to(trained, network, tmp_path):
    cersa.save_adapter(trained[1], tmp_path / "a.safetensors")
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    with raises(ConfigError, "a.safetensors", "base.safetensors"):
        open_pair(tmp_path / "base.safetensors", tmp_path / "a.safetensors")
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    with pytest.raises(BaseMismatchError):
        open_pair(other, tmp_path / "a.safetensors")
