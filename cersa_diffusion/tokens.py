"""What the linear layers of a model are given in one step, which decides what they save for the backward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cersa_diffusion.adapter import components_of
from cersa_diffusion.errors import ConfigError
from cersa_diffusion.private_names import FAKE_TENSOR_MODE


@dataclass(frozen=True)
class LayerInput:
    """What a linear layer is given in one step.

    Args:
        rows: rows of input (batch times tokens).
        source: the same number for layers that are given the very same tensor, which autograd then keeps once; None: its own.
    """

    rows: int
    source: int | None = None


def count_tokens(model: nn.Module | Mapping[str, nn.Module], forward: Callable[[], object]) -> dict[str, LayerInput]:
    """Runs a forward pass and notes what every linear layer is given.

    Args:
        model: any torch model, or the components of a pipeline by name.
        forward: runs the model once. All inputs are held until it returns: under `FakeTensorMode` that costs nothing.

    Returns:
        "component.layer name" -> rows and source; 0 rows for a layer that does not run.
    """
    inputs: dict[str, list[Tensor]] = {}
    handles = []

    def note(name: str) -> Callable:
        def hook(_module, args, kwargs):
            inputs[name].append(args[0] if args else kwargs["input"])

        return hook

    for component, module in components_of(model).items():
        for name, layer in module.named_modules():
            if type(layer) is nn.Linear:
                key = f"{component}.{name}"
                inputs[key] = []
                handles.append(layer.register_forward_pre_hook(note(key), with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    sources: dict[StorageWeakRef, int] = {}
    return {name: _layer_input(given, sources) for name, given in inputs.items()}


def _layer_input(given: list[Tensor], sources: dict[StorageWeakRef, int]) -> LayerInput:
    rows = sum(x.numel() // x.shape[-1] for x in given)
    if len(given) != 1:
        return LayerInput(rows)
    # By storage, so that reshaped views count as the same tensor.
    storage = StorageWeakRef(given[0].untyped_storage())
    return LayerInput(rows, sources.setdefault(storage, len(sources)))


def pipeline_tokens(pipeline, batch: int, resolution: int | None = None) -> dict[str, LayerInput]:
    """What the linear layers of UNet and text encoder are given in one training step, by a forward pass without data.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline.
        batch: pictures per step, the class pictures of prior preservation among them.
        resolution: width and height of the pictures in pixels; None: what the UNet was made for.

    Raises:
        ConfigError: no pictures, or a resolution that the VAE cannot encode.
    """
    # Imported here: the planner works without diffusers.
    from cersa_diffusion.families import family_of

    unet, family = pipeline.unet, family_of(type(pipeline).__name__)
    if family is None:
        raise ConfigError(f"a {type(pipeline).__name__} is of no family whose prompts can be encoded here")
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    resolution = unet.config.sample_size * factor if resolution is None else resolution
    if batch < 1:
        raise ConfigError(f"batch is {batch}, expected at least 1")
    if resolution < factor or resolution % factor:
        raise ConfigError(f"resolution is {resolution}, expected a multiple of the VAE's {factor} pixels per latent")

    def forward() -> None:
        with FAKE_TENSOR_MODE.get()(allow_non_fake_inputs=True), torch.no_grad():
            side, device = resolution // factor, pipeline.device
            # As in the trainer: the prompt is encoded once and shared by all pictures.
            embeddings = family.encode(pipeline, [""], {})
            embeddings = {name: rows.expand(batch, *rows.shape[1:]).clone() for name, rows in embeddings.items()}
            conditions = family.unet_arguments(embeddings, torch.zeros(batch, 6, device=device))
            latents = torch.zeros(batch, unet.config.in_channels, side, side, dtype=unet.dtype, device=device)
            unet(latents, torch.zeros(batch, dtype=torch.long, device=device), **conditions)

    components = {name: getattr(pipeline, name) for name in ("unet", *family.text_encoders)}
    return count_tokens(components, forward)
