"""Running tasks as processes: what they say, how they fail, how they are stopped; and on ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cersa_diffusion import CersaError, ConfigError
from cersa_diffusion.study import engines
from cersa_diffusion.study.engines import Task, find_engine, run_in_turn, run_task, run_with_ray

from ..conftest import REPOSITORY, raises


def task(name: str, code: str, folder: Path) -> Task:
    return Task(name, (sys.executable, "-c", code), folder / f"{name}.log")


def test_tasks_run_in_turn_and_what_they_say_is_kept(tmp_path):
    tasks = [task(name, f"print('this is {name}')", tmp_path) for name in ("one", "two")]
    assert list(run_in_turn(tasks)) == tasks
    assert "this is two" in tasks[1].log.read_text()


def test_a_failing_task_ends_it_with_its_last_words(tmp_path):
    tasks = [task("one", "import sys; print('x'); sys.exit('error: no room')", tmp_path), task("two", "", tmp_path)]
    with raises(CersaError, "one", "no room", "1", str(tasks[0].log)):
        list(run_in_turn(tasks))
    assert not tasks[1].log.exists()


def test_an_interrupted_engine_lets_its_task_finish_a_checkpoint(tmp_path):
    said = tmp_path / "checkpoint"
    child = (
        "import pathlib, signal, sys, time\n"
        f"path = pathlib.Path({str(said)!r})\n"
        "def stop(*_):\n    time.sleep(.3); path.write_text('written'); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, stop)\npath.with_name('ready').touch()\ntime.sleep(60)"
    )
    parent = (
        "import pathlib, sys\nfrom cersa_diffusion.study.engines import Task, run_task\n"
        f"run_task(Task('x', (sys.executable, '-c', {child!r}), pathlib.Path({str(tmp_path / 'log')!r})))"
    )
    # Whoever starts the tests in the background has them ignore Ctrl-C, and every process below them too.
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) != 0 and said.read_text() == "written"


def test_an_engine_that_is_not_there(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with raises(ConfigError, "ray", "cersa-diffusion[ray]"):
        find_engine("ray")
    with raises(ConfigError, "engine", "slurm", "process", "ray"):
        find_engine("slurm")
    assert find_engine("process") is run_in_turn


@pytest.mark.slow
def test_ray_runs_tasks_and_hands_their_failures_on(tmp_path):
    pytest.importorskip("ray")
    tasks = [task(name, "import os; print(os.environ['OMP_NUM_THREADS'])", tmp_path) for name in ("one", "two")]
    assert sorted(done.name for done in run_with_ray(tasks)) == ["one", "two"]
    assert tasks[0].log.read_text().split()[-1] == os.environ.get("OMP_NUM_THREADS", "1")
    with raises(CersaError, "bad", "room"):
        list(run_with_ray([task("bad", "import sys; sys.exit('error: no room')", tmp_path)]))


@pytest.mark.slow
def test_ray_is_stopped_by_the_programs_own_handler(tmp_path):
    pytest.importorskip("ray")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = threading.Timer(15, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_with_ray([task("long", "import time; time.sleep(120)", tmp_path)]))
    finally:
        stop.cancel()
        signal.signal(signal.SIGTERM, before)


def test_a_task_alone_can_be_run(tmp_path):
    run_task(task("one", "", tmp_path))
    assert (tmp_path / "one.log").read_text().startswith("$ ")
