"""When checkpoints are written, and what happens when they cannot be: steps that are done are not to be lost."""

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
        state: what is written.
        output_dir: folder of the run.
        callbacks: are told of every checkpoint.
    """

    def __init__(self, config: DreamBoothConfig, state: TrainingState, output_dir: Path, callbacks: Sequence[TrainingCallback]):
        self.config, self.state, self.output_dir, self.callbacks = config, state, output_dir, callbacks

    def keep(self, step: int) -> None:
        """Writes a checkpoint on the way; where it cannot be written, the run goes on with a warning.

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
            warnings.warn(f"{error}; the run goes on", stacklevel=2)

    def keep_last(self, step: int) -> Path:
        """Writes the checkpoint that a run ends with: beside the system's temporary files, if there is no room in its folder.

        Args:
            step: optimizer steps done.

        Returns:
            The folder of the checkpoint.

        Raises:
            NonFiniteError: a trained parameter holds NaN or infinity.
            CersaError: there is no room anywhere.
        """
        try:
            return self._write(self.output_dir, step)
        except NonFiniteError:
            raise
        except CersaError as error:
            refuge = self._refuge()
            folder = self._write(refuge, step)
            if self.state.accelerator.is_main_process:
                write_settings(self.config, refuge / SETTINGS_FILE)
            warnings.warn(
                f"{error}. It was written to {folder} instead: --resume_from_checkpoint {folder} goes on from there", stacklevel=2
            )
            return folder

    def keep_good(self, step: int, trained: bool) -> str:
        """Keeps the state before an update that would have destroyed it.

        Args:
            step: optimizer steps done.
            trained: whether this call did any of them.

        Returns:
            The end of a message: where the last good state is.
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

    def _refuge(self) -> Path:
        # The same in all processes of the run, and another one for every run.
        path = self.output_dir.absolute()
        return Path(tempfile.gettempdir()) / f"cersa-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
