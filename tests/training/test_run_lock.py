"""One training at a time in a folder, whoever starts it and however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training.run.lock import LOCK_FILE, run_lock, training_process

from ..conftest import raises

HOLDER = """
import sys, time
from cersa_diffusion.training.run.lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_named_and_kept_out(holder, tmp_path):
    assert training_process(tmp_path / "run") == f"process {holder.pid}"
    with raises(ConfigError, "output_dir", str(tmp_path / "run"), f"process {holder.pid}"), run_lock(tmp_path / "run"):
        pass
    assert training_process(tmp_path / "run") == f"process {holder.pid}"


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists() and training_process(tmp_path / "run") is None
    with run_lock(tmp_path / "run"):
        assert training_process(tmp_path / "run") == f"process {os.getpid()}"
    assert training_process(tmp_path / "run") is None


def test_a_second_training_of_the_same_process_is_kept_out(tmp_path):
    with run_lock(tmp_path), raises(ConfigError, "output_dir", f"process {os.getpid()}"), run_lock(tmp_path):
        pass


def test_nothing_is_left_of_a_training_that_did_not_begin(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(ValueError), run_lock(folder):
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with run_lock(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with raises(ConfigError, "output_dir", str(folder)), run_lock(folder):
            pass
