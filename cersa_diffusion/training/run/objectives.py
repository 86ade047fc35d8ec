"""The training objectives: the target that a denoiser learns to predict, and how noise is added to its inputs."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Ddpm:
    """Denoising diffusion (Ho et al., arXiv 2006.11239): predicts the noise or the velocity at one of the schedule's timesteps.

    Args:
        scheduler: the scheduler of the base pipeline; its configuration sets the noise schedule and the type of prediction.
    """

    def __init__(self, scheduler):
        self.schedule = DDPMScheduler.from_config(scheduler.config)

    def timesteps(self, generators: list[torch.Generator]) -> Tensor:
        """(b,) integers, one from each generator."""
        steps = self.schedule.config.num_train_timesteps
        return torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents at the timesteps."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The tensor that the denoiser is to predict."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (Hang et al., arXiv 2303.09556) of the squared errors.

        Args:
            timesteps: (b,) integers.
            gamma: samples with a higher signal-to-noise ratio get a lower weight.

        Returns:
            (b,) float32.
        """
        snr = compute_snr(self.schedule, timesteps)
        if self.schedule.config.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        # min(snr, gamma) / snr, without dividing zero by zero at a signal-to-noise ratio of 0.
        return (gamma / snr).clamp(max=1)


OBJECTIVES = {"ddpm": Ddpm}
