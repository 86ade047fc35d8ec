"""The trainer on the embedded base, from Python: what it saves, resumes and leaves alone."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from cersa_diffusion import CersaLinear, ConfigError
from cersa_diffusion.pictures import picture_paths
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, load_result, train_dreambooth
from cersa_diffusion.training.callbacks import TrainingCallback, TrainingStopped
from cersa_diffusion.training.checkpoints.folder import list_checkpoints
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.run.loop import DreamBoothRun
from cersa_diffusion.training.settings.file import read_settings

from ..conftest import assert_named, raises

# The right rate differs by method; ranks are LoRA's alone.
OPTIONS = {"cersa": {"learning_rate": 1e-3}, "lora": {"learning_rate": 1e-3, "rank": 8}, "full": {"learning_rate": 3e-4}}


@pytest.fixture
def settings(base_path, subject_path, subject, tmp_path) -> dict:
    return {
        "pretrained_model_name_or_path": str(base_path),
        "instance_data_dir": str(subject_path / "instance"),
        "instance_prompt": subject["instance_prompt"],
        "output_dir": str(tmp_path / "run"),
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 4,
    }


def output_of(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([10, 500]), states).sample


def states_of(pipeline) -> torch.Tensor:
    tokens = pipeline.tokenizer(["a fox", "a sks cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(tokens)[0]


@pytest.mark.parametrize(("method", "limit"), [("cersa", 5e-3), ("lora", 1e-5), ("full", 1e-6)])
def test_saved_result_opens_to_the_trained_model(settings, method, limit, tmp_path):
    """The stock loader for full fine-tuning, ours for LoRA and for CERSA (stored in 16 bit)."""
    config = DreamBoothConfig(**settings, method=method, **OPTIONS[method])
    base = load_base(config.pretrained_model_name_or_path)
    untouched = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(), read_examples(config))
    run.fit(tmp_path)
    result = run.save(tmp_path)
    opened = load_result(method, Path(result.weights_path), config.pretrained_model_name_or_path)

    trained_states, opened_states, base_states = states_of(base), states_of(opened), states_of(untouched)
    states_change = (trained_states - base_states).norm()
    assert (opened_states - trained_states).norm() <= limit * trained_states.norm()
    trained, again, before = (output_of(pipeline.unet, trained_states) for pipeline in (base, opened, untouched))
    assert (again - trained).norm() <= limit * trained.norm()
    # The bound means something only if training changed much more than it allows.
    assert (trained - before).norm() > 5 * limit * trained.norm() and states_change > 5 * limit * trained_states.norm()


@pytest.mark.parametrize(("precision", "budget", "limit"), [("no", "60MB", 60e6), ("bf16", "32MB", 32e6)])
def test_components_share_the_memory_budget(settings, precision, budget, limit, tmp_path):
    config = DreamBoothConfig(**settings | {"memory_budget": budget, "max_train_steps": 1})
    run = DreamBoothRun(
        config, load_base(config.pretrained_model_name_or_path), Accelerator(mixed_precision=precision), read_examples(config)
    )
    run.fit(tmp_path)
    models = list(run.components.values())
    trained = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    states = [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())] + states
    # Gradients are as large as the trained tensors; the optimizer has dropped them.
    used = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + 4 * sum(p.numel() for p in trained)
    assert limit - 1e5 < used <= limit


def test_only_cores_are_trained_and_frozen_factors_do_not_move(settings, tmp_path):
    config = DreamBoothConfig(**settings)
    base = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(), read_examples(config))
    names = {n for model in run.components.values() for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(name.endswith(".cores.default.D") for name in names)
    frozen = {
        f"{part}.{name}": tensor.detach().clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in (*getattr(base, part).named_buffers(), *getattr(base, part).named_parameters())
        if not tensor.requires_grad
    }
    run.fit(tmp_path)
    for key, before in frozen.items():
        part, _, name = key.partition(".")
        now = dict((*getattr(base, part).named_buffers(), *getattr(base, part).named_parameters()))[name]
        assert torch.equal(now, before), key
    assert all(
        layer.cores["default"].D.abs().max() > 0
        for model in run.components.values()
        for layer in model.modules()
        if isinstance(layer, CersaLinear)
    )


@pytest.mark.parametrize("method", ["cersa", "lora", "full"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(settings, method, tmp_path):
    settings |= {"method": method, "checkpointing_steps": 2, "lr_scheduler": "linear", "random_flip": True} | OPTIONS[method]
    whole = train_dreambooth(DreamBoothConfig(**settings))
    # The same run, cut off after step 2: its later checkpoint and its result are gone.
    cut = tmp_path / "cut"
    shutil.copytree(settings["output_dir"], cut)
    shutil.rmtree(cut / "checkpoint-4")
    (cut / "result.json").unlink()
    settings["output_dir"] = str(cut)
    resumed = train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"))
    for first, second in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def weights_of(result) -> list[dict[str, torch.Tensor]]:
    path = Path(result.weights_path)
    files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    return [load_file(file) for file in files]


class Rates(TrainingCallback):
    """The learning rate that is reported after each step."""

    def __init__(self):
        self.seen = []

    def on_step(self, progress):
        self.seen.append(progress.learning_rate)


def test_a_run_goes_on_with_a_lower_learning_rate(small_settings):
    """The new rate counts from the resumed step on, where the schedule is; the rate of the text encoder stays."""
    settings = small_settings | {"alpha": 0.8, "learning_rate": 1e-3, "text_encoder_lr": 1e-4, "lr_scheduler": "linear"}
    train_dreambooth(DreamBoothConfig(**settings | {"checkpointing_steps": 2}))
    output, rates = Path(settings["output_dir"]), Rates()
    shutil.rmtree(output / "checkpoint-4")
    (output / "result.json").unlink()
    resumed = DreamBoothConfig(**settings | {"learning_rate": 1e-15}, resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match="learning_rate") as said:
        train_dreambooth(resumed, [rates])
    assert_named(next(str(w.message) for w in said if "learning_rate" in str(w.message)), "0.001", "1e-15", "2")
    assert rates.seen == pytest.approx([1e-15 / 4, 0.0], rel=1e-9, abs=0.0)
    before, after = (load_file(output / f"checkpoint-{step}" / "trained_weights.safetensors") for step in (2, 4))
    moved = {name.partition(".")[0] for name in before if (after[name] - before[name]).abs().max() > 1e-9}
    assert moved == {"text_encoder"} and read_settings(output / "config.toml")["learning_rate"] == 1e-15
    # All steps are done: another rate would say what is not so.
    with raises(ConfigError, "learning_rate"):
        train_dreambooth(DreamBoothConfig(**settings | {"learning_rate": 1e-4}, resume_from_checkpoint="latest"))


def test_checkpoints_are_limited_and_a_finished_run_goes_on(settings):
    settings |= {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "rank": 4, "method": "lora"}
    train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 6}))
    output = Path(settings["output_dir"])
    assert [step for step, _ in list_checkpoints(output)] == [4, 6]
    train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 8}, resume_from_checkpoint="latest"))
    assert [step for step, _ in list_checkpoints(output)] == [6, 8]


def test_another_run_in_the_folder_is_not_overwritten(settings):
    settings |= {"method": "lora", "rank": 4, "max_train_steps": 2, "checkpointing_steps": 1}
    result = train_dreambooth(DreamBoothConfig(**settings))
    before = Path(result.weights_path).read_bytes()
    with raises(ConfigError, "output_dir", "resume_from_checkpoint"):
        train_dreambooth(DreamBoothConfig(**settings))
    with raises(ConfigError, "rank"):
        train_dreambooth(DreamBoothConfig(**settings | {"rank": 8, "max_train_steps": 4}, resume_from_checkpoint="latest"))
    with raises(ConfigError, "max_train_steps"):
        train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"))
    assert Path(result.weights_path).read_bytes() == before


def test_a_checkpoint_of_another_folder_is_of_the_settings_there(settings, tmp_path):
    settings |= {"max_train_steps": 2, "checkpointing_steps": 1}
    train_dreambooth(DreamBoothConfig(**settings))
    elsewhere = {"output_dir": str(tmp_path / "new"), "max_train_steps": 3}
    from_there = {"resume_from_checkpoint": str(Path(settings["output_dir"]) / "checkpoint-2")}
    with raises(ConfigError, "text_encoder_lr", "seed"):
        train_dreambooth(DreamBoothConfig(**settings | elsewhere | from_there | {"text_encoder_lr": 1e-5, "seed": 3}))
    assert train_dreambooth(DreamBoothConfig(**settings | elsewhere | from_there)).steps == 3


def test_a_run_that_goes_on_is_unfinished_until_its_end(settings):
    settings |= {"max_train_steps": 2, "checkpointing_steps": 1}
    result = Path(train_dreambooth(DreamBoothConfig(**settings)).output_dir) / "result.json"
    assert result.exists()

    class Stop(TrainingCallback):
        def on_step(self, progress):
            assert not result.exists()

        def should_stop(self):
            return True

    longer = settings | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(TrainingStopped):
        train_dreambooth(DreamBoothConfig(**longer), [Stop()])
    assert not result.exists()
    assert train_dreambooth(DreamBoothConfig(**longer)).steps == 4 and result.exists()


def test_prior_preservation_fills_the_class_folder_and_reuses_it(settings, tmp_path):
    settings |= {
        "with_prior_preservation": True,
        "class_data_dir": str(tmp_path / "class"),
        "class_prompt": "a 3d emoji of a cat",
        "num_class_images": 3,
        "max_train_steps": 1,
    }
    train_dreambooth(DreamBoothConfig(**settings))
    paths = picture_paths(tmp_path / "class", "class_data_dir")
    before = [path.read_bytes() for path in paths]
    assert len(paths) == 3 and len(set(before)) == 3
    train_dreambooth(DreamBoothConfig(**settings | {"output_dir": str(tmp_path / "again"), "num_class_images": 4}))
    paths = picture_paths(tmp_path / "class", "class_data_dir")
    assert len(paths) == 4 and [path.read_bytes() for path in paths[:3]] == before
    # One that was deleted is replaced by another, not by itself.
    paths[1].unlink()
    train_dreambooth(DreamBoothConfig(**settings | {"output_dir": str(tmp_path / "third"), "num_class_images": 4}))
    names = [path.name for path in picture_paths(tmp_path / "class", "class_data_dir")]
    assert names == [f"class-{number:05d}.png" for number in (0, 2, 3, 4)]


def test_bf16_keeps_cores_and_optimizer_in_float32(settings, tmp_path):
    config = DreamBoothConfig(**settings, mixed_precision="bf16")
    base = load_base(config.pretrained_model_name_or_path)
    run = DreamBoothRun(config, base, Accelerator(mixed_precision="bf16"), read_examples(config))
    layer = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.U.dtype == torch.bfloat16 and layer.s.dtype == layer.cores["default"].D.dtype == torch.float32
    run.fit(tmp_path)
    moments = [t for state in run.optimizer.state.values() for t in state.values() if t.ndim == 2]
    assert moments and all(moment.dtype == torch.float32 for moment in moments)
