"""Options of the trainer do what their names say: accumulation, epochs, scaled rates, moving average, optimizers, caches."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cersa_diffusion import ConfigError
from cersa_diffusion.adapters.file import read_adapter_file
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, train_dreambooth
from cersa_diffusion.training.checkpoints.folder import trained_weights
from cersa_diffusion.training.data.captions import read_examples
from cersa_diffusion.training.data.dataset import DreamBoothDataset, collate
from cersa_diffusion.training.run.loop import DreamBoothRun

from ..conftest import raises


class Losses(TrainingCallback):
    def __init__(self):
        self.steps = []

    def on_step(self, progress):
        self.steps.append(progress)


def losses_of(settings: dict, folder: Path, **changes) -> list[float]:
    recorder = Losses()
    train_dreambooth(DreamBoothConfig(**settings | {"output_dir": str(folder)} | changes), [recorder])
    return [progress.loss for progress in recorder.steps]


def make_run(settings: dict, **changes) -> DreamBoothRun:
    config = DreamBoothConfig(**settings | changes)
    return DreamBoothRun(config, load_base(config.pretrained_model_name_or_path), Accelerator(), read_examples(config))


@pytest.mark.parametrize("method", ["cersa", "lora"])
def test_accumulated_batches_are_one_large_batch(small_settings, tmp_path, method):
    settings = small_settings | {"method": method, "max_train_steps": 3, "lr_scheduler": "linear", "random_flip": True}
    whole = losses_of(settings, tmp_path / "whole", train_batch_size=4)
    parts = losses_of(settings, tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4)
    assert len(whole) == len(parts) == 3
    assert parts == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_train_epochs": 2}, 6),  # 5 pictures in batches of 2
        ({"num_train_epochs": 2, "repeats": 3}, 16),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, 2),
        ({"max_train_steps": 7, "num_train_epochs": None}, 7),
        ({}, 500),
    ],
)
def test_length(small_settings, changes, steps):
    config = DreamBoothConfig(**small_settings | {"max_train_steps": None} | changes)
    assert config.total_steps(pictures=5, processes=1) == steps


def test_scaled_learning_rates(small_settings):
    config = DreamBoothConfig(
        **small_settings, scale_lr=True, learning_rate=1e-4, text_encoder_lr=1e-5, gradient_accumulation_steps=3
    )
    assert config.rate("unet", 4) == pytest.approx(1e-4 * 2 * 3 * 4)
    assert config.rate("text_encoder_2", 1) == pytest.approx(1e-5 * 2 * 3)


def test_the_moving_average_is_saved(small_settings, tmp_path):
    settings = small_settings | {"method": "lora", "rank": 2, "use_ema": True, "ema_decay": 0.5}
    run = make_run(settings)
    seen = []
    step = run.average.step

    def noted(parameters):
        seen.append([parameter.detach().clone() for parameter in parameters])
        step(run.trained())

    run.average.step = noted
    run.fit(tmp_path)
    # The rule of diffusers: the decay is at most (1 + n) / (10 + n) in the n-th step.
    average = [parameter.detach().clone() for parameter in make_run(settings).trained()]
    for number, tensors in enumerate(seen):
        decay = min(0.5, (1 + number) / (10 + number)) if number else 0.0
        average = [decay * old + (1 - decay) * new for old, new in zip(average, tensors, strict=True)]
    run.save(tmp_path)
    for parameter, wanted in zip(run.trained(), average, strict=True):
        assert torch.allclose(parameter, wanted, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "prodigy"])
def test_every_optimizer_learns_and_resumes(small_settings, tmp_path, optimizer):
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(optimizer)
    rate = 1.0 if optimizer == "prodigy" else 1e-2
    settings = small_settings | {"optimizer": optimizer, "learning_rate": rate, "checkpointing_steps": 2}
    if package and not find_spec(package):
        with raises(ConfigError, "optimizer", optimizer, package):
            train_dreambooth(DreamBoothConfig(**settings), [])
        return
    whole = train_dreambooth(DreamBoothConfig(**settings), [])
    assert whole.optimizer_bytes > 0
    settings["output_dir"] = str(tmp_path / "cut")
    train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 2}), [])
    resumed = train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"), [])
    first, second = load_file(whole.weights_path), load_file(resumed.weights_path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if tensor.is_floating_point())


def test_the_steps_of_adafactor_are_as_long_as_those_of_adamw(small_settings, tmp_path):
    """Although cores begin at zero, and Adafactor would scale its steps by the size of what it trains."""
    moved = {}
    for optimizer in ("adamw", "adafactor"):
        own = small_settings | {"optimizer": optimizer, "learning_rate": 1e-3, "output_dir": str(tmp_path / optimizer)}
        run = make_run(own)
        run.fit(tmp_path / optimizer)
        moved[optimizer] = torch.cat([parameter.detach().flatten() for parameter in run.trained()]).square().mean().sqrt()
    assert 0.1 < moved["adafactor"] / moved["adamw"] < 10


@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_latents_and_prompts_train_alike(small_settings, tmp_path, on_disk):
    settings = small_settings | {"center_crop": True, "train_text_encoder": False, "random_flip": True}
    plain = losses_of(settings, tmp_path / "plain", cache_latents=False, pre_compute_text_embeddings=False)
    cached = losses_of(settings, tmp_path / "cached", cache_latents=True, pre_compute_text_embeddings=True, cache_to_disk=on_disk)
    assert cached == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_cached_unasked_changes_no_bit_of_a_loss(small_settings, tmp_path, precision):
    """With one picture a step: pictures that are encoded together round together."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = small_settings | {"center_crop": True, "train_text_encoder": False, "train_batch_size": 1}
    settings |= {"mixed_precision": precision}
    recorder, folder = Losses(), tmp_path / "unasked"
    result = train_dreambooth(DreamBoothConfig(**settings | {"output_dir": str(folder)}), [recorder])
    header = read_adapter_file(result.weights_path).training
    assert header["cache_latents"] is header["pre_compute_text_embeddings"] is True
    uncached = losses_of(settings, tmp_path / "uncached", cache_latents=False, pre_compute_text_embeddings=False)
    assert [progress.loss for progress in recorder.steps] == uncached


def test_buckets_train(small_settings, tmp_path):
    assert len(losses_of(small_settings, tmp_path / "run", aspect_ratio_buckets=True, bucket_step=8)) == 4


def saved_bytes_and_gradients(run: DreamBoothRun) -> tuple[int, dict[str, torch.Tensor]]:
    """What a step keeps for its backward pass, without the weights; the gradients of all that is trained."""
    for model in run.components.values():
        model.train()
    samples = run.samples_per_step
    dataset = DreamBoothDataset(run.instance, [], run.config, first=0, last=samples, samples_per_step=samples)
    batch = collate([dataset[number] for number in range(samples)])
    weights = [t for model in run.components.values() for t in (*model.parameters(), *model.buffers())]
    known, saved = {t.untyped_storage().data_ptr() for t in weights}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run.loss(batch, run.components)
    loss.backward()
    return sum(saved.values()), {name: weight.grad for name, weight in trained_weights(run.components).items()}


def test_gradient_checkpointing_changes_nothing_but_memory(small_settings):
    plain, wanted = saved_bytes_and_gradients(make_run(small_settings))
    checkpointed, gradients = saved_bytes_and_gradients(make_run(small_settings, gradient_checkpointing=True))
    assert checkpointed < plain / 2
    assert {name.partition(".")[0] for name in gradients} == {"unet", "text_encoder"}
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_trackers_log_losses_rates_and_previews(small_settings):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = small_settings | {"report_to": "tensorboard", "validation_prompt": "a cat", "num_validation_images": 1}
    train_dreambooth(DreamBoothConfig(**settings), [])
    logs = [accumulator.EventAccumulator(str(path)) for path in (Path(settings["output_dir"]) / "logs").rglob("events*")]
    events = next(log for log in logs if "loss" in log.Reload().Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert {"lr/unet", "lr/text_encoder"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"]


def test_a_tracker_that_is_not_installed_is_named(small_settings, monkeypatch):
    monkeypatch.setattr("cersa_diffusion.training.dreambooth.get_available_trackers", list)
    with raises(ConfigError, "report_to", "wandb"):
        train_dreambooth(DreamBoothConfig(**small_settings, report_to="wandb"), [])
    assert not Path(small_settings["output_dir"]).exists()
