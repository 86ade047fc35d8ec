"""The part of a checkpoint that survives a change of machine: cores without the singular vectors they were trained in.

Raw cores mean nothing in other singular vectors than those they were trained in, and these come out differently on another
machine, after a lost cache or with another torch. So a checkpoint also holds, as an adapter file does, the block of every
layer's weight change at pivot rows and columns, which no choice of singular vectors changes.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cersa_diffusion.adapters.portable import portable_cores, restore_cores
from cersa_diffusion.errors import CersaError
from cersa_diffusion.layers.model import cersa_layers

PORTABLE_FILE = "portable_cores.safetensors"
# What is kept of every core: as it is trained, and its moving average.
TRAINED, AVERAGE = "trained", "average"
# A core that fits other bases worse than this has not been carried over. Sparse and diagonal cores need the very places and
# components that they were trained on.
LARGEST_ERROR = 0.01


def core_parameters(components: Mapping[str, nn.Module]) -> set[nn.Parameter]:
    """The trained parameters of all CERSA cores."""
    return {
        parameter
        for model in components.values()
        for layer in cersa_layers(model).values()
        for parameter in layer.cores.parameters()
    }


def save_portable(components: Mapping[str, nn.Module], folder: Path, averages: Mapping[nn.Parameter, Tensor]) -> None:
    """Writes the cores of all components, and their moving averages, in a form that depends on no singular vectors.

    Args:
        components: the models by name.
        folder: of the checkpoint.
        averages: trained parameter -> its moving average; may be empty.
    """
    tensors = _named(components, TRAINED, None)
    if averages:
        tensors |= _named(components, AVERAGE, averages)
    if tensors:
        save_file(tensors, folder / PORTABLE_FILE)


def _named(components: Mapping[str, nn.Module], kind: str, values: Mapping[nn.Parameter, Tensor] | None) -> dict[str, Tensor]:
    return {
        # Copied: of the trained cores and their averages the pivots are the same tensors, which safetensors refuses.
        f"{kind}/{component}/{name}": tensor.clone()
        for component, model in components.items()
        for name, tensor in portable_cores(model, values=values).items()
    }


def restore_portable(
    components: Mapping[str, nn.Module], folder: Path, kind: str, values: Mapping[nn.Parameter, Tensor] | None = None
) -> None:
    """Solves for the cores of a checkpoint in the bases that the models have now, with a warning.

    Args:
        components: the models by name, with CERSA layers of the same ranks.
        folder: of the checkpoint.
        kind: TRAINED or AVERAGE.
        values: core parameter -> tensor to write to in its place; None: the parameters themselves; empty: nothing is to be done.

    Raises:
        CersaError: the checkpoint has no such cores, or they do not fit these models.
    """
    if values is not None and not values:
        return
    path = folder / PORTABLE_FILE
    if not path.is_file():
        raise CersaError(
            f"{folder}: it was written for other singular vectors (another machine, thread count or torch release) and holds no "
            f"{PORTABLE_FILE} to solve for the cores from: resume where it was started, or train anew"
        )
    stored, errors = load_file(path), {}
    for component, model in components.items():
        prefix = f"{kind}/{component}/"
        tensors = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        errors |= {f"{component}.{name}": error for name, error in restore_cores(model, tensors, values=values).items()}
    worst = max(errors, key=errors.get)
    if errors[worst] > LARGEST_ERROR:
        raise CersaError(
            f"{folder}: layer {worst} cannot be carried over to the singular vectors of this machine ({errors[worst]:.1%} off, "
            f"expected at most {LARGEST_ERROR:.0%}): resume where it was started, or train anew"
        )
    if kind == TRAINED:
        warnings.warn(
            f"{folder}: the singular vectors came out differently than when it was written (another machine, thread count or "
            f"torch release): the cores were solved for in the present ones (at most {errors[worst]:.1e} off), and the "
            "optimizer's moments start anew",
            stacklevel=2,
        )
