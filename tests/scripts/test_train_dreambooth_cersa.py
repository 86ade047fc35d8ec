"""The training command as a user starts it: `accelerate launch scripts/train_dreambooth_cersa.py`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cersa_diffusion.training import load_result

from ..conftest import REPOSITORY, run_script, script_error

SCRIPT = "scripts/train_dreambooth_cersa.py"


def options(base_path, subject_path, subject, output: Path, **changes) -> list[str]:
    values = {
        "pretrained_model_name_or_path": base_path,
        "instance_data_dir": subject_path / "instance",
        "instance_prompt": subject["instance_prompt"],
        "output_dir": output,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 3,
    } | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", ["cersa", "lora", "full"])
def test_trains_saves_and_the_file_gives_the_same_pictures_in_a_fresh_pipeline(
    method, base_path, subject_path, subject, tmp_path
):
    prompt = "a 3d emoji of a sks cat on a blue background"
    preview = {"validation_prompt": prompt, "num_validation_images": 1, "validation_inference_steps": 7}
    arguments = options(base_path, subject_path, subject, tmp_path / "run", method=method, **preview)
    finished = run_script(SCRIPT, *arguments, launch=True)
    assert finished.returncode == 0, finished.stderr
    assert "To generate with it" in finished.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 3 and result["trainable_parameters"] > 0 and result["file_bytes"] > 0
    pipeline = load_result(method, Path(result["weights_path"]), str(base_path))
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=7, height=64, width=64).images[0]
    shown = Image.open(tmp_path / "run" / "validation" / "00.png")
    # One step of 255: `accelerate launch` runs its process on one thread, this one has more, and the last bits differ by that.
    assert np.abs(np.asarray(again).astype(int) - np.asarray(shown)).max() <= 1


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on(base_path, subject_path, subject, tmp_path):
    arguments = options(base_path, subject_path, subject, tmp_path / "run", method="lora", max_train_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.toml").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert f"stopped after step {step}" in errors
    arguments[arguments.index("100000")] = str(step + 2)
    finished = run_script(SCRIPT, *arguments, "--resume_from_checkpoint", "latest")
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == step + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "/no/such/base"}, "base /no/such/base: no such folder"),
        ({"instance_data_dir": "EMPTY"}, "instance_data_dir: no pictures in"),
        ({"instance_prompt": None}, "the following arguments are required: --instance_prompt"),
        ({"alpha": "2"}, "alpha is 2.0, expected a share in (0, 1]"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(changes, message, base_path, subject_path, subject, tmp_path):
    (tmp_path / "empty").mkdir()
    changes = {name: str(tmp_path / "empty") if value == "EMPTY" else value for name, value in changes.items()}
    error = script_error(SCRIPT, *options(base_path, subject_path, subject, tmp_path / "run", **changes))
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()
