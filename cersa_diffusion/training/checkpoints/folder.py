"""Checkpoints to resume from: accelerate's state of optimizer, scheduler, scaler and random numbers, plus the trained weights."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cersa_diffusion.errors import CersaError, ConfigError, NonFiniteError
from cersa_diffusion.files import flush, flush_tree, replace_path
from cersa_diffusion.layers.model import cersa_layers
from cersa_diffusion.processes import any_process
from cersa_diffusion.text import one_line
from cersa_diffusion.training.checkpoints.portable import AVERAGE, TRAINED, core_parameters, restore_portable, save_portable

# Written last: a folder is a checkpoint only if this file exists and the folder's files are those that it lists.
PROGRESS_FILE = "progress.json"
WEIGHTS_FILE = "trained_weights.safetensors"
FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")


def trained_weights(components: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All trained parameters, by the name "component.parameter"."""
    return {
        f"{component}.{name}": parameter
        for component, model in components.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def basis_digest(components: dict[str, nn.Module]) -> str:
    """A hash of all CERSA bases: cores and optimizer moments are valid in these coordinates only."""
    digest = hashlib.sha256()
    for model in components.values():
        for name, layer in cersa_layers(model).items():
            digest.update(name.encode())
            for basis in (layer.U, layer.Vh):
                digest.update(basis.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class TrainingState:
    """The state of a run that a checkpoint stores.

    Attributes:
        accelerator: holds optimizer, scheduler, scaler and random numbers.
        components: the unwrapped models by name.
        optimizer: the optimizer of the trained parameters.
        average: their moving average, or None.
    """

    accelerator: Accelerator
    components: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer | None = None
    average: EMAModel | None = None

    @cached_property
    def bases(self) -> str:
        """`basis_digest` of the components; frozen bases never change, so it is computed once."""
        return basis_digest(self.components)

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """Trained parameter -> its moving average; empty if there is none."""
        if self.average is None:
            return {}
        return dict(zip(trained_weights(self.components).values(), self.average.shadow_params, strict=True))


def save_checkpoint(state: TrainingState, output_dir: Path, step: int, limit: int | None) -> Path:
    """Writes checkpoint-STEP under a temporary name, renames it, and only then removes the oldest ones beyond the limit.

    Args:
        state: the state of the run.
        output_dir: folder of the run.
        step: optimizer steps done.
        limit: the number of checkpoints to keep, or None for all.

    Returns:
        The folder of the checkpoint.

    Raises:
        NonFiniteError: a trained parameter holds NaN or infinity; nothing is written.
        CersaError: the checkpoint cannot be written (a full disk); raised in every process, and earlier checkpoints remain.
    """
    check_finite(state.components)
    accelerator = state.accelerator
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"

    def begin() -> None:
        if accelerator.is_main_process:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)

    def write_states() -> None:
        try:
            accelerator.save_state(str(temporary))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.save raises no OSError if the disk is full
            raise OSError(one_line(error)) from error

    def finish() -> None:
        if accelerator.is_main_process:
            _write_files(state, temporary, step)
            replace_path(temporary, final)
            flush(output_dir)

    for stage in (begin, write_states, finish):
        error = _run_stage(stage, accelerator)
        if error is not None:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CersaError(
                f"{final}: cannot be written ({error}); earlier checkpoints are unchanged: make room, then continue with "
                "--resume_from_checkpoint latest"
            ) from error
    if accelerator.is_main_process and limit is not None:
        _remove_old(output_dir, step, limit)
    accelerator.wait_for_everyone()
    return final


def check_finite(components: dict[str, nn.Module]) -> None:
    """Checks the trained weights.

    Raises:
        NonFiniteError: a trained parameter holds NaN or infinity.
    """
    for name, parameter in trained_weights(components).items():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"{name} holds NaN or infinity after an optimizer step: lower learning_rate")


def _run_stage(stage: Callable[[], None], accelerator: Accelerator) -> Exception | None:
    """Runs a stage of the writing; returns the error of this process, or one that says that another process failed."""
    error = None
    try:
        stage()
    except (OSError, SafetensorError) as caught:  # safetensors raises no OSError if the disk is full
        error = caught
    if any_process(error is not None, accelerator.device):
        return error or OSError("another process could not write its part")
    return None


def _write_files(state: TrainingState, folder: Path, step: int) -> None:
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_weights(state.components).items()}
    save_file(weights, folder / WEIGHTS_FILE)
    save_portable(state.components, folder, state.averages)
    files = {str(path.relative_to(folder)): _file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    progress = {"step": step, "bases": state.bases, "files": files}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n")
    # A checkpoint that a power cut leaves incomplete must not have the name of a complete one.
    flush_tree(folder)


def _remove_old(output_dir: Path, step: int, limit: int) -> None:
    """Keeps the newest `limit` undamaged checkpoints, including the one of this step; damaged ones do not count as kept."""
    kept = 1
    for number, folder in reversed(list_checkpoints(output_dir)):
        if number < step:
            if kept == limit:
                # A checkpoint that cannot be removed only takes disk space.
                shutil.rmtree(folder, ignore_errors=True)
            else:
                kept += damage(folder) is None


def remove_leftovers(output_dir: Path) -> None:
    """Removes the incomplete files of a killed run."""
    for pattern in (".*.tmp", ".*.old"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """The first fault of a checkpoint folder, or None if every file is unchanged."""
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
        files = progress["files"]
        int(progress["step"]), str(progress["bases"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{PROGRESS_FILE} cannot be read ({error})"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _file_digest(path) != digest:
            return f"{name} differs from what was written"
    return None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints, oldest first, including damaged ones."""
    folders = [(FOLDER_PATTERN.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in folders if match)


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None for "latest" if there is no undamaged checkpoint.

    Raises:
        ConfigError: the named folder is not a checkpoint, or is damaged.
    """
    if resume_from == "latest":
        for _, folder in reversed(list_checkpoints(output_dir)):
            reason = damage(folder)
            if reason is None:
                return folder
            warnings.warn(f"checkpoint {folder} is skipped: {reason}", stacklevel=2)
        return None
    folder = next((path for path in (Path(resume_from), output_dir / resume_from) if (path / PROGRESS_FILE).is_file()), None)
    if folder is None:
        raise ConfigError(f"resume_from_checkpoint: {resume_from} is not a checkpoint folder (it contains no {PROGRESS_FILE})")
    reason = damage(folder)
    if reason is not None:
        raise ConfigError(f"resume_from_checkpoint: {folder} is damaged ({reason}): choose an earlier checkpoint, or 'latest'")
    return folder


def checkpoint_step(folder: Path) -> int:
    """The number of optimizer steps that a checkpoint has done."""
    return json.loads((folder / PROGRESS_FILE).read_text())["step"]


def load_checkpoint(state: TrainingState, folder: Path) -> int:
    """Restores the state of a checkpoint; returns the number of steps it has done.

    If the singular vectors differ from those at the time of writing, the cores are solved for in the present ones, and the
    optimizer's moments are reset.

    Args:
        state: the state of the run, prepared by accelerate.
        folder: an undamaged checkpoint.

    Raises:
        CersaError: the weights do not fit this run.
    """
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    # All processes have the bases of the first one, so that they take the same branch here.
    moved = progress["bases"] != state.bases
    load_weights(state.components, folder, solve=moved)
    state.accelerator.load_state(str(folder))
    if moved:
        restore_portable(state.components, folder, AVERAGE, state.averages)
        state.optimizer.state.clear()
    return progress["step"]


def load_weights(components: dict[str, nn.Module], folder: Path, *, solve: bool) -> None:
    """Loads the trained weights of a checkpoint into the models.

    Args:
        components: the models by name, prepared as they were for the checkpoint.
        folder: the checkpoint.
        solve: the models have other bases than the checkpoint: solve for the cores in their bases, with a warning.

    Raises:
        CersaError: the weights do not fit these models.
    """
    stored, current = load_file(folder / WEIGHTS_FILE), trained_weights(components)
    if set(stored) != set(current):
        raise CersaError(
            f"{folder}: it holds {len(stored)} trained tensors, this run has {len(current)} different ones: use the same settings"
        )
    for name, parameter in current.items():
        if stored[name].shape != parameter.shape:
            shape, expected = tuple(stored[name].shape), tuple(parameter.shape)
            raise CersaError(f"{folder}: {name} has shape {shape}, expected {expected}: use the same settings and base")
    if solve:
        restore_portable(components, folder, TRAINED)
    cores = core_parameters(components) if solve else set()
    with torch.no_grad():
        for name, parameter in current.items():
            if parameter not in cores:
                parameter.copy_(stored[name])


def skip_model_weights(accelerator: Accelerator) -> None:
    """Prevents accelerate from storing whole models: frozen weights come from the base, trained ones from `WEIGHTS_FILE`."""
    accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, input_dir: models.clear())
