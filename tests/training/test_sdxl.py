"""SDXL: two text encoders, pooled embeddings and sizes; every method trains, saves and opens again to what was trained."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cersa_diffusion import ConfigError
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, DreamBoothXLConfig, load_result
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun

from ..conftest import raises

METHODS = {
    "cersa": ({"learning_rate": 1e-2}, 5e-3),
    "lora": ({"learning_rate": 1e-2, "rank": 4}, 1e-5),
    "pissa": ({"learning_rate": 1e-2, "rank": 4}, 1e-4),
    "dora": ({"learning_rate": 1e-2, "rank": 4}, 1e-5),
    "svfit": ({"learning_rate": 1e-2, "svfit_rank": 8}, 5e-3),
    "svft": ({"learning_rate": 1e-2}, 5e-3),
    "full": ({"learning_rate": 1e-3}, 1e-6),
}


@pytest.fixture
def settings(small_base, small_settings) -> dict:
    return small_settings | {"pretrained_model_name_or_path": str(small_base("sdxl"))}


@torch.no_grad()
def output_of(pipeline) -> torch.Tensor:
    states, _, pooled, _ = pipeline.encode_prompt("a sks cat", device="cpu", do_classifier_free_guidance=False)
    config = pipeline.unet.config
    latents = torch.randn(
        1, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(0)
    )
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return pipeline.unet(latents, torch.tensor([300]), states, added_cond_kwargs=conditions).sample


@pytest.mark.parametrize("method", METHODS)
def test_saved_result_opens_to_the_trained_pipeline(method, settings, tmp_path):
    options, limit = METHODS[method]
    config = DreamBoothXLConfig(**settings | options, method=method)
    base = load_base(config.pretrained_model_name_or_path)
    before = output_of(base)
    run = DreamBoothRun(config, base, Accelerator(), read_examples(config))
    assert list(run.components) == ["unet", "text_encoder", "text_encoder_2"]
    run.fit(tmp_path)
    result = run.save(tmp_path)
    opened = load_result(method, Path(result.weights_path), config.pretrained_model_name_or_path)
    trained = output_of(base)
    assert (output_of(opened) - trained).norm() <= limit * trained.norm()
    assert (trained - before).norm() > 5 * limit * trained.norm()


def test_both_text_encoders_learn(settings, tmp_path):
    config = DreamBoothXLConfig(**settings)
    run = DreamBoothRun(config, load_base(config.pretrained_model_name_or_path), Accelerator(), read_examples(config))
    run.fit(tmp_path)
    still = {
        f"{component}.{name}"
        for component, model in run.components.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.abs().max() == 0
    }
    # SDXL takes the last but one hidden states, and the pooled output of the second encoder alone.
    last = run.components["text_encoder"].config.num_hidden_layers - 1
    assert still and all(name.startswith("text_encoder.") and f"layers.{last}." in name for name in still)


def test_each_script_refuses_the_others_base(settings, small_settings):
    with raises(ConfigError, "StableDiffusionXLPipeline", "train_dreambooth_cersa_sdxl.py"):
        load_base(settings["pretrained_model_name_or_path"], family=DreamBoothConfig.family)
    with raises(ConfigError, "StableDiffusionPipeline", "train_dreambooth_cersa.py"):
        load_base(small_settings["pretrained_model_name_or_path"], family=DreamBoothXLConfig.family)
