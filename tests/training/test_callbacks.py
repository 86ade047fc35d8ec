"""What a program that embeds the trainer sees, and how it stops it."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cersa_diffusion.memory.cost import MemoryUse
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, TrainingStopped, train_dreambooth


class Recorder(TrainingCallback):
    def __init__(self, stop_after: int | None = None):
        self.events, self.stop_after, self.step = [], stop_after, 0

    def on_start(self, start):
        self.start = start
        self.events.append("start")

    def on_step(self, progress):
        self.step, self.progress = progress.step, progress
        self.events.append(f"step {progress.step}")

    def on_preview(self, step, pictures):
        self.pictures = pictures
        self.events.append(f"preview {step}")

    def on_checkpoint(self, step, folder):
        assert (folder / "progress.json").is_file()
        self.events.append(f"checkpoint {step}")

    def on_end(self, result):
        self.result = result
        self.events.append("end")

    def should_stop(self):
        return self.step == self.stop_after


@pytest.fixture
def settings(small_settings) -> dict:
    return small_settings | {
        "alpha": 0.8,
        "checkpointing_steps": 2,
        "validation_prompt": "a sks cat",
        "num_validation_images": 1,
        "validation_steps": 3,
    }


def test_everything_is_told_in_order(settings):
    recorder = Recorder()
    result = train_dreambooth(DreamBoothConfig(**settings), [recorder])
    assert recorder.events == [
        "start", "preview 0", "step 1", "step 2", "checkpoint 2", "step 3", "preview 3", "step 4", "checkpoint 4", "preview 4",
        "end",
    ]  # fmt: skip
    assert recorder.result == result and recorder.progress.loss == pytest.approx(result.loss)
    assert any("peak memory of preparing: " in line and "planned" in line for line in recorder.start.description)
    assert recorder.progress.pictures_per_second > 0 and recorder.progress.peak_memory > 1e8
    assert recorder.start.total_steps == 4 and recorder.start.expected_seconds > 0
    assert list(recorder.start.plan) == ["cersa", "lora r=32", "full"]
    assert all(isinstance(use, MemoryUse) for use in recorder.start.plan.values())
    text = "\n".join(recorder.start.description)
    for part in ("5 pictures", "unet: ", "text_encoder: ", "truncation: ", "memory plan", "4 steps of 2 pictures"):
        assert part in text
    assert len(recorder.pictures) == 1
    output = Path(settings["output_dir"])
    for folder in ("previews/step-000000", "previews/step-000003", "validation"):
        assert (output / folder / "00.png").is_file()


@pytest.mark.parametrize("method", ["cersa", "lora", "full"])
def test_the_plan_is_what_training_then_holds(small_settings, method):
    recorder = Recorder()
    result = train_dreambooth(DreamBoothConfig(**small_settings, method=method, rank=4), [recorder])
    plan = next(iter(recorder.start.plan.values()))
    assert plan.frozen + plan.trained == result.weight_bytes
    assert plan.gradients == result.gradient_bytes and plan.optimizer == result.optimizer_bytes


def test_previews_and_callbacks_change_nothing(settings, small_settings, tmp_path):
    watched = train_dreambooth(DreamBoothConfig(**settings, use_ema=True), [Recorder()])
    alone = train_dreambooth(
        DreamBoothConfig(**small_settings | {"alpha": 0.8, "use_ema": True, "output_dir": str(tmp_path / "alone")}), []
    )
    first, second = load_file(watched.weights_path), load_file(alone.weights_path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_stopped_in_a_thread_and_resumed_equals_uninterrupted(settings, tmp_path):
    whole = train_dreambooth(DreamBoothConfig(**settings), [])
    settings |= {"output_dir": str(tmp_path / "stopped")}
    raised = []

    def work():
        try:
            train_dreambooth(DreamBoothConfig(**settings), [Recorder(stop_after=1)])
        except TrainingStopped as stop:
            raised.append(str(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == [f"stopped after step 1; checkpoint-1 is in {settings['output_dir']}"]
    resumed = train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"), [])
    first, second = load_file(whole.weights_path), load_file(resumed.weights_path)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
