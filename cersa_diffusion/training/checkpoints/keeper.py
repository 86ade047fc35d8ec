"""When checkpoints are written, and how finished steps are kept if a checkpoint cannot be written."""

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from cersa_diffusion.errors import CersaError, NonFiniteError
from cersa_diffusion.training.callbacks import TrainingCallback
from cersa_diffusion.training.checkpoints.folder import TrainingState, list_checkpoints, save_checkpoint
from cersa_diffusion.training.settings.config import DreamBoothConfig
from cersa_diffusion.training.settings.file import SETTINGS_FILE, write_settings


class CheckpointKeeper:
    """Writes the checkpoints of a run.

    Args:
        config: the settings of the run.
        state: the state that is written.
        output_dir: folder of the run.
        callbacks: are called for every checkpoint.
    """

    def __init__(self, config: DreamBoothConfig, state: TrainingState, output_dir: Path, callbacks: Sequence[TrainingCallback]):
        self.config, self.state, self.output_dir, self.callbacks = config, state, output_dir, callbacks

    def keep(self, step: int) -> None:
        """Writes a checkpoint during the run; if it cannot be written, the run continues with a warning.

        Args:
            step: optimizer steps done.

        Raises:
            NonFiniteError: a trained parameter holds NaN or infinity.
        """
        try:
            self._write(self.output_dir, step)
        except NonFiniteError:
            raise
        except CersaError as error:
            warnings.warn(f"{error}; the run continues", stacklevel=2)

    def keep_last(self, step: int) -> Path:
        """Writes the last checkpoint of a run: in the system's temporary folder if its own has no room; returns its folder.

        Args:
            step: optimizer steps done.

        Raises:
            NonFiniteError: a trained parameter holds NaN or infinity.
            CersaError: neither folder has room.
        """
        try:
            return self._write(self.output_dir, step)
        except NonFiniteError:
            raise
        except CersaError as error:
            fallback = self._fallback_folder()
            folder = self._write(fallback, step)
            if self.state.accelerator.is_main_process:
                write_settings(self.config, fallback / SETTINGS_FILE)
            warnings.warn(
                f"{error}. It was written to {folder} instead: continue with --resume_from_checkpoint {folder}", stacklevel=2
            )
            return folder

    def keep_good(self, step: int, trained: bool) -> str:
        """Keeps the last state without NaN and infinity; returns the end of a message that names its checkpoint.

        Args:
            step: optimizer steps done.
            trained: whether this call did any of them.
        """
        if trained:
            with contextlib.suppress(CersaError):
                return f"; the state after step {step} is in {self.keep_last(step)}"
        checkpoints = list_checkpoints(self.output_dir)
        return f"; the last good state is in {checkpoints[-1][1]}" if checkpoints else ""

    def _write(self, folder: Path, step: int) -> Path:
        checkpoint = save_checkpoint(self.state, folder, step, self.config.checkpoints_total_limit)
        for callback in self.callbacks:
            callback.on_checkpoint(step, checkpoint)
        return checkpoint

    def _fallback_folder(self) -> Path:
        # The same folder in all processes of the run, and a different one for every run.
        path = self.output_dir.absolute()
        return Path(tempfile.gettempdir()) / f"cersa-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
