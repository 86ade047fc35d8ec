"""Contradictory settings are refused before anything is loaded."""

import pytest

from cersa_diffusion import ConfigError
from cersa_diffusion.training import DreamBoothConfig

REQUIRED = {"pretrained_model_name_or_path": "base", "instance_data_dir": "pictures", "instance_prompt": "a sks cat"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"beta": 0.99}, "beta"),
        ({"instance_prompt": "  "}, "instance_prompt is empty"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
        ({"class_prompt": "a cat"}, "need --with_prior_preservation"),
        ({"with_prior_preservation": True, "class_prompt": "a cat"}, "class_data_dir and class_prompt"),
        ({"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": "./pictures"}, "the same folder"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DreamBoothConfig(**(REQUIRED | settings))
