"""Checkpoints to resume from: accelerate's state of optimizer, scheduler, scaler and random numbers, plus the trained weights."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from cersa_diffusion.errors import CersaError, ConfigError
from cersa_diffusion.inject import cersa_layers

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


def save_checkpoint(accelerator: Accelerator, components: dict[str, nn.Module], output_dir: Path, step: int, limit: int | None):
    """Writes checkpoint-STEP under a temporary name, renames it, and only then removes the oldest beyond the limit.

    Args:
        accelerator: holds optimizer, scheduler and scaler.
        components: the unwrapped models by name.
        output_dir: folder of the run.
        step: optimizer steps done.
        limit: how many checkpoints to keep, or None for all.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_weights(components).items()}
        save_file(weights, temporary / WEIGHTS_FILE)
        progress = {"step": step, "bases": basis_digest(components)}
        (temporary / PROGRESS_FILE).write_text(json.dumps(progress) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        if limit is not None:
            for _, folder in list_checkpoints(output_dir)[:-limit]:
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, oldest first."""
    folders = [(FOLDER_PATTERN.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in folders if match and (path / PROGRESS_FILE).is_file())


def find_checkpoint(output_dir: Path, resume_from: str) -> Path | None:
    """The folder that `--resume_from_checkpoint` names; None for "latest" when there is none yet.

    Raises:
        ConfigError: a named folder is no checkpoint.
    """
    if resume_from == "latest":
        found = list_checkpoints(output_dir)
        return found[-1][1] if found else None
    folder = next((path for path in (Path(resume_from), output_dir / resume_from) if (path / PROGRESS_FILE).is_file()), None)
    if folder is None:
        raise ConfigError(f"resume_from_checkpoint: {resume_from} is no checkpoint folder (no {PROGRESS_FILE} in it)")
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
