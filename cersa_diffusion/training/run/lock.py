"""One training at a time in the folder of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cersa_diffusion.errors import ConfigError

LOCK_FILE = ".training.lock"
# A file of its own: filelock before 4 empties a lock that somebody asks for, and Windows lets nobody read one that is held.
PROCESS_FILE = ".training.process"
# Others who look whether the lock is held have it for a moment.
PATIENCE_SECONDS = 2.0


@contextmanager
def run_lock(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from training in a folder while the block runs.

    The operating system holds the lock for this process: it ends with the process, however that ends. The folder is made where it
    does not exist, and removed again if the block leaves nothing in it.

    Args:
        output_dir: of the run.

    Raises:
        ConfigError: another process trains there, or the folder cannot be written to.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file, expected a folder")
    path = folder / LOCK_FILE
    lock = FileLock(path)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout as error:
        raise ConfigError(
            f"output_dir: {folder} is being trained by {training_process(folder) or 'another process'}: wait for its end, "
            "stop it, or choose another folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written to ({error.strerror}): choose another folder") from error
    process = folder / PROCESS_FILE
    try:
        with suppress(OSError):  # others then read no number
            process.write_text(str(os.getpid()))
        yield
    finally:
        process.unlink(missing_ok=True)
        with suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        lock.release()
        with suppress(OSError):  # the folder is in use, as it should be
            for parent in made:
                parent.rmdir()


def training_process(output_dir: str | os.PathLike) -> str | None:
    """The process that trains in a folder now, as "process N"; None: there is none.

    Args:
        output_dir: of a run.
    """
    path = Path(output_dir) / LOCK_FILE
    if not path.exists():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):  # it has only just begun, or is at its end
            return f"process {(path.parent / PROCESS_FILE).read_text()}"
        return "another process"
    except OSError:
        return None  # the folder was removed meanwhile, or is read-only: nobody trains there
    lock.release()
    return None
