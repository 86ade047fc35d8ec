"""Contradictory settings are refused before anything is loaded, ignored ones are named, and the rest reaches the method."""

import warnings

import pytest
from transformers import HfArgumentParser

from cersa_diffusion import ConfigError
from cersa_diffusion.training import DreamBoothConfig

REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a sks cat"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"beta": 0.99}, "beta"),
        ({"memory_budget": "many"}, "no memory size"),
        ({"memory_budget": "1GB", "method": "lora"}, "method 'lora' takes the memory it takes"),
        ({"block": "bottom"}, "set beta below alpha"),
        ({"core": "array"}, "core is 'array'"),
        ({"svfit_rank": 0, "method": "svfit"}, "svfit_rank is 0"),
        ({"off_diagonals": -1, "method": "svft"}, "off_diagonals is -1"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"noise_offset": -0.1}, "noise_offset is -0.1"),
        ({"unet_target_modules": []}, "unet_target_modules is"),
        ({"unet_target_modules": "to_q"}, "unet_target_modules is 'to_q', expected a list"),
        ({"text_encoder_target_modules": ["q_(proj"]}, "no regular expression"),
        ({"instance_prompt": "  "}, "instance_prompt is empty"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
        ({"class_prompt": "a cat"}, "need --with_prior_preservation"),
        ({"with_prior_preservation": True, "class_prompt": "a cat"}, "class_data_dir and class_prompt"),
        ({"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "./pictures"}, "the same folder"),
        ({"adam_beta1": 1.5}, "adam_beta1 is 1.5, expected at least 0 and less than 1"),
        ({"adam_epsilon": -1.0}, "adam_epsilon is -1.0, expected 0 or more"),
        ({"seed": 2**32}, r"seed is 4294967296, expected less than 2\*\*32"),
        ({"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.1}, "prodigy has one rate for all"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DreamBoothConfig(**(REQUIRED | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora", "alpha": 0.8, "core": "diagonal"}, "method 'lora' ignores alpha, core"),
        ({"method": "cersa", "rank": 8, "svfit_rank": 9}, "method 'cersa' ignores rank, svfit_rank"),
        ({"method": "svft", "alpha": 0.8}, "method 'svft' ignores alpha"),
        ({"method": "full", "sparse_pattern": "random"}, "method 'full' ignores sparse_pattern"),
        ({"off_diagonals": 4}, "without core='sparse', off_diagonals is ignored"),
        ({"lr_warmup_steps": 10}, "lr_scheduler constant ignores lr_warmup_steps"),
        ({"optimizer": "adafactor", "adam_beta1": 0.8}, "optimizer adafactor ignores adam_beta1"),
        ({"prior_loss_weight": 0.5}, "without with_prior_preservation, prior_loss_weight is ignored"),
        ({"train_text_encoder": False, "text_encoder_lr": 1e-5}, "without train_text_encoder, text_encoder_lr is ignored"),
    ],
)
def test_ignored_options_warn_once(settings, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = DreamBoothConfig(**(REQUIRED | settings))
        config.cersa_config("all-linear")
    assert [str(warning.message) for warning in caught] == [message]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.8, "beta": 0.5, "block": "bottom", "unprofitable": "skip"},
        {"core": "sparse", "sparse_pattern": "top_k", "off_diagonals": 3},
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
    svft = DreamBoothConfig(**REQUIRED, method="svft").cersa_config("all-linear")
    assert (svft.alpha, svft.core, svft.sparse_pattern, svft.off_diagonals) == (1.0, "sparse", "banded", 2)


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
