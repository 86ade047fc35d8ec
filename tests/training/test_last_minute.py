"""Between the last optimizer step and the result: no step is lost and no file is left half-written, whatever goes wrong."""

import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from cersa_diffusion import CersaError, NonFiniteError, files
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, finish, train_dreambooth
from cersa_diffusion.training.checkpoints import folder as checkpoints_module
from cersa_diffusion.training.checkpoints.folder import damage, list_checkpoints
from cersa_diffusion.training.run import previews
from cersa_diffusion.training.run.loss import DreamBoothLoss

from ..conftest import raises, warns

FULL = OSError(28, "No space left on device")
STEPS = 3


@pytest.fixture
def config(small_settings) -> DreamBoothConfig:
    return DreamBoothConfig(**small_settings | {"alpha": 0.8, "max_train_steps": STEPS, "checkpointing_steps": 100})


@pytest.fixture
def wanted(config, tmp_path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happens to."""
    return load_file(train_dreambooth(replace(config, output_dir=str(tmp_path / "undisturbed")), []).weights_path)


def resumed(config: DreamBoothConfig) -> dict[str, torch.Tensor]:
    """The weights after `--resume_from_checkpoint latest`; or those of the run, if it is finished."""
    output = Path(config.output_dir)
    if not (output / "result.json").exists():
        train_dreambooth(replace(config, resume_from_checkpoint="latest"), [])
    assert not [path for path in output.glob(".*") if path.suffix in (".tmp", ".old")]
    return load_file(output / "pytorch_cersa_weights.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class AtStep(TrainingCallback):
    """Calls a function after a step."""

    def __init__(self, step: int, function: Callable[[], None]):
        self.step, self.function = step, function

    def on_step(self, progress):
        if progress.step == self.step:
            self.function()


class FaultyDisk:
    """A disk that takes no write of a certain number: the calls through which everything in a run folder is written.

    Args:
        monkeypatch: of pytest.
        folder: whose writes are counted.
    """

    def __init__(self, monkeypatch, folder: Path):
        self.folder, self.writes, self.failing, self.armed = str(folder), 0, -1, False
        self._patch(monkeypatch, os, "replace", 0)
        self._patch(monkeypatch, os, "rename", 0)
        self._patch(monkeypatch, os, "mkdir", 0)
        self._patch(monkeypatch, files, "flush", 0)
        self._patch(monkeypatch, Path, "write_text", 0)
        self._patch(monkeypatch, torch, "save", 1)
        self._patch(monkeypatch, checkpoints_module, "save_file", 1)
        self._patch(monkeypatch, safetensors.torch, "save_file", 1)

    def _patch(self, monkeypatch, owner, name: str, position: int) -> None:
        original = getattr(owner, name)

        def write(*arguments, **options):
            if self.armed and str(arguments[position]).startswith(self.folder):
                self.writes += 1
                if self.writes == self.failing:
                    raise FULL
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, write)

    def arm(self) -> None:
        self.armed = True

    def next_life(self, failing: int) -> None:
        self.writes, self.failing, self.armed = 0, failing, False


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_each_write_may_fail_once(config, wanted, monkeypatch, tmp_path, stride):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "refuge"))
    (tmp_path / "refuge").mkdir()
    disk = FaultyDisk(monkeypatch, tmp_path / "failing")
    failing, lives = 1, 0
    while True:
        run = replace(config, output_dir=str(tmp_path / "failing" / str(failing)))
        disk.next_life(failing)
        try:
            train_dreambooth(run, [AtStep(STEPS, disk.arm)])
        except CersaError:
            pass
        except OSError as error:
            pytest.fail(f"write {failing} fails with a bare {error!r}")
        fired, disk.armed = disk.writes >= failing, False
        assert same(resumed(run), wanted), f"write {failing}"
        if not fired:
            break
        failing, lives = failing + stride, lives + 1
    assert lives >= 4


def test_the_result_that_cannot_be_written_is_made_up_for(config, wanted, monkeypatch):
    monkeypatch.setattr("cersa_diffusion.methods.cersa.save_adapter", _raise(FULL))
    with raises(CersaError, config.output_dir, "result", "--resume_from_checkpoint latest"):
        train_dreambooth(config, [])
    assert [step for step, folder in list_checkpoints(Path(config.output_dir)) if damage(folder) is None] == [STEPS]
    assert not list(Path(config.output_dir).glob("*.safetensors"))
    monkeypatch.undo()
    assert same(resumed(config), wanted)


def _raise(error: Exception) -> Callable:
    def function(*_, **__):
        raise error

    return function


def test_a_checkpoint_on_the_way_that_cannot_be_written_costs_a_warning(config, wanted, monkeypatch):
    save, failures = checkpoints_module.save_file, iter([FULL])

    def save_once(tensors, path):
        for error in failures:
            raise error
        save(tensors, path)

    monkeypatch.setattr(checkpoints_module, "save_file", save_once)
    with warns(UserWarning, "checkpoint-1", "--resume_from_checkpoint latest"):
        train_dreambooth(replace(config, checkpointing_steps=1), [])
    assert [step for step, _ in list_checkpoints(Path(config.output_dir))] == [2, 3]
    assert same(resumed(config), wanted)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_last_step_elsewhere(config, wanted, monkeypatch, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fill() -> None:
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))

    run = replace(config, output_dir=str(disk / "run"))
    try:
        last = str(disk / "run" / f"checkpoint-{STEPS}")
        with warns(UserWarning, last, "--resume_from_checkpoint latest") as said, raises(CersaError, run.output_dir, "result"):
            train_dreambooth(run, [AtStep(STEPS, fill)])
        assert not list((disk / "run").glob("*.safetensors"))
        (disk / "filler").unlink()
        (kept,) = tmp_path.glob("cersa-run-*/checkpoint-*")
        assert any(f"--resume_from_checkpoint {kept}" in str(warning.message) for warning in said)
        train_dreambooth(replace(run, resume_from_checkpoint=str(kept)), [])
        assert same(resumed(run), wanted)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("failing", ["pictures", "card"])
def test_what_comes_after_the_result_fails_alone_and_is_made_up_for(config, wanted, monkeypatch, failing):
    config = replace(config, validation_prompt="a sks cat", num_validation_images=1, validation_inference_steps=1)
    name = {"pictures": "_draw", "card": "write_model_card"}[failing]
    monkeypatch.setattr(finish, name, _raise(FULL))
    with warns(UserWarning, failing, "pytorch_cersa_weights.safetensors", "--resume_from_checkpoint latest"):
        result = train_dreambooth(config, [])
    output = Path(config.output_dir)
    assert same(load_file(result.weights_path), wanted)
    made = {"pictures": (output / "validation" / "00.png").exists(), "card": (output / "README.md").exists()}
    assert made == {"pictures": failing != "pictures", "card": failing != "card"}
    monkeypatch.undo()
    again = train_dreambooth(replace(config, resume_from_checkpoint="latest"), [])
    # The run is not trained or saved again: what it took stays as it was measured.
    assert again == result
    assert (output / "validation" / "00.png").exists() and (output / "README.md").exists()


def test_previews_that_cannot_be_written_cost_a_warning(config, wanted, monkeypatch):
    config = replace(config, validation_prompt="a sks cat", num_validation_images=1, validation_inference_steps=1)
    save = previews.save

    def save_result_only(pictures, folder):
        if folder.parent.name == previews.FOLDER:
            raise FULL
        save(pictures, folder)

    monkeypatch.setattr(previews, "save", save_result_only)
    with warns(UserWarning, "previews", "step 0"):
        train_dreambooth(config, [])
    assert same(resumed(config), wanted)


@pytest.mark.parametrize("moment", ["on the way", "last step"])
def test_nan_stops_with_the_last_good_state(config, tmp_path, monkeypatch, moment):
    step = {"on the way": 2, "last step": STEPS}[moment]
    good = replace(config, max_train_steps=step - 1, output_dir=str(tmp_path / "good"))
    train_dreambooth(good, [])
    squared_errors, calls = DreamBoothLoss.squared_errors, iter(range(100))

    def lost(self, batch, models):
        errors, timesteps = squared_errors(self, batch, models)
        # Before the training two batches probe the truncation and one the time that a step takes.
        trains = torch.is_grad_enabled() and next(calls) == step
        return (errors * float("nan") if trains else errors), timesteps

    monkeypatch.setattr(DreamBoothLoss, "squared_errors", lost)
    with raises(NonFiniteError, f"step {step}", "learning_rate", f"checkpoint-{step - 1}"):
        train_dreambooth(config, [])
    kept, expected = (
        load_file(Path(output) / f"checkpoint-{step - 1}" / "trained_weights.safetensors")
        for output in (config.output_dir, good.output_dir)
    )
    assert same(kept, expected)


def test_weights_that_an_update_destroys_replace_no_good_checkpoint(config):
    class Destroy(TrainingCallback):
        def on_step(self, progress):
            if progress.step == 2:
                with torch.no_grad():
                    next(iter(self.parameters())).fill_(float("inf"))

    destroyer = Destroy()
    from cersa_diffusion.training.run import loop as run_module

    class Watched(run_module.DreamBoothRun):
        def _prepare_for_accelerate(self):
            super()._prepare_for_accelerate()
            destroyer.parameters = self.trained

    import cersa_diffusion.training.dreambooth as dreambooth

    original, dreambooth.DreamBoothRun = dreambooth.DreamBoothRun, Watched
    try:
        with raises(NonFiniteError, "unet.time_embedding.linear_1.cores.default.D", "learning_rate", "checkpoint-1"):
            train_dreambooth(replace(config, checkpointing_steps=1), [destroyer])
    finally:
        dreambooth.DreamBoothRun = original
    assert [step for step, _ in list_checkpoints(Path(config.output_dir))] == [1]


# Sudden death and requests to stop, in processes of their own.
_CONTEXT = multiprocessing.get_context("forkserver")


def _run(config: DreamBoothConfig, last_step_done) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    train_dreambooth(config, [AtStep(STEPS, last_step_done.set)])


def _live(config: DreamBoothConfig, signal_number: int | None, delay: float) -> float:
    """Runs a training and sends it a signal some seconds after its last step; returns the seconds from there to its result."""
    last_step_done = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_run, args=(config, last_step_done))
    process.start()
    assert last_step_done.wait(240)
    start, result = time.monotonic(), Path(config.output_dir) / "result.json"
    while signal_number is None and not result.exists():
        time.sleep(0.001)
    seconds = time.monotonic() - start
    time.sleep(delay)
    if signal_number is not None and process.is_alive():
        os.kill(process.pid, signal_number)
    process.join(240)
    assert process.exitcode is not None
    return seconds


@pytest.mark.parametrize("moments", [1, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_signals_after_the_last_step_cost_nothing(config, wanted, tmp_path, name, moments):
    _CONTEXT.set_forkserver_preload(["cersa_diffusion.training"])
    seconds = _live(replace(config, output_dir=str(tmp_path / "timed")), None, 0)
    moment = random.Random(name)
    for life in range(moments):
        run = replace(config, output_dir=str(tmp_path / str(life)), checkpointing_steps=1)
        _live(run, getattr(signal, name), moment.uniform(0, seconds))
        output = Path(run.output_dir)
        if name == "SIGKILL":
            # A kill before the last checkpoint is whole costs the steps since the one before.
            assert [step for step, folder in list_checkpoints(output) if damage(folder) is None][-1] >= STEPS - 1
        else:
            assert (output / "result.json").exists()
        assert same(resumed(run), wanted)
