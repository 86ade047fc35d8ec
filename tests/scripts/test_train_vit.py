"""The image classification command as a user starts it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cersa_diffusion.classification import load_classifier

from ..conftest import REPOSITORY, run_script, script_error

SCRIPT = "scripts/train_vit_cersa.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of dark and light pictures of 64 pixels."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(32):
        target = folder / ("light" if number % 2 else "dark")
        target.mkdir(exist_ok=True)
        pixels = rng.integers(0, 100, (64, 64, 3)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")
    return folder


def options(pictures, output, **changes) -> list[str]:
    values = {
        "model_name_or_path": REPOSITORY / "assets" / "emoji-vit",
        "train_dir": pictures,
        "validation_fraction": 0.5,
        "output_dir": output,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
    } | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def test_trains_and_leaves_figures_a_row_and_a_result(pictures, tmp_path):
    finished = run_script(SCRIPT, *options(pictures, tmp_path / "run", preset="vit-base/oxford-pets", max_steps=12, bf16=True))
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["score"] > 0.9 and metrics["preset"] == "vit-base/oxford-pets (Table 12)"
    assert (tmp_path / "run" / "table_row.md").read_text() in finished.stdout
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    # The command line comes before the preset, the preset before the defaults.
    assert settings["learning_rate"] == 5e-3 and settings["classifier_learning_rate"] == 1e-3 and settings["weight_decay"] == 0.01
    model, processor = load_classifier(tmp_path / "run" / "result")
    picture = Image.open(next((pictures / "light").iterdir()))
    found = model(**processor(picture, return_tensors="pt")).logits.argmax().item()
    assert model.config.id2label[found] == "light"


def test_two_processes_share_the_work(pictures, tmp_path):
    """All examples at every step, whose order is then no matter: the losses of one process."""
    losses = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        changes = {"per_device_train_batch_size": 16 // processes, "logging_steps": 1, "attention_dropout": 0.0, "max_steps": 3}
        changes |= {"random_resized_crop": True, "use_cpu": True}  # two processes would need two GPUs
        # What `accelerate launch` itself starts for several GPUs; on CPUs it asks for an MPI.
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", *launcher, SCRIPT, *options(pictures, output, **changes)]
        finished = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
        )
        assert finished.returncode == 0, finished.stderr
        state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
        losses[processes] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert json.loads((output / "metrics.json").read_text())["examples"] == {"train": 16, "validation": 16}
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "/no/such/model"}, "model /no/such/model: no such folder"),
        ({"train_dir": "/no/such/folder"}, "train_dir: /no/such/folder is not a folder"),
        ({"preset": "vit-huge/dtd"}, "preset is 'vit-huge/dtd', expected one of vit-large/cifar-100"),
        ({"alpha": 2}, "alpha is 2.0, expected a share in (0, 1]"),
        ({"warmup_ratio": 0.1}, "error: unknown options: --warmup_ratio 0.1"),
        ({"bf16": True, "fp16": True}, "error: At most one of fp16 and bf16 can be True"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(changes, message, pictures, tmp_path):
    error = script_error(SCRIPT, *options(pictures, tmp_path / "run", **changes))
    assert message in error and "\n" not in error
    assert not (tmp_path / "run").exists()
