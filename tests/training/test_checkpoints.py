"""Checkpoints that were damaged, left half-written, or do not fit on the disk."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from cersa_diffusion import CersaError, ConfigError
from cersa_diffusion.training import DreamBoothConfig, train_dreambooth
from cersa_diffusion.training.checkpoints.folder import TrainingState, damage, list_checkpoints, save_checkpoint

from ..conftest import raises, warns


@pytest.fixture
def settings(small_settings) -> dict:
    return small_settings | {"method": "lora", "rank": 2, "checkpointing_steps": 2}


@pytest.fixture
def finished(settings):
    """A run of six steps with checkpoints after 2, 4 and 6."""
    return train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 6}), [])


def spoil(folder: Path, way: str) -> None:
    if way == "a byte":
        path = folder / "optimizer.bin"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif way == "cut short":
        path = folder / "trained_weights.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    elif way == "missing":
        (folder / "scheduler.bin").unlink()
    elif way == "no progress":
        (folder / "progress.json").unlink()
    else:
        (folder / "progress.json").write_text("{")


@pytest.mark.parametrize(
    ("way", "file"),
    [
        ("a byte", "optimizer.bin"),
        ("cut short", "trained_weights.safetensors"),
        ("missing", "scheduler.bin"),
        ("no progress", "progress.json"),
        ("half progress", "progress.json"),
    ],
)
def test_latest_skips_a_damaged_one_with_a_warning_and_ends_in_the_same_weights(finished, settings, tmp_path, way, file):
    wanted = load_file(finished.weights_path)
    output = Path(finished.output_dir)
    (output / "result.json").unlink()
    spoil(output / "checkpoint-6", way)
    spoil(output / "checkpoint-4", way)
    assert damage(output / "checkpoint-4") and damage(output / "checkpoint-2") is None
    # Nothing is deleted that could be gone on from, although the damaged ones have higher numbers.
    settings |= {"max_train_steps": 6, "checkpoints_total_limit": 1}
    with warns(UserWarning, "checkpoint-4", file):
        resumed = train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"), [])
    assert [step for step, folder in list_checkpoints(output) if damage(folder) is None] == [6]
    again = load_file(resumed.weights_path)
    assert all(torch.equal(tensor, again[name]) for name, tensor in wanted.items())
    with raises(ConfigError, "resume_from_checkpoint", "checkpoint-1", "progress.json"):
        (output / "checkpoint-1").mkdir()
        train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 8}, resume_from_checkpoint="checkpoint-1"), [])


def test_the_limit_counts_good_checkpoints_only(finished):
    output, accelerator = Path(finished.output_dir), Accelerator()
    spoil(output / "checkpoint-6", "cut short")
    save_checkpoint(TrainingState(accelerator, {}), output, 8, limit=2)
    assert [step for step, folder in list_checkpoints(output) if damage(folder) is None] == [4, 8]


def test_what_a_killed_run_left_is_removed_and_not_taken_for_a_checkpoint(settings):
    output = Path(settings["output_dir"])
    (output / ".checkpoint-2.tmp").mkdir(parents=True)
    (output / ".checkpoint-2.tmp" / "optimizer.bin").write_bytes(b"half")
    train_dreambooth(DreamBoothConfig(**settings, resume_from_checkpoint="latest"), [])
    assert not list(output.glob(".checkpoint-*"))


def test_a_full_disk_is_refused_before_the_first_step(settings, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 1000))
    with raises(ConfigError, "output_dir", settings["output_dir"], "0 MiB"):
        train_dreambooth(DreamBoothConfig(**settings), [])
    assert not Path(settings["output_dir"]).exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(finished):
    output = Path(finished.output_dir)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    # A file where the folder must go: as good as a disk that takes nothing more, and works as root too.
    (output / ".checkpoint-8.tmp").write_text("in the way")
    with raises(CersaError, str(output / "checkpoint-8"), ".checkpoint-8.tmp", "--resume_from_checkpoint latest"):
        save_checkpoint(TrainingState(Accelerator(), {}), output, 8, limit=1)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_killed_between_the_last_checkpoint_and_the_result(finished, settings):
    output, wanted = Path(finished.output_dir), load_file(finished.weights_path)
    (output / "result.json").unlink()
    Path(finished.weights_path).unlink()
    resumed = train_dreambooth(DreamBoothConfig(**settings | {"max_train_steps": 6}, resume_from_checkpoint="latest"), [])
    again = load_file(resumed.weights_path)
    assert resumed.steps == 6 and all(torch.equal(tensor, again[name]) for name, tensor in wanted.items())
