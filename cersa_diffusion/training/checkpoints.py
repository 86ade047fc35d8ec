"""Checkpoints to resume from: accelerate's state of optimizer, scheduler, scaler and random numbers, plus the trained weights."""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cersa_diffusion.errors import CersaError, ConfigError
from cersa_diffusion.inject import cersa_layers

# Written last: a folder without it, or whose files are not those it lists, is no checkpoint.
PROGRESS_FILE = "progress.json"
WEIGHTS_FILE = "trained_weights.safetensors"
FOLDER_PATTERN = re.compile(r"checkpoint-(\d+)")


def trained_weights(components: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """ "component.parameter" -> parameter, of everything that is trained."""
    return {
        f"{component}.{name}": parameter
        for component, model in components.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def basis_digest(components: dict[str, nn.Module]) -> str:
    """A hash of all CERSA bases: cores and optimizer moments mean nothing in other coordinates."""
    digest = hashlib.sha256()
    for model in components.values():
        for name, layer in cersa_layers(model).items():
            digest.update(name.encode())
            for basis in (layer.U, layer.Vh):
                digest.update(basis.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    accelerator: Accelerator, components: dict[str, nn.Module], output_dir: Path, step: int, limit: int | None
) -> Path:
    """Writes checkpoint-STEP under a temporary name, renames it, and only then removes the oldest beyond the limit.

    Args:
        accelerator: holds optimizer, scheduler, scaler and moving average.
        components: the unwrapped models by name.
        output_dir: folder of the run.
        step: optimizer steps done.
        limit: how many checkpoints to keep, or None for all.

    Returns:
        The folder.

    Raises:
        CersaError: it cannot be written (a full disk); the checkpoints before it stay.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(components, temporary, step)
            _put_in_place(temporary, final)
            if limit is not None:
                _remove_old(output_dir, step, limit)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CersaError(
            f"{final}: cannot be written ({error}); earlier checkpoints are untouched: make room, then "
            "--resume_from_checkpoint latest"
        ) from error
    accelerator.wait_for_everyone()
    return final


def _finish(components: dict[str, nn.Module], folder: Path, step: int) -> None:
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_weights(components).items()}
    save_file(weights, folder / WEIGHTS_FILE)
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    progress = {"step": step, "bases": basis_digest(components), "files": files}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n")
    for path in (*folder.rglob("*"), folder):
        # A checkpoint that a power cut leaves half on disk must not carry the name of a whole one.
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():
        # Left by a run that was resumed from an earlier step; renamed first, so that no moment has only a half of it.
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def _remove_old(output_dir: Path, step: int, limit: int) -> None:
    """Keeps the newest `limit` good checkpoints up to the one just written; damaged ones do not count as kept."""
    kept = 1
    for number, folder in reversed(list_checkpoints(output_dir)):
        if number < step:
            if kept == limit:
                shutil.rmtree(folder)
            else:
                kept += damage(folder) is None


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left half-written."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.old"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest_of(file)


def _digest_of(file) -> str:
    # Python 3.10 has no hashlib.file_digest.
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as it was written."""
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
        if _digest(path) != digest:
            return f"{name} is not what was written"
    return None


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, oldest first, damaged ones too."""
    folders = [(FOLDER_PATTERN.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in folders if match)


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None for "latest" when there is none yet.

    Raises:
        ConfigError: a named folder is no checkpoint, or is damaged.
    """
    if resume_from == "latest":
        for _, folder in reversed(list_checkpoints(output_dir)):
            reason = damage(folder)
            if reason is None:
                return folder
            warnings.warn(f"{folder} is skipped: {reason}", stacklevel=2)
        return None
    folder = next((path for path in (Path(resume_from), output_dir / resume_from) if (path / PROGRESS_FILE).is_file()), None)
    if folder is None:
        raise ConfigError(f"resume_from_checkpoint: {resume_from} is no checkpoint folder (no {PROGRESS_FILE} in it)")
    reason = damage(folder)
    if reason is not None:
        raise ConfigError(f"resume_from_checkpoint: {folder} is damaged ({reason}): take an earlier one, or 'latest'")
    return folder


def checkpoint_step(folder: Path) -> int:
    """The number of optimizer steps a checkpoint has done."""
    return json.loads((folder / PROGRESS_FILE).read_text())["step"]


def load_checkpoint(accelerator: Accelerator, components: dict[str, nn.Module], folder: Path) -> int:
    """Puts a checkpoint's state back; returns the number of steps it has done.

    Raises:
        CersaError: the decomposition came out in other coordinates than the checkpoint's, or the weights do not fit.
    """
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    if progress["bases"] != basis_digest(components):
        raise CersaError(
            f"{folder}: the singular vectors came out differently than when it was written (another machine, thread count or "
            "torch release), so its cores cannot go on: resume where it was started, or train anew"
        )
    stored, current = load_file(folder / WEIGHTS_FILE), trained_weights(components)
    if set(stored) != set(current):
        raise CersaError(f"{folder}: it holds {len(stored)} trained tensors, this run has {len(current)} others: other settings?")
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(stored[name])
    accelerator.load_state(str(folder))
    return progress["step"]


def skip_model_weights(accelerator: Accelerator) -> None:
    """Keeps accelerate from writing whole models into checkpoints: frozen weights come from the base, trained ones from us."""

    def drop(models, weights, output_dir):
        weights.clear()

    def leave(models, input_dir):
        models.clear()

    accelerator.register_save_state_pre_hook(drop)
    accelerator.register_load_state_pre_hook(leave)
