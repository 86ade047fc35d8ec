"""Every method on a small base: the same layers, a result that opens by its own loader, and a run that can be resumed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from cersa_diffusion import ConfigError
from cersa_diffusion.methods.table import METHODS
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, load_result, train_dreambooth
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun

from ..conftest import raises

# With these rates four steps change the output by some percent.
OPTIONS = {
    "cersa": {"learning_rate": 1e-2},
    "svfit": {"learning_rate": 5e-2, "svfit_rank": 12},
    "svft": {"learning_rate": 3e-2, "sparse_pattern": "random"},
    "lora": {"learning_rate": 1e-2, "rank": 4},
    "pissa": {"learning_rate": 1e-2, "rank": 4},
    "dora": {"learning_rate": 1e-2, "rank": 4},
    "full": {"learning_rate": 1e-3},
}


def outputs(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """What the text encoder makes of two prompts, and the UNet of that and fixed noise."""
    tokens = pipeline.tokenizer(["a sks cat", "a mat"], padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = pipeline.text_encoder(tokens)[0]
        return states, pipeline.unet(latents, torch.tensor([10, 500]), states).sample


def distances(first, second) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(outputs(first), outputs(second), strict=True)]


@pytest.mark.parametrize(
    ("method", "limit"),
    [("cersa", 5e-3), ("svfit", 5e-3), ("svft", 5e-3), ("lora", 1e-5), ("pissa", 1e-4), ("dora", 1e-5), ("full", 1e-6)],
)
def test_result_opens_to_the_trained_model(method, limit, small_settings, tmp_path):
    """The stock loader for full fine-tuning, ours for LoRA and its kin and for cores (stored in 16 bit)."""
    config = DreamBoothConfig(**small_settings, method=method, **OPTIONS[method])
    base = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(), read_examples(config))
    run.fit(tmp_path)
    result = run.save(tmp_path)
    opened = load_result(method, Path(result.weights_path), config.pretrained_model_name_or_path)
    assert max(distances(opened, base)) <= limit
    # The bound means something only if training changed much more than it allows.
    assert min(distances(load_base(config.pretrained_model_name_or_path), base)) > 5 * limit


@pytest.mark.parametrize("method", ["pissa", "svfit", "svft", "dora"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(method, small_settings, tmp_path):
    settings = small_settings | {"method": method, "checkpointing_steps": 2} | OPTIONS[method]
    whole = train_dreambooth(DreamBoothConfig(**settings))
    cut = tmp_path / "cut"
    shutil.copytree(settings["output_dir"], cut)
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "result.json").unlink()
    resumed = train_dreambooth(DreamBoothConfig(**settings | {"output_dir": str(cut)}, resume_from_checkpoint="latest"))
    first, second = load_file(whole.weights_path), load_file(resumed.weights_path)
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["to_q", "attn2.to_k"], r".*(to_q|attn2\.to_k)"),
        (["to_q"], r".*to_q"),
        ([r"mid_block\..*to_[qk]"], r"mid_block\..*to_[qk]"),
        # Convolutions end in these names, too, and peft would take them.
        (["proj_out", "proj_in", "to_v"], r".*to_v"),
        (["all-linear"], r".*"),
    ],
)
def test_all_methods_train_the_layers_that_were_asked_for(targets, expected, small_settings):
    own = {"unet_target_modules": targets, "text_encoder_target_modules": ["fc1"]}
    path = small_settings["pretrained_model_name_or_path"]
    names = [name for name, module in load_base(path).unet.named_modules() if type(module) is torch.nn.Linear]
    wanted = {f"unet.{name}" for name in names if re.fullmatch(expected, name)}
    wanted |= {f"text_encoder.encoder.layers.{number}.mlp.fc1" for number in range(2)}
    for method in METHODS:
        config = DreamBoothConfig(**small_settings, method=method, **OPTIONS[method] | own)
        run = DreamBoothRun(config, load_base(path), Accelerator(), read_examples(config))
        trained = {
            f"{component}.{name}"
            for component, model in run.components.items()
            for name, module in model.named_modules()
            if any(p.requires_grad for p in module.parameters()) and getattr(module, "in_features", 0)
        }
        # The matrices A and B of the LoRA family are linear layers themselves.
        assert {name for name in trained if ".lora_" not in name} == wanted, method


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "svfit", "full"])
def test_untrained_model_is_the_base(method, small_settings):
    config = DreamBoothConfig(**small_settings, method=method, **OPTIONS[method])
    base = load_base(config.pretrained_model_name_or_path)
    DreamBoothRun(config, base, Accelerator(), read_examples(config))
    assert max(distances(base, load_base(config.pretrained_model_name_or_path))) < 1e-5


def test_pissa_refuses_a_rank_that_a_layer_does_not_have(small_settings):
    config = DreamBoothConfig(**small_settings, method="pissa", rank=17)
    base = load_base(config.pretrained_model_name_or_path)
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    with raises(ConfigError, "rank", "17", "time_embedding.linear_1", "16"):
        DreamBoothRun(config, base, Accelerator(), read_examples(config))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())


@pytest.mark.parametrize("method", ["cersa", "pissa", "dora", "svfit", "svft"])
def test_trains_in_bf16_with_float32_parameters(method, small_settings, tmp_path):
    config = DreamBoothConfig(**small_settings, method=method, mixed_precision="bf16", **OPTIONS[method])
    run = DreamBoothRun(
        config, load_base(config.pretrained_model_name_or_path), Accelerator(mixed_precision="bf16"), read_examples(config)
    )
    run.fit(tmp_path)
    parameters = [p for model in run.components.values() for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert next(p for p in run.base.unet.parameters() if not p.requires_grad).dtype == torch.bfloat16


def test_truncation_is_priced_before_the_first_step(small_settings):
    path = small_settings["pretrained_model_name_or_path"]
    base = load_base(path)
    config = DreamBoothConfig(**small_settings, alpha=0.8)
    examples = read_examples(config)
    weights = {name: module.weight.detach() for name, module in base.unet.named_modules() if type(module) is torch.nn.Linear}
    run = DreamBoothRun(config, base, Accelerator(), examples)
    errors = {f"unet.{name}": _error(run.base.unet.get_submodule(name).effective_weight(), w) for name, w in weights.items()}
    cost = run.preparation.truncation
    assert cost.worst_weight_error >= max(errors.values()) - 1e-4
    if cost.worst_layer in errors:
        assert abs(errors[cost.worst_layer] - cost.worst_weight_error) < 1e-4
    assert 0 < cost.mean_weight_error < cost.worst_weight_error <= (1 - 0.8) ** 0.5 + 1e-6
    assert str(cost) in run.description and cost.base_loss != cost.truncated_loss

    whole = DreamBoothRun(DreamBoothConfig(**small_settings, alpha=1.0), load_base(path), Accelerator(), examples)
    assert whole.preparation.truncation.worst_weight_error < 1e-6
    assert whole.preparation.truncation.truncated_loss == pytest.approx(whole.preparation.truncation.base_loss, rel=1e-4)


def _error(approximation: torch.Tensor, weight: torch.Tensor) -> float:
    return float((approximation - weight).norm() / weight.norm())
