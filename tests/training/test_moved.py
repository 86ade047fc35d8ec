"""A checkpoint that travels: singular vectors that come out differently on the machine where a run goes on."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cersa_diffusion import CersaError
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, train_dreambooth
from cersa_diffusion.training.checkpoints.folder import list_checkpoints

from ..conftest import raises, warns


class Losses(TrainingCallback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_step(self, progress):
        self.values.append(progress.loss)


def settings_of(small_settings: dict, tmp_path: Path, name: str, **options) -> DreamBoothConfig:
    return DreamBoothConfig(
        **small_settings | {"alpha": 0.8, "learning_rate": 1e-3, "output_dir": str(tmp_path / name)} | options
    )


@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"core": "diagonal"}, {"method": "svft"}], ids=str)
def test_the_cores_are_those_of_the_run_that_was_moved(small_settings, tmp_path, other_machine, options):
    """Nothing is left to train after the move: the result is the weight change that was trained, in other coordinates."""
    config = settings_of(small_settings, tmp_path, "run", max_train_steps=3, checkpointing_steps=3, **options)
    before = load_file(train_dreambooth(config, []).weights_path)
    (tmp_path / "run" / "result.json").unlink()
    other_machine()
    with warns(UserWarning, "checkpoint-3", "moments"):
        after = load_file(train_dreambooth(replace(config, resume_from_checkpoint="latest"), []).weights_path)
    for name, tensor in before.items():
        assert torch.allclose(after[name].float(), tensor.float(), atol=2e-3 * float(tensor.float().abs().max())), name


def test_a_moved_run_ends_within_two_percent_of_the_loss_of_the_run_that_stayed(small_settings, tmp_path, other_machine):
    whole, moved = Losses(), Losses()
    train_dreambooth(settings_of(small_settings, tmp_path, "whole", max_train_steps=60), [whole])
    config = settings_of(small_settings, tmp_path, "moved", max_train_steps=60)
    train_dreambooth(replace(config, max_train_steps=20), [])
    other_machine()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        with warns(UserWarning, "checkpoint-20", "moments"):
            train_dreambooth(replace(config, resume_from_checkpoint="latest"), [moved])
    finally:
        torch.set_num_threads(threads)
    stayed, left = (sum(losses.values[-20:]) / 20 for losses in (whole, moved))
    assert len(moved.values) == 40 and left == pytest.approx(stayed, rel=0.02)
    # The runs differ: the moments were not carried over.
    assert moved.values != whole.values[20:]


def test_with_the_cache_off_a_run_goes_on_to_the_same_bits(small_settings, tmp_path, monkeypatch):
    config = settings_of(small_settings, tmp_path, "run", max_train_steps=4)
    whole = load_file(train_dreambooth(replace(config, output_dir=str(tmp_path / "whole")), []).weights_path)
    train_dreambooth(replace(config, max_train_steps=2), [])
    monkeypatch.setenv("CERSA_CACHE", "off")
    again = load_file(train_dreambooth(replace(config, resume_from_checkpoint="latest"), []).weights_path)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_checkpoint_without_portable_cores_is_refused_on_another_machine(small_settings, tmp_path, other_machine):
    config = settings_of(small_settings, tmp_path, "run", max_train_steps=2)
    train_dreambooth(config, [])
    folder = list_checkpoints(tmp_path / "run")[-1][1]
    progress = (folder / "progress.json").read_text()
    os.remove(folder / "portable_cores.safetensors")
    lines = [line for line in progress.splitlines() if "portable_cores" not in line]
    (folder / "progress.json").write_text("\n".join(lines))
    other_machine()
    with raises(CersaError, folder.name, "portable_cores.safetensors"):
        train_dreambooth(replace(config, max_train_steps=3, resume_from_checkpoint="latest"), [])
