"""A lock that allows only one training at a time in the folder of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cersa_diffusion.errors import ConfigError

LOCK_FILE = ".training.lock"
# A separate file: filelock before 4 empties a lock file on every attempt to take it, and Windows blocks reading a held lock file.
PROCESS_FILE = ".training.process"
# `training_process` in another process holds the lock for a moment.
PATIENCE_SECONDS = 2.0


@contextmanager
def run_lock(output_dir: str | os.PathLike) -> Iterator[None]:
    """Prevents other processes from training in a folder while the block runs.

    The operating system releases the lock when the process ends, even if it is killed. A folder that does not exist is created,
    and is removed again if the block leaves it empty.

    Args:
        output_dir: folder of the run.

    Raises:
        ConfigError: another process trains there, or the folder cannot be written to.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file, expected a folder")
    path = folder / LOCK_FILE
    lock = FileLock(path)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout as error:
        raise ConfigError(
            f"output_dir: {training_process(folder) or 'another process'} is training in {folder}: wait until it ends, stop it, "
            "or choose another folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to ({error.strerror}): choose another folder") from error
    process = folder / PROCESS_FILE
    try:
        with suppress(OSError):  # the messages of other processes then lack the number of this one
            process.write_text(str(os.getpid()))
        yield
    finally:
        process.unlink(missing_ok=True)
        with suppress(OSError):  # Windows does not remove open files
            path.unlink()
        lock.release()
        with suppress(OSError):  # the folder holds files: it stays
            for parent in created:
                parent.rmdir()


def training_process(output_dir: str | os.PathLike) -> str | None:
    """The process that is training in a folder, as "process N"; None if there is none.

    Args:
        output_dir: folder of a run.
    """
    path = Path(output_dir) / LOCK_FILE
    if not path.exists():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):  # the other process has just started or is about to end
            return f"process {(path.parent / PROCESS_FILE).read_text()}"
        return "another process"
    except OSError:
        return None  # the folder was removed in the meantime or is read-only: no process trains there
    lock.release()
    return None
