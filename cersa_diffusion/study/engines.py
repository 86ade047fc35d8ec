"""Runs tasks, each in its own process: one after the other on this machine, or on several cores and machines with ray."""

import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cersa_diffusion.errors import CersaError, ConfigError


@dataclass(frozen=True)
class Task:
    """A command.

    Args:
        name: name of the task in messages.
        command: the program and its arguments.
        log: file for the output of the command.
    """

    name: str
    command: tuple[str, ...]
    log: Path


# Runs tasks and yields each task when it is done.
Engine = Callable[[Sequence[Task]], Iterator[Task]]


def run_task(task: Task) -> None:
    """Runs a task to its end; after an interrupt it waits until the task has written its checkpoint.

    Raises:
        CersaError: the task failed.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(task.command)}\n")
        log.flush()
        # In a new session, so that the process gets one signal after Ctrl-C: a second one would interrupt the checkpoint.
        process = subprocess.Popen(task.command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    _check(task, code)


def _check(task: Task, code: int) -> None:
    if code:
        lines = task.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise CersaError(f"{task.name}: {lines[-1].removeprefix('error: ')} (exit code {code}; see {task.log} for the output)")


def run_in_turn(tasks: Sequence[Task]) -> Iterator[Task]:
    """Runs tasks one after the other, and yields each task when it is done.

    Raises:
        CersaError: a task failed; the tasks after it are not started.
    """
    for task in tasks:
        run_task(task)
        yield task


def run_with_ray(tasks: Sequence[Task]) -> Iterator[Task]:
    """Runs tasks on the ray cluster of RAY_ADDRESS, or else on the cores (or GPUs) of this machine; yields each when it is done.

    Several machines need this package, the base and the output under the same paths, on a shared file system.

    Raises:
        CersaError: a task failed; the other tasks are stopped.
    """
    import ray
    import torch

    def run_remotely(command: tuple[str, ...], log: str) -> int:
        # Uses nothing of this package, because a worker that only waits for a process does not need to load torch.
        with open(log, "a", encoding="utf-8") as file:
            return subprocess.call(command, stdout=file, stderr=file)

    threads = os.environ.get("OMP_NUM_THREADS", "1")
    on_termination = signal.getsignal(signal.SIGTERM)
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    if threading.current_thread() is threading.main_thread():
        # The handler of ray would end the program with a stack trace.
        signal.signal(signal.SIGTERM, on_termination)
    try:
        # Each task gets as many threads as without ray, because the last digits depend on the number of threads.
        remote = ray.remote(
            num_cpus=int(threads),
            num_gpus=1 if torch.cuda.is_available() else 0,
            max_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )(run_remotely)
        for task in tasks:
            task.log.parent.mkdir(parents=True, exist_ok=True)
        running = {remote.remote(task.command, str(task.log)): task for task in tasks}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            _check(task, ray.get(done))
            yield task
    finally:
        ray.shutdown()


ENGINES: dict[str, Engine] = {"process": run_in_turn, "ray": run_with_ray}


def find_engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        ConfigError: the engine is unknown, or its package is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    if name == "ray" and not find_spec("ray"):
        raise ConfigError("engine ray needs the package ray: pip install 'cersa-diffusion[ray]', or leave --engine out")
    return ENGINES[name]
