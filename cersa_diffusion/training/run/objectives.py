"""What a denoiser learns to predict, and how noise is added to what it is given."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Ddpm:
    """Denoising diffusion (Ho et al., arXiv 2006.11239): the noise or the velocity at one of the schedule's timesteps.

    Args:
        scheduler: of the base pipeline; its configuration says how noise is added and which of the two is predicted.
    """

    def __init__(self, scheduler):
        self.schedule = DDPMScheduler.from_config(scheduler.config)

    def timesteps(self, generators: list[torch.Generator]) -> Tensor:
        """(b,) integers, one from each generator."""
        steps = self.schedule.config.num_train_timesteps
        return torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What is to be predicted."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (Hang et al., arXiv 2303.09556) of the squared errors.

        Args:
            timesteps: (b,) integers.
            gamma: the signal-to-noise ratio from which on samples are weighted down.

        Returns:
            (b,) float32.
        """
        snr = compute_snr(self.schedule, timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        # min(snr, gamma) / snr, without a division of zero by zero where nothing of the signal is left.
        return (gamma / snr).clamp(max=1)


OBJECTIVES = {"ddpm": Ddpm}
