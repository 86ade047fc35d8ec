"""The part of a checkpoint that another machine can load: cores in a form that does not depend on the singular vectors.

Cores are valid only for the singular vectors that they were trained with, and these differ on another machine, after a lost
cache or with another torch. A checkpoint therefore also holds, like an adapter file, the block of every layer's weight change
at pivot rows and columns, which is the same for every choice of singular vectors.
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
# The two stored forms of every core: the trained core and its moving average.
TRAINED, AVERAGE = "trained", "average"
# The largest error of a core in new bases. Sparse and diagonal cores need exactly the entries and components that they were
# trained on.
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
    """Writes the cores of all components, and their moving averages, in a form that does not depend on the singular vectors.

    Args:
        components: the models by name.
        folder: the folder of the checkpoint.
        averages: trained parameter -> its moving average; may be empty.
    """
    values_of = {TRAINED: None, AVERAGE: averages} if averages else {TRAINED: None}
    tensors = {
        # Copied: trained cores and averages share their pivot tensors, and safetensors refuses shared tensors.
        f"{kind}/{component}/{name}": tensor.clone()
        for kind, values in values_of.items()
        for component, model in components.items()
        for name, tensor in portable_cores(model, values=values).items()
    }
    if tensors:
        save_file(tensors, folder / PORTABLE_FILE)


def restore_portable(
    components: Mapping[str, nn.Module], folder: Path, kind: str, values: Mapping[nn.Parameter, Tensor] | None = None
) -> None:
    """Solves for the cores of a checkpoint in the present bases of the models, with a warning.

    Args:
        components: the models by name, with CERSA layers of the same ranks.
        folder: the folder of the checkpoint.
        kind: TRAINED or AVERAGE.
        values: core parameter -> tensor to write to instead; None: the parameters themselves; empty: nothing is restored.

    Raises:
        CersaError: the checkpoint has no such cores, or they do not fit these models.
    """
    if values is not None and not values:
        return
    path = folder / PORTABLE_FILE
    if not path.is_file():
        raise CersaError(
            f"{folder}: it was written for other singular vectors (another machine, thread count or torch release) and has no "
            f"{PORTABLE_FILE} to solve for the cores from: resume in the environment of its start, or start a new training"
        )
    stored, errors = load_file(path), {}
    for component, model in components.items():
        prefix = f"{kind}/{component}/"
        tensors = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        errors |= {f"{component}.{name}": error for name, error in restore_cores(model, tensors, values=values).items()}
    worst = max(errors, key=errors.get)
    if errors[worst] > LARGEST_ERROR:
        raise CersaError(
            f"{folder}: layer {worst} cannot be converted to the singular vectors of this machine (error {errors[worst]:.1%}, "
            f"expected at most {LARGEST_ERROR:.0%}): resume in the environment of its start, or start a new training"
        )
    if kind == TRAINED:
        warnings.warn(
            f"{folder}: the singular vectors differ from those at the time of writing (another machine, thread count or torch "
            f"release): the cores were solved for in the present ones (error at most {errors[worst]:.1e}), and the optimizer's "
            "moments were reset",
            stacklevel=2,
        )
