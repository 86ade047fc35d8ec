"""What stands on the command line wins over the TOML file, the file over the preset; the file beside a result brings it back."""

from dataclasses import fields

import pytest

from cersa_diffusion import ConfigError
from cersa_diffusion.training import PRESETS, DreamBoothConfig, DreamBoothXLConfig
from cersa_diffusion.training.command_line import parse_settings
from cersa_diffusion.training.settings.file import read_settings, write_settings

from ..conftest import raises

REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "pictures", "--instance_prompt", "a sks cat"]


def parse(*arguments: str, required: bool = True) -> DreamBoothConfig:
    return parse_settings(DreamBoothConfig, [*(REQUIRED if required else []), *arguments])


def test_nothing_given_is_the_defaults():
    assert parse() == DreamBoothConfig("base", "a sks cat", "pictures")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_and_give_way(name):
    config = parse("--preset", name)
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    # Also where what is given is the default that the preset would change.
    assert parse("--preset", name, "--train_batch_size", str(DreamBoothConfig.train_batch_size)).train_batch_size == 4
    assert parse("--preset", name, "--mixed_precision", "no").mixed_precision == "no"


@pytest.mark.parametrize("name", ["cache_latents", "pre_compute_text_embeddings"])
def test_a_choice_that_is_left_to_the_trainer(name):
    frozen = ("--no_train_text_encoder",)
    for words, chosen in (((), None), ((f"--{name}",), True), ((f"--{name}", "true"), True), ((f"--{name}", "false"), False)):
        assert getattr(parse(*frozen, *words), name) is chosen
    assert parse(*frozen, f"--{name}", "--center_crop").center_crop


def test_a_file_replaces_the_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'preset = "8gb"\npretrained_model_name_or_path = "base"\ninstance_data_dir = "pictures"\ninstance_prompt = "a sks cat"\n'
        'learning_rate = 1\nmethod = "lora"\nunet_target_modules = ["to_q", "to_k"]\ngradient_checkpointing = false\n'
    )
    config = parse("--config", str(path), required=False)
    assert (config.method, config.learning_rate, config.unet_target_modules) == ("lora", 1, ["to_q", "to_k"])
    assert config.gradient_checkpointing is False and config.optimizer == "adamw8bit"
    assert parse("--config", str(path), "--method", "dora", "--preset", "24gb", required=False).method == "dora"


def test_settings_survive_the_file(tmp_path):
    config = DreamBoothXLConfig(
        "base", "a sks cat", "pictures", beta=0.8, unet_target_modules=["to_q"], hub_token="secret", push_to_hub=True
    )
    write_settings(config, tmp_path / "config.toml")
    assert "secret" not in (tmp_path / "config.toml").read_text()
    settings = read_settings(tmp_path / "config.toml", DreamBoothXLConfig)
    assert DreamBoothXLConfig(**settings, hub_token="secret") == config
    assert config.same_run(settings) == []
    # None is not in the file, and is a setting all the same.
    assert DreamBoothXLConfig("base", "a sks cat", "pictures", unet_target_modules=["to_q"]).same_run(settings) == ["beta"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("learning_rat = 1", "learning_rat learning_rate"),
        ("preset = '16gb'", "preset 16gb 8gb 12gb 24gb"),
        ("= 3", "run.toml"),
        ("learning_rate = 'fast'", "learning_rate fast"),
        ("max_train_steps = true", "max_train_steps True"),
        ("optimizer = 'sgd'", "optimizer sgd adamw adamw8bit adafactor prodigy"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, names):
    (tmp_path / "run.toml").write_text(text)
    with raises(ConfigError, *names.split()):
        parse("--config", str(tmp_path / "run.toml"))


def test_a_missing_file_or_setting_is_named(tmp_path, capsys):
    with raises(ConfigError, "nowhere.toml"):
        parse("--config", str(tmp_path / "nowhere.toml"))
    with pytest.raises(SystemExit):
        parse("--instance_data_dir", "pictures", required=False)
    assert "--pretrained_model_name_or_path, --instance_prompt" in capsys.readouterr().err


# The option names of the diffusers examples: a command line ports by changing the script's name.
PEERS = """
pretrained_model_name_or_path revision variant instance_data_dir dataset_name dataset_config_name image_column
caption_column class_data_dir instance_prompt class_prompt with_prior_preservation prior_loss_weight num_class_images
sample_batch_size prior_generation_precision output_dir seed resolution center_crop random_flip train_text_encoder
text_encoder_lr train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power snr_gamma noise_offset use_8bit_adam optimizer dataloader_num_workers adam_beta1
adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir report_to
allow_tf32 mixed_precision validation_prompt num_validation_images validation_steps cache_latents repeats rank
pre_compute_text_embeddings use_ema
""".split()


def test_every_option_of_the_peers_is_there():
    known = {field.name for field in fields(DreamBoothConfig)}
    assert not set(PEERS) - known


def test_every_option_has_a_help_text():
    assert all(
        field.metadata["help"]
        for field in DreamBoothConfig.__dataclass_fields__.values()
        if field.name != "family" and field._field_type.name == "_FIELD"
    )
