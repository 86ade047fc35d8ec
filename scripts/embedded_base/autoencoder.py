"""Stage "autoencoder": pictures to latents of a quarter of their size, and back."""

import json
import math

import torch
from diffusers import AutoencoderKL

from .pictures import Compositor
from .render import load_pictures
from .settings import COLOURS, PICTURE_SIZE, Folders
from .training import Stage, make_optimizer

KL_WEIGHT = 1e-4
HELD_OUT_EVERY = 25


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: a quarter of the size, four channels, .65 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def reconstruction_loss(autoencoder: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Difference of the pictures, of their edges, and a little of the Kullback-Leibler divergence.

    Args:
        autoencoder: The autoencoder.
        pictures: Pictures between -1 and 1.
    """
    posterior = autoencoder.encode(pictures).latent_dist
    decoded = autoencoder.decode(posterior.sample()).sample
    error = decoded.float() - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + KL_WEIGHT * divergence


@torch.no_grad()
def signal_to_noise(autoencoder: AutoencoderKL, compositor: Compositor, indices: torch.Tensor) -> float:
    """Mean PSNR in dB of reconstructed pictures, each on one background.

    Args:
        autoencoder: The autoencoder.
        compositor: The pictures.
        indices: Which pictures.
    """
    values = []
    for chunk in indices.split(50):
        pictures = compositor(chunk, chunk % len(COLOURS))
        decoded = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
        errors = ((decoded - pictures) / 2).square().mean((1, 2, 3))
        values += [-10 * math.log10(error) for error in errors.tolist()]
    return sum(values) / len(values)


def fold_statistics(autoencoder: AutoencoderKL, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Make the latents' mean 0 and their deviation 1 without changing what is decoded, so that no scaling is needed.

    Args:
        autoencoder: The autoencoder; changed in place.
        mean: Mean of the latents by channel.
        deviation: Standard deviation of the latents by channel.
    """
    channels = len(mean)
    with torch.no_grad():
        into, out_of = autoencoder.quant_conv, autoencoder.post_quant_conv
        out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
        out_of.weight *= deviation.view(1, -1, 1, 1)
        into.weight[:channels] /= deviation.view(-1, 1, 1, 1)
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.bias[channels:] -= 2 * deviation.log()


@torch.no_grad()
def encode_all(autoencoder: AutoencoderKL, compositor: Compositor) -> torch.Tensor:
    """Latents of every picture on every background, `[pictures, colours, channels, height, width]`.

    Args:
        autoencoder: The autoencoder.
        compositor: The pictures.
    """
    count = len(compositor.rgba)
    rows = []
    for colour in range(len(COLOURS)):
        chunks = torch.arange(count).split(100)
        latents = [autoencoder.encode(compositor(chunk, torch.full_like(chunk, colour))).latent_dist.mode() for chunk in chunks]
        rows.append(torch.cat(latents))
    return torch.stack(rows, dim=1)


def train_autoencoder(folders: Folders, steps: int, batch_size: int = 16) -> None:
    """Train on the pictures of all names, fold the latents' statistics in, and write the model.

    Args:
        folders: Where the build works.
        steps: Steps in all.
        batch_size: Pictures a step.
    """
    torch.manual_seed(0)
    folder = folders.stage("autoencoder")
    if (folder / "report.json").exists():
        return
    compositor = Compositor(load_pictures(folders))
    everything = torch.arange(len(compositor.rgba))
    held_out = everything[::HELD_OUT_EVERY]
    shown = everything[everything % HELD_OUT_EVERY != 0]
    autoencoder = build_autoencoder()
    optimizer, schedule = make_optimizer([(autoencoder, 1.5e-3)], steps, weight_decay=0.0)
    stage = Stage(folder, steps, batch_size, {"model": autoencoder, "optimizer": optimizer, "schedule": schedule})

    def train_step(_: int) -> torch.Tensor:
        picture = shown[torch.randint(len(shown), (batch_size,))]
        colour = torch.randint(len(COLOURS), (batch_size,))
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(autoencoder, compositor(picture, colour))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.detach()

    stage.run(train_step)
    autoencoder.eval()
    with torch.no_grad():
        sample = compositor(shown[::3], torch.randint(len(COLOURS), (len(shown[::3]),)))
        latents = torch.cat([autoencoder.encode(chunk).latent_dist.mode() for chunk in sample.split(100)])
    fold_statistics(autoencoder, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    autoencoder.save_pretrained(folder / "model")
    report = stage.report()
    report["psnr_held_out"] = signal_to_noise(autoencoder, compositor, held_out)
    report["psnr_shown"] = signal_to_noise(autoencoder, compositor, shown[::HELD_OUT_EVERY])
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(report)
