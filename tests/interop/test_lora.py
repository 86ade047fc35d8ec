"""LoRA files made of adapters: stock loaders take every layer, and the outputs are as reported."""

import copy
import json
import stat

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError, NonFiniteError
from cersa_diffusion.families.stable_diffusion import STABLE_DIFFUSION
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.pipelines.open import load_base

from ..conftest import DEVICE, raises, randn, train


@pytest.fixture(scope="module")
def adapted(base_path):
    """The embedded base with a changed core in every layer, its base weights kept."""
    pipeline = load_base(str(base_path)).to(DEVICE)
    torch.manual_seed(0)
    for name, targets in STABLE_DIFFUSION.trained.items():
        model = getattr(pipeline, name)
        cersa.inject_cersa(model, CersaConfig(alpha=0.95, beta=0.6, target_modules=targets), keep_base=True, show_progress=False)
        for layer in cersa_layers(model).values():
            decay = torch.logspace(0, -2, layer.cores["default"].rank, device=DEVICE)
            layer.cores["default"].D.data = randn(len(decay), len(decay)) * decay * layer.s[0] * 0.02
    return pipeline


@pytest.fixture(scope="module")
def inputs() -> dict[str, tuple[tuple, dict]]:
    torch.manual_seed(1)
    states, latents = randn(2, 24, 256), randn(2, 4, 16, 16)
    return {
        "unet": ((latents, torch.tensor([10, 500], device=DEVICE)), {"encoder_hidden_states": states}),
        "text_encoder": ((torch.randint(0, 3000, (2, 24)).to(DEVICE),), {}),
    }


def component_outputs(pipeline, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: getattr(pipeline, name)(*args, **kwargs)[0] for name, (args, kwargs) in inputs.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_the_stock_loader_takes_every_layer(adapted, base_path, inputs, format, tmp_path):
    path = tmp_path / "lora.safetensors"
    report = cersa.export_lora(adapted, path, rank=64, format=format, dtype=torch.float32, inputs=inputs)
    stock = StableDiffusionPipeline.from_pretrained(base_path, dtype=torch.float32, safety_checker=None).to(DEVICE)
    stock.load_lora_weights(path)
    for name in STABLE_DIFFUSION.trained:
        model = getattr(stock, name)
        taken = {key for key, module in model.named_modules() if isinstance(module, LoraLayer)}
        assert taken == set(cersa_layers(getattr(adapted, name)))
        for key in taken:
            layer, lora = cersa_layers(getattr(adapted, name))[key], model.get_submodule(key)
            change = layer.weight_change()
            expected_energy = next(row for row in report.layers if row.name == f"{name}.{key}")
            cut = (1 - expected_energy.energy / expected_energy.total_energy) ** 0.5
            found = lora.get_delta_weight(lora.active_adapters[0]).double()
            assert relative(found, change) == pytest.approx(cut, abs=1e-4)
    outputs, expected = component_outputs(stock, inputs), component_outputs(adapted, inputs)
    assert report.differences.keys() == outputs.keys()
    for name, difference in report.differences.items():
        assert relative(outputs[name], expected[name]) == pytest.approx(difference.original, rel=1e-2)


def test_exact_on_the_truncated_base_and_reported(adapted, tmp_path):
    rank = max(
        layer.cores["default"].rank
        for name in STABLE_DIFFUSION.trained
        for layer in cersa_layers(getattr(adapted, name)).values()
    )
    report = cersa.export_lora(adapted, tmp_path / "a.safetensors", rank=rank, dtype=torch.float32)
    assert report.energy == pytest.approx(1)
    assert all(difference.truncated < 1e-4 < 1e-3 < difference.original for difference in report.differences.values())
    cut = cersa.export_lora(adapted, tmp_path / "b.safetensors", rank=4)
    assert 0 < min(cut.energy_by_kind().values()) <= cut.energy < 1
    assert cut.differences["unet"].truncated > report.differences["unet"].truncated
    shown = str(cut)
    assert "unet to_q: " in shown and "unet to_out.0: " in shown and "text_encoder q_proj: " in shown
    assert f"{cut.energy:.2%}" in shown and "on the original base" in shown


def test_files_are_as_the_conventions_want(adapted, tmp_path):
    path = tmp_path / "lora.safetensors"
    cersa.export_lora({"unet": adapted.unet, "text_encoder": adapted.text_encoder}, path, rank=128, format="kohya")
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 and list(tmp_path.iterdir()) == [path]
    tensors = load_file(path)
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert tensors[f"{key}.lora_down.weight"].shape == (128, 256) and tensors[f"{key}.alpha"] == 128
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in tensors
    assert {name.rpartition(".lora_")[0] or name.rpartition(".")[0] for name in tensors} == {
        f"{prefix}_{name.replace('.', '_')}"
        for component, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te_text_model"))
        for name in cersa_layers(getattr(adapted, component))
    }
    cersa.export_lora(adapted, path, rank=8)
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert facts["unet.r"] == facts["unet.lora_alpha"] == facts["text_encoder.r"] == 8


def test_two_text_encoders_are_one_and_two(adapted, tmp_path):
    parts = {"text_encoder": adapted.text_encoder, "text_encoder_2": adapted.text_encoder}
    cersa.export_lora(parts, tmp_path / "a.safetensors", rank=2, format="kohya")
    stems = {name.partition("_text_model")[0] for name in load_file(tmp_path / "a.safetensors")}
    assert stems == {"lora_te1", "lora_te2"}
    with raises(ConfigError, "format='kohya'", "'transformer'", "unet"):
        cersa.export_lora({"transformer": adapted.unet}, tmp_path / "b.safetensors", format="kohya")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_and_its_base(trained, tmp_path):
    base, model = trained
    cersa.save_adapter(model, tmp_path / "adapter.safetensors", dtype=torch.float32)
    before = copy.deepcopy(base.state_dict())
    inputs = {"model": ((randn(8, 48),), {})}
    report = cersa.export_lora(
        tmp_path / "adapter.safetensors", tmp_path / "lora.safetensors", base=base, inputs=inputs, dtype=torch.float32
    )
    assert report.differences["model"].truncated < 1e-4 < report.differences["model"].original
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    tensors = load_file(tmp_path / "lora.safetensors")
    change = (tensors["model.0.lora_B.weight"] @ tensors["model.0.lora_A.weight"]).to(DEVICE)
    assert relative(change, model[0].weight_change()) < 1e-4


def test_a_base_that_only_the_file_names_is_told_and_not_opened(trained, base_path, tmp_path):
    _, model = trained
    cersa.save_adapter(model, tmp_path / "adapter.safetensors", base_model={"name_or_path": str(base_path)})
    with raises(ConfigError, "adapter.safetensors", "--base", base_path.name):
        cersa.export_lora(tmp_path / "adapter.safetensors", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_exported(trained, tmp_path):
    base, model = trained
    with raises(ConfigError, "active", "adapter"):
        cersa.export_lora(base, tmp_path / "a.safetensors")
    with raises(ConfigError, "rank", "0"):
        cersa.export_lora(model, tmp_path / "a.safetensors", rank=0)
    with raises(ConfigError, "format", "'civitai'", "'diffusers'", "'kohya'"):
        cersa.export_lora(model, tmp_path / "a.safetensors", format="civitai")
    assert "not measured" in str(cersa.export_lora(model, tmp_path / "b.safetensors"))
    train(model, steps=1)
    model[2].cores["default"].D.data[0, 0] = torch.nan
    with raises(NonFiniteError, "model.2"):
        cersa.export_lora(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
