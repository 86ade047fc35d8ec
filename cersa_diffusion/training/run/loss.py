"""The denoising loss of DreamBooth; its random numbers depend only on the seed and the number of the sample.

Tensors go to the device without waiting: a copy that waits would end all overlap of the host's work with the device's.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cersa_diffusion.families.base import Conditions
from cersa_diffusion.training.data.dataset import NOISE, sample_generator
from cersa_diffusion.training.run.objectives import OBJECTIVES
from cersa_diffusion.training.settings.config import DreamBoothConfig


class DreamBoothLoss:
    """Computes the loss of a batch, or the squared errors of its pictures.

    Args:
        config: the settings.
        base: the pipeline that is trained: it encodes pictures and prompts, and its scheduler sets the noise. Its VAE is not
            needed if batches hold latents, its text encoders are not needed if embeddings are given.
        device: the device of its models.
        embeddings: prompt -> the output of the family's `encode` for it, for every prompt of the run; without them, prompts are
            encoded for every batch.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        base: DiffusionPipeline,
        device: torch.device,
        embeddings: Mapping[str, Conditions] | None = None,
    ):
        self.config, self.device, self.embeddings = config, device, embeddings
        self.base, self.family = base, config.family
        self.denoiser = getattr(base, self.family.denoiser)
        self.objective = OBJECTIVES[self.family.objective](base.scheduler)

    def __call__(self, batch: dict, models: Mapping[str, nn.Module]) -> Tensor:
        """The loss for the training; `prior_loss_weight` weights the class pictures, `snr_gamma` weights every sample.

        Args:
            batch: the result of `dataset.collate`.
            models: the trained components as accelerate prepared them.

        Returns:
            () float32.
        """
        losses, timesteps = self.squared_errors(batch, models)
        if self.config.snr_gamma is not None:
            losses = losses * self.objective.weights(timesteps, self.config.snr_gamma)
        subject, *prior = losses.split(len(batch["samples"]))
        return subject.mean() + sum(self.config.prior_loss_weight * errors.mean() for errors in prior)

    def squared_errors(self, batch: dict, models: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
        """Mean squared error of the prediction for every picture of a batch.

        Args:
            batch: the result of `dataset.collate`; the seed and the numbers of its samples decide noise and timestep.
            models: the trained components by name; all other components come from the pipeline.

        Returns:
            (p b,) float32 errors and (p b,) timesteps.
        """
        samples, prompts = batch["samples"], batch["prompts"]
        groups = range(len(prompts) // len(samples))
        generators = [sample_generator(self.config.seed, sample, NOISE + group) for group in groups for sample in samples]
        latents = self._latents(batch, generators)
        noise, timesteps = self._noise(latents, generators)
        noisy = self.objective.add_noise(latents, noise, timesteps).to(self.denoiser.dtype)
        denoiser = models.get(self.family.denoiser, self.denoiser)
        conditions = self._conditions(prompts, models)
        prediction = self.family.predict(denoiser, noisy, timesteps, conditions, batch["sizes"]).float()
        target = self.objective.target(latents, noise, timesteps)
        errors = (prediction - target).square()
        return errors.mean(dim=tuple(range(1, errors.ndim))), timesteps

    def _noise(self, latents: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        noise = _normal_samples(latents.shape[1:], generators)
        timesteps = self.objective.timesteps(generators)
        if self.config.noise_offset:
            # Drawn last, so that the offset does not change noise and timesteps.
            noise = noise + self.config.noise_offset * _normal_samples((latents.shape[1], 1, 1), generators)
        return noise.to(latents, non_blocking=True), timesteps.to(latents.device, non_blocking=True)

    @torch.no_grad()
    def _latents(self, batch: dict, generators: list[torch.Generator]) -> Tensor:
        vae = self.base.vae
        if "pixels" in batch:
            mean, std = self.family.posterior(vae, batch["pixels"].to(self.device, vae.dtype))
        else:
            mean, std = (batch[name].to(self.device, non_blocking=True) for name in ("latent_mean", "latent_std"))
        noise = _normal_samples(mean.shape[1:], generators).to(mean, non_blocking=True)
        return self.family.normalise(vae, mean + std * noise)

    def _conditions(self, prompts: Sequence[str], models: Mapping[str, nn.Module]) -> Conditions:
        """The conditions of a batch: each prompt is encoded once, and its pictures share the encoding and its gradients."""
        unique = list(dict.fromkeys(prompts))
        if self.embeddings is None:
            trained = any(name in models for name in self.family.text_encoders)
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                encoded = dict(zip(unique, self.family.encode(self.base, unique, models), strict=True))
        else:
            encoded = {
                prompt: {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.embeddings[prompt].items()}
                for prompt in unique
            }
        # Rows are stacked, not indexed, so that the gradients of a prompt with several pictures are added in the same order in
        # every run.
        batch = self.family.collate([encoded[prompt] for prompt in prompts])
        return {name: tensor.to(self.denoiser.dtype) for name, tensor in batch.items()}


def _normal_samples(shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
