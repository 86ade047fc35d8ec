"""Contradictory settings are refused before anything is loaded, ignored ones are named, and the rest reaches the method."""

import warnings

import pytest
import torch
from transformers import HfArgumentParser

from cersa_diffusion import ConfigError
from cersa_diffusion.training import DreamBoothConfig

from ..conftest import assert_named, raises

REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a sks cat"}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"beta": 0.99}, "beta"),
        ({"memory_budget": "many"}, "memory_budget many"),
        ({"memory_budget": "1GB", "method": "lora"}, "memory_budget lora"),
        ({"block": "bottom"}, "block beta alpha"),
        ({"core": "array"}, "core array"),
        ({"core": "sparse", "sparse_pattern": "top_k"}, "sparse_pattern top_k alpha 0.95"),
        ({"svfit_rank": 0, "method": "svfit"}, "svfit_rank 0"),
        ({"off_diagonals": -1, "method": "svft"}, "off_diagonals -1"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"noise_offset": -0.1}, "noise_offset -0.1"),
        ({"unet_target_modules": []}, "unet_target_modules []"),
        ({"unet_target_modules": "to_q"}, "unet_target_modules to_q"),
        ({"text_encoder_target_modules": ["q_(proj"]}, "text_encoder_target_modules q_(proj"),
        ({"instance_prompt": "  "}, "instance_prompt"),
        ({"max_train_steps": 0}, "max_train_steps 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
        ({"class_prompt": "a cat"}, "class_prompt --with_prior_preservation"),
        ({"with_prior_preservation": True, "class_prompt": "a cat"}, "class_data_dir class_prompt"),
        (
            {"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "./pictures"},
            "class_data_dir instance_data_dir",
        ),
        ({"adam_beta1": 1.5}, "adam_beta1 1.5"),
        ({"adam_epsilon": -1.0}, "adam_epsilon -1.0"),
        ({"seed": 2**32}, "seed 4294967296 2**32"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.1}, "prodigy text_encoder_lr"),
        ({"pre_compute_text_embeddings": True}, "pre_compute_text_embeddings --no_train_text_encoder"),
        ({"cache_to_disk": True}, "cache_to_disk cache_latents pre_compute_text_embeddings"),
        ({"cache_to_disk": True, "center_crop": True, "cache_latents": False}, "cache_to_disk cache_latents"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers -1"),
    ],
)
def test_refused(settings, names):
    with raises(ConfigError, *names.split()):
        DreamBoothConfig(**(REQUIRED | settings))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "lora", "alpha": 0.8, "core": "diagonal"}, "lora alpha core"),
        ({"method": "cersa", "rank": 8, "svfit_rank": 9}, "cersa rank svfit_rank"),
        ({"method": "svft", "alpha": 0.8}, "svft alpha"),
        ({"method": "svfit", "rank_multiple": 4, "uniform_blocks": True}, "svfit rank_multiple uniform_blocks"),
        ({"method": "full", "sparse_pattern": "random"}, "full sparse_pattern"),
        ({"off_diagonals": 4}, "core sparse off_diagonals"),
        ({"lr_warmup_steps": 10}, "lr_scheduler constant lr_warmup_steps"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "optimizer adafactor adam_beta1"),
        ({"prior_loss_weight": 0.5}, "with_prior_preservation prior_loss_weight"),
        ({"train_text_encoder": False, "text_encoder_lr": 1e-5}, "train_text_encoder text_encoder_lr"),
    ],
)
def test_ignored_options_warn_once(settings, names):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = DreamBoothConfig(**(REQUIRED | settings))
        config.cersa_config("all-linear")
    (warning,) = caught
    assert_named(str(warning.message), *names.split())
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.8, "beta": 0.5, "block": "bottom", "unprofitable": "skip"},
        {"rank_multiple": 4, "uniform_blocks": True},
        {"core": "sparse", "sparse_pattern": "top_k", "off_diagonals": 3, "alpha": 1.0},
        {"method": "svft", "sparse_pattern": "random", "off_diagonals": 1},
        {"method": "pissa", "rank": 4},
        {"method": "svfit", "svfit_rank": 5},
    ],
)
def test_options_that_are_read_do_not_warn(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = DreamBoothConfig(**(REQUIRED | settings))
    read = config.cersa_config(["to_q"]).to_dict()
    renamed = {"rank": settings["svfit_rank"]} if "svfit_rank" in settings else settings
    assert read["target_modules"] == ["to_q"]
    assert config.method == "pissa" or all(read[name] == value for name, value in renamed.items() if name != "method")


def test_baselines_are_their_papers_settings():
    svfit = DreamBoothConfig(**REQUIRED, method="svfit").cersa_config("all-linear")
    assert (svfit.rank, svfit.core, svfit.residual) == (768, "diagonal", "keep")
    assert svfit.rank_multiple == 1
    svft = DreamBoothConfig(**REQUIRED, method="svft").cersa_config("all-linear")
    assert (svft.alpha, svft.core, svft.sparse_pattern, svft.off_diagonals) == (1.0, "sparse", "banded", 2)
    assert svft.rank_multiple == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["all-linear"], "all-linear"),
        (["to_q"], ["to_q"]),
        (["to_q", "ff.net.2"], ["to_q", "ff.net.2"]),
        ([r"mid_block\..*"], r"mid_block\..*"),
    ],
)
def test_target_modules_from_the_command_line(words, expected):
    line = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
    line += ["--unet_target_modules", *words] if words else []
    (config,) = HfArgumentParser(DreamBoothConfig).parse_args_into_dataclasses(line)
    assert config.target_modules("unet") == expected and config.target_modules("text_encoder") is None


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({}, False),
        ({"center_crop": True}, True),
        ({"center_crop": True, "aspect_ratio_buckets": True}, True),
        ({"aspect_ratio_buckets": True}, False),
        ({"center_crop": True, "random_flip": True}, False),
        ({"center_crop": True, "cache_latents": False}, False),
        ({"cache_latents": True}, True),
        ({"center_crop": True, "random_flip": True, "cache_latents": True}, True),
    ],
)
def test_latents_are_cached_where_pictures_have_one_view(settings, cached):
    assert DreamBoothConfig(**REQUIRED, **settings).caches_latents is cached


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({}, False),
        ({"train_text_encoder": False}, True),
        ({"train_text_encoder": False, "pre_compute_text_embeddings": False}, False),
        ({"train_text_encoder": False, "pre_compute_text_embeddings": True}, True),
    ],
)
def test_prompts_are_encoded_once_where_no_text_encoder_is_trained(settings, cached):
    assert DreamBoothConfig(**REQUIRED, **settings).caches_text_embeddings is cached


@pytest.mark.parametrize(
    ("settings", "on_cpu", "on_gpu"),
    [
        ({}, 0, 2),
        ({"center_crop": True}, 0, 0),
        ({"cache_latents": True}, 0, 0),
        ({"center_crop": True, "cache_latents": False}, 0, 2),
        ({"dataloader_num_workers": 0}, 0, 0),
        ({"dataloader_num_workers": 3, "cache_latents": True}, 3, 3),
    ],
)
def test_pictures_are_decoded_beside_the_steps_of_a_gpu(settings, on_cpu, on_gpu):
    config = DreamBoothConfig(**REQUIRED, **settings)
    assert config.loader_workers(torch.device("cpu")) == on_cpu
    assert config.loader_workers(torch.device("cuda", 1)) == on_gpu
