"""The denoising loss of DreamBooth; its random numbers are a function of the seed and the sample's number alone."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from cersa_diffusion.training.config import DreamBoothConfig
from cersa_diffusion.training.data import sample_generator


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
        base: the pipeline that is trained: it encodes pictures and prompts and says how noise is added.
        device: where its models are.
    """

    def __init__(self, config: DreamBoothConfig, base: StableDiffusionPipeline, device: torch.device):
        self.config, self.device = config, device
        self.vae, self.tokenizer, self.unet, self.text_encoder = base.vae, base.tokenizer, base.unet, base.text_encoder
        self.noise_scheduler = DDPMScheduler.from_config(base.scheduler.config)

    def __call__(self, batch: dict, models: Mapping[str, nn.Module]) -> Tensor:
        """The loss that is trained: class pictures count by `prior_loss_weight`, every sample by `snr_gamma`.

        Args:
            batch: of `data.collate`.
            models: the trained components as accelerate prepared them.

        Returns:
            () float32.
        """
        config = self.config
        prompts = [config.instance_prompt, *([config.class_prompt] if config.with_prior_preservation else [])]
        losses, timesteps = self.squared_errors(batch["pixels"], batch["samples"].tolist(), prompts, models)
        if config.snr_gamma is not None:
            losses = losses * min_snr_weights(self.noise_scheduler, timesteps, config.snr_gamma)
        subject, *prior = losses.chunk(len(prompts))
        return subject.mean() + sum(config.prior_loss_weight * part.mean() for part in prior)

    def squared_errors(
        self, pixels: Tensor, samples: Sequence[int], prompts: Sequence[str], models: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of the prediction for every picture.

        Args:
            pixels: (p b, 3, h, w) in [-1, 1]: b pictures of the first prompt, then b of the second, if there is one.
            samples: their b numbers, which with the seed decide noise and timestep.
            prompts: p of them.
            models: the components that are trained, by name; the others are the pipeline's.

        Returns:
            (p b,) float32 errors and (p b,) timesteps.
        """
        streams = range(1, len(prompts) + 1)
        generators = [sample_generator(self.config.seed, sample, stream) for stream in streams for sample in samples]
        latents = self._encode_pictures(pixels.to(self.device), generators)
        noise, timesteps = self._noise(latents, generators)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        states = self._encode_prompts(models.get("text_encoder", self.text_encoder), prompts, "text_encoder" in models)
        states = states.repeat_interleave(len(samples), dim=0)
        unet = models.get("unet", self.unet)
        prediction = unet(noisy.to(self.unet.dtype), timesteps, states.to(self.unet.dtype), return_dict=False)[0].float()
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
    def _encode_pictures(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        latents = posterior.mean + posterior.std * _draw(posterior.mean.shape[1:], generators).to(posterior.mean)
        return (latents * self.vae.config.scaling_factor).float()

    def _encode_prompts(self, text_encoder: nn.Module, prompts: Sequence[str], trained: bool) -> Tensor:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # Each prompt is encoded once and shared by its pictures: the same gradients as encoding it for every picture.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return text_encoder(tokens.input_ids.to(self.device), return_dict=False)[0]


def _draw(shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
