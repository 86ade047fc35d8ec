"""The peers' own trainer tests, several processes and sudden death, through `accelerate launch` on a small base."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cersa_diffusion.training import load_result

from ..conftest import REPOSITORY, run_script
from ..pipelines_small import SIZE, pipeline

SCRIPTS = {"sd1": "scripts/train_dreambooth_cersa.py", "sdxl": "scripts/train_dreambooth_cersa_sdxl.py"}
RANKS = ("--rank", "2", "--svfit_rank", "4", "--alpha", "0.8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("bases") / family for family in SCRIPTS}
    for family, folder in folders.items():
        pipeline(family).save_pretrained(folder)
    return folders


def arguments(base: Path, subject_path: Path, output: Path, **options) -> list[str]:
    values = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": subject_path / "instance",
        "instance_prompt": "a sks cat",
        "output_dir": output,
        "resolution": SIZE,
        "train_batch_size": 1,
    } | options
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def launch(family: str, *options: str) -> subprocess.CompletedProcess:
    finished = run_script(SCRIPTS[family], *options, launch=True)
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.parametrize("family", SCRIPTS)
def test_two_steps_write_a_file_that_a_fresh_pipeline_opens(family, bases, subject_path, tmp_path):
    launch(family, *arguments(bases[family], subject_path, tmp_path / "run", max_train_steps=2), "--alpha", "0.8")
    path = tmp_path / "run" / "pytorch_cersa_weights.safetensors"
    components = {name.partition(".")[0] for name in load_file(path)}
    assert components == {"sd1": {"unet", "text_encoder"}, "sdxl": {"unet", "text_encoder", "text_encoder_2"}}[family]
    opened = load_result("cersa", path, str(bases[family]))
    assert opened.get_active_cersa_adapters()


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "svfit", "svft", "full"])
@pytest.mark.slow
def test_every_method_launches(method, bases, subject_path, tmp_path):
    options = arguments(bases["sd1"], subject_path, tmp_path / "run", max_train_steps=2, method=method, validation_prompt="a cat")
    finished = launch("sd1", *options, *RANKS)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert load_result(method, Path(result["weights_path"]), str(bases["sd1"])) is not None
    assert str(result["weights_path"]) in finished.stdout
    assert (tmp_path / "run" / "validation" / "00.png").is_file()


def test_checkpoints_are_limited_resumed_and_not_made_again(bases, subject_path, tmp_path):
    """6 steps with checkpoints every 2 and a limit of 2 leave {4, 6}; 4 -> 8 leaves {6, 8}; a deleted one stays away."""
    output = tmp_path / "run"
    shared = {"method": "lora", "rank": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 2}

    def checkpoints() -> set[str]:
        return {path.name for path in output.glob("*checkpoint*")}

    launch("sd1", *arguments(bases["sd1"], subject_path, output, max_train_steps=6, **shared))
    assert checkpoints() == {"checkpoint-4", "checkpoint-6"}
    going_on = {"max_train_steps": 8, "resume_from_checkpoint": "checkpoint-4"}
    launch("sd1", *arguments(bases["sd1"], subject_path, output, **shared | going_on))
    assert checkpoints() == {"checkpoint-6", "checkpoint-8"}


def logged_losses(output: Path) -> list[float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = [accumulator.EventAccumulator(str(path)) for path in (output / "logs").rglob("events*")]
    events = next(log for log in logs if "loss" in log.Reload().Tags()["scalars"])
    return [event.value for event in events.Scalars("loss")]


def test_two_processes_are_one_with_twice_the_batch(bases, subject_path, tmp_path):
    shared = {"max_train_steps": 4, "report_to": "tensorboard", "alpha": 0.8, "lr_scheduler": "linear", "checkpointing_steps": 2}
    one = arguments(bases["sd1"], subject_path, tmp_path / "one", **shared | {"train_batch_size": 4})
    launch("sd1", *one)
    two = arguments(bases["sd1"], subject_path, tmp_path / "two", **shared | {"train_batch_size": 2})
    # accelerate starts several processes on a CPU through MPI only; this way torch does, over gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", SCRIPTS["sd1"]]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(*options: str) -> None:
        finished = subprocess.run(
            [*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900
        )
        assert finished.returncode == 0, finished.stderr

    start(*two)
    assert logged_losses(tmp_path / "two") == pytest.approx(logged_losses(tmp_path / "one"), abs=1e-4)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["steps"] == 4
    # And they resume together.
    start(*two, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["steps"] == 6


class Victim:
    """A run that is killed again and again, and finds an empty cache of decompositions at every start.

    Args:
        options: of its command line.
        output: its folder.
        caches: folder for the caches.
        seed: of the moments of death.
    """

    def __init__(self, options: list[str], output: Path, caches: Path, seed: int):
        self.options, self.output, self.caches, self.random = options, output, caches, random.Random(seed)
        self.deaths_while_writing = 0

    @property
    def environment(self) -> dict[str, str]:
        """With another cache at every call."""
        self.caches.mkdir(exist_ok=True)
        return os.environ | {"CERSA_CACHE": tempfile.mkdtemp(dir=self.caches)}

    def latest(self) -> int:
        steps = [int(path.name.partition("-")[2]) for path in self.output.glob("checkpoint-*")]
        return max(steps, default=0)

    def live_and_die(self) -> None:
        """Starts the run, lets it get ahead by a step at least, and kills it: in every second life while it writes."""
        start = self.latest()
        process = subprocess.Popen(
            [sys.executable, SCRIPTS["sd1"], *self.options, "--resume_from_checkpoint", "latest"],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        writing = self.random.random() < 0.5
        deadline = time.monotonic() + 300
        while self.latest() <= start and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.3))
        while writing and process.poll() is None and not list(self.output.glob(".checkpoint-*.tmp/*")):
            time.sleep(0.0002)
        self.deaths_while_writing += bool(list(self.output.glob(".checkpoint-*.tmp/*")))
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("method", "deaths"),
    [("cersa", 1), pytest.param("cersa", 30, marks=pytest.mark.slow), pytest.param("lora", 30, marks=pytest.mark.slow)],
)
def test_killed_runs_resume_and_end_in_the_same_weights(method, deaths, bases, subject_path, tmp_path):
    # More steps than 0.4 s of every life can do, or one of them would end of itself.
    shared = {"max_train_steps": 60 * deaths, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "method": method,
              "lr_scheduler": "cosine"}  # fmt: skip
    options = arguments(bases["sd1"], subject_path, tmp_path / "killed", **shared) + list(RANKS)
    victim = Victim(options, tmp_path / "killed", tmp_path / "caches", seed=deaths)
    for _ in range(deaths):
        victim.live_and_die()
    rest = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", "10000")
    finished = run_script(SCRIPTS["sd1"], *options, *rest, environment=victim.environment)
    assert finished.returncode == 0, finished.stderr
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))
    whole = arguments(bases["sd1"], subject_path, tmp_path / "whole", **shared | {"checkpointing_steps": 10000})
    finished = run_script(SCRIPTS["sd1"], *whole, *RANKS)
    assert finished.returncode == 0, finished.stderr
    if method == "cersa":
        assert all(any(cache.iterdir()) for cache in (tmp_path / "caches").iterdir())
    killed, alone = (load_file(tmp_path / name / f"pytorch_{method}_weights.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(tensor, alone[name]) for name, tensor in killed.items())
    assert deaths < 30 or victim.deaths_while_writing >= 3
