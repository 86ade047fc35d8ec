"""What a step of a pipeline allocates beside its weights, counted with fake tensors: nothing is computed or moved."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cersa_diffusion.families.table import family_of
from cersa_diffusion.memory.peak import LiveBytes
from cersa_diffusion.private_names import FAKE_TENSOR_MODE


def step_bytes(pipeline, *, batch: int, resolution: int, dtype: torch.dtype, as_loaded: bool = True, train: bool = True) -> int:
    """The peak of what a training step allocates beside the weights: saved tensors, temporary tensors and gradients.

    The step is that of the trainer without the VAE: the prompt is encoded, the denoiser predicts, and the squared error is
    differentiated. The count is that of the kernels of a CPU; another device may choose kernels that need more, above all for
    convolutions.

    Args:
        pipeline: a pipeline of a family. If no weight of it requires a gradient, its vectors (biases, norms) get one: everything
            is then saved for the backward pass except for what the trained layers themselves save.
        batch: pictures per step.
        resolution: width and height of the pictures in pixels.
        dtype: compute dtype; below float32 the step runs under autocast.
        as_loaded: False: count as if all weights were in the compute dtype.
        train: False: only the prediction, without gradients.

    Returns:
        Bytes.
    """
    step = _Step(pipeline, batch, resolution)

    def compute(weights: dict[str, Tensor]) -> None:
        trained = [tensor for tensor in weights.values() if tensor.requires_grad]
        if not trained:
            trained = [tensor.requires_grad_() for tensor in weights.values() if tensor.ndim == 1 and tensor.is_floating_point()]
        with torch.set_grad_enabled(train):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = torch.func.functional_call(step, weights, ())
            if train:
                # The name holds the gradients: a step has all of them before the optimizer starts.
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
                del gradients

    with _in_mode(step, training=train):
        return _peak(step, compute, None if as_loaded else dtype)


@torch.no_grad()
def encoding_bytes(pipeline, *, batch: int, resolution: int) -> int:
    """The peak of what the VAE allocates beside its weights when it encodes pictures, in bytes; arguments as in `step_bytes`."""
    encoder = _Encoder(pipeline, batch, resolution)
    return _peak(encoder, lambda weights: torch.func.functional_call(encoder, weights, ()))


class _Step(nn.Module):
    """A step as one module, so that `functional_call` can replace the weights of all models."""

    def __init__(self, pipeline, batch: int, resolution: int):
        super().__init__()
        self.family, self.batch, self.resolution = family_of(type(pipeline).__name__), batch, resolution
        # A tuple: a pipeline holds the tokenizers too.
        self.pipeline = (pipeline,)
        self.models = nn.ModuleDict(self.family.components(pipeline))

    def forward(self) -> Tensor:
        (pipeline,), family = self.pipeline, self.family
        denoiser = self.models[family.denoiser]
        encoders_trained = any(weight.requires_grad for name in family.text_encoders for weight in self.models[name].parameters())
        with torch.set_grad_enabled(encoders_trained and torch.is_grad_enabled()):
            caption = family.encode(pipeline, [""], {})
        conditions = {name: tensor.to(denoiser.dtype) for name, tensor in family.collate(caption * self.batch).items()}
        noisy = torch.zeros(self.batch, *family.latent_shape(pipeline, self.resolution), dtype=denoiser.dtype)
        timesteps, sizes = torch.zeros(self.batch, dtype=torch.long), torch.zeros(self.batch, 6)
        prediction = family.predict(denoiser, noisy, timesteps, conditions, sizes).float()
        return (prediction - torch.zeros_like(prediction)).square().mean()


class _Encoder(nn.Module):
    """The encoding of pictures as one module."""

    def __init__(self, pipeline, batch: int, resolution: int):
        super().__init__()
        self.family, self.shape, self.vae = family_of(type(pipeline).__name__), (batch, 3, resolution, resolution), pipeline.vae

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.family.posterior(self.vae, torch.zeros(self.shape, dtype=self.vae.dtype))


def _peak(module: nn.Module, compute: Callable[[dict[str, Tensor]], object], dtype: torch.dtype | None = None) -> int:
    """The peak of what `compute` allocates; it is called with fake weights of the module in CPU memory, all in a dtype."""
    with FAKE_TENSOR_MODE.get()(allow_non_fake_inputs=True):
        weights = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            changed = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            weights[name] = torch.empty(tensor.shape, dtype=changed, requires_grad=tensor.requires_grad)
        with LiveBytes() as counted:
            compute(weights)
    return counted.peak


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for the time of a block."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
