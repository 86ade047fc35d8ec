"""The denoising loss of DreamBooth; its random numbers are a function of the seed and the sample's number alone."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from cersa_diffusion.training.data.dataset import NOISE, sample_generator
from cersa_diffusion.training.settings.config import DreamBoothConfig


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (Hang et al., arXiv 2303.09556) of squared errors of the noise or of the velocity.

    Args:
        noise_scheduler: its `prediction_type` says which of the two.
        timesteps: (b,) integers.
        gamma: the signal-to-noise ratio from which on samples are weighted down.

    Returns:
        (b,) float32.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    # min(snr, gamma) / snr, without a division of zero by zero where nothing of the signal is left.
    return (gamma / snr).clamp(max=1)


class DreamBoothLoss:
    """The loss of a batch, or the squared errors behind it.

    Args:
        config: the settings.
        base: the pipeline that is trained: it encodes pictures and prompts and says how noise is added. Where batches hold
            latents its VAE is not needed, where embeddings are given its text encoders are not.
        device: where its models are.
        embeddings: prompt -> what its family's `encode` gives for it alone, for every prompt of the run; without them prompts are
            encoded for every batch.
    """

    def __init__(
        self,
        config: DreamBoothConfig,
        base: DiffusionPipeline,
        device: torch.device,
        embeddings: Mapping[str, dict[str, Tensor]] | None = None,
    ):
        self.config, self.device, self.embeddings = config, device, embeddings
        self.base, self.unet, self.family = base, base.unet, config.family
        self.latent_scale = base.vae.config.scaling_factor
        self.noise_scheduler = DDPMScheduler.from_config(base.scheduler.config)

    def __call__(self, batch: dict, models: Mapping[str, nn.Module]) -> Tensor:
        """The loss that is trained: class pictures count by `prior_loss_weight`, every sample by `snr_gamma`.

        Args:
            batch: of `data.collate`.
            models: the trained components as accelerate prepared them.

        Returns:
            () float32.
        """
        losses, timesteps = self.squared_errors(batch, models)
        if self.config.snr_gamma is not None:
            losses = losses * min_snr_weights(self.noise_scheduler, timesteps, self.config.snr_gamma)
        subject, *prior = losses.split(len(batch["samples"]))
        return subject.mean() + sum(self.config.prior_loss_weight * part.mean() for part in prior)

    def squared_errors(self, batch: dict, models: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
        """Mean squared error of the prediction for every picture of a batch.

        Args:
            batch: of `data.collate`; with the seed the numbers of its samples decide noise and timestep.
            models: the components that are trained, by name; the others are the pipeline's.

        Returns:
            (p b,) float32 errors and (p b,) timesteps.
        """
        samples, prompts = batch["samples"].tolist(), batch["prompts"]
        groups = range(len(prompts) // len(samples))
        generators = [sample_generator(self.config.seed, sample, NOISE + group) for group in groups for sample in samples]
        latents = self._latents(batch, generators)
        noise, timesteps = self._noise(latents, generators)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        unet = models.get("unet", self.unet)
        prediction = unet(noisy.to(self.unet.dtype), timesteps, return_dict=False, **self._conditioning(batch, models))[0].float()
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        return (prediction - target).square().mean(dim=(1, 2, 3)), timesteps

    def _noise(self, latents: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        noise = _draw(latents.shape[1:], generators)
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])
        if self.config.noise_offset:
            # Drawn last: noise and timesteps are the same with and without it.
            noise = noise + self.config.noise_offset * _draw((latents.shape[1], 1, 1), generators)
        return noise.to(latents), timesteps.to(latents.device)

    @torch.no_grad()
    def _latents(self, batch: dict, generators: list[torch.Generator]) -> Tensor:
        if "pixels" in batch:
            vae = self.base.vae
            posterior = vae.encode(batch["pixels"].to(self.device, vae.dtype)).latent_dist
            mean, std = posterior.mean, posterior.std
        else:
            mean, std = batch["latent_mean"].to(self.device), batch["latent_std"].to(self.device)
        latents = mean + std * _draw(mean.shape[1:], generators).to(mean)
        return (latents * self.latent_scale).float()

    def _conditioning(self, batch: dict, models: Mapping[str, nn.Module]) -> dict:
        """The UNet's keyword arguments: each prompt is encoded once and shared by its pictures, with the same gradients."""
        unique = list(dict.fromkeys(batch["prompts"]))
        if self.embeddings is None:
            trained = any(name in models for name in self.family.text_encoders)
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                encoded = self.family.encode(self.base, unique, models)
        else:
            found = [self.embeddings[prompt] for prompt in unique]
            encoded = {name: torch.cat([each[name] for each in found]).to(self.device) for name in found[0]}
        numbers = [unique.index(prompt) for prompt in batch["prompts"]]
        # Rows are stacked, not indexed: the gradients of a prompt that several pictures share then add up in the same order in
        # every run.
        rows = {name: tensor.unbind() for name, tensor in encoded.items()}
        shared = {name: torch.stack([each[number] for number in numbers]).to(self.unet.dtype) for name, each in rows.items()}
        return self.family.unet_arguments(shared, batch["sizes"])


def _draw(shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
