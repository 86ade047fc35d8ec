"""The builder of the embedded models: what it leaves out, what captions say, and that its training resumes."""

import sys

import pytest
import torch

from ..conftest import REPOSITORY, run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))

from embedded_base.captions import captions_of
from embedded_base.names import is_held_back
from embedded_base.spectra import spectrum_table
from embedded_base.training import Stage, learning_rate_factor, make_optimizer


@pytest.mark.parametrize("name", ["grinning cat", "crying cat", "monkey face", "robot", "ghost"])
def test_subjects_are_left_out_in_the_fluent_looks_only(name):
    assert [is_held_back(name, style) for style in ("3d", "flat", "noto", "twemoji")] == [True, True, False, False]
    assert not is_held_back("dog face", "3d")


def test_captions_name_the_look_and_the_background():
    captions = captions_of("red apple", "3d", "blue", None, ("fruit",))
    assert "a 3d emoji of a red apple on a blue background" in captions
    assert all(caption.endswith("on a blue background") for caption in captions)
    assert not all("background" in caption for caption in captions_of("red apple", "3d", "white", None, ()))


def test_learning_rate_rises_and_falls_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] < 0.01 and factors[300] == 1.0 and factors[1000] == 0.0


def train_toy(folder, steps, stop_at=None) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer, schedule = make_optimizer([(model, 1e-2)], steps, weight_decay=0.1)
    stage = Stage(folder, steps, 8, {"model": model, "optimizer": optimizer, "schedule": schedule})

    def train_step(step):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 == stop_at:
            stage._ask_to_stop()
        return loss.detach()

    stage.run(train_step)
    return model.weight.detach()


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train_toy(tmp_path / "whole", 60)
    with pytest.raises(SystemExit, match="stopped at step 25 of 60"):
        train_toy(tmp_path / "parts", 60, stop_at=25)
    assert torch.equal(train_toy(tmp_path / "parts", 60), whole)


def test_spectrum_table_of_a_layer_of_known_spectrum():
    model = torch.nn.Module()
    model.to_q = torch.nn.Linear(10, 10)
    model.to_q.weight.data = torch.eye(10)
    assert "| time embedding | 1 | 0.80 | 0.90 | 1.00 |" in spectrum_table({"m": model}).replace("| m ", "")


def test_help_names_the_stages():
    finished = run_script("scripts/build_base.py", "--help")
    assert finished.returncode == 0 and "autoencoder" in finished.stdout and "--vocabulary" in finished.stdout
