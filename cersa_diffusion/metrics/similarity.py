"""Similarity of pictures to references (CLIP-I and DINO of DreamBooth), to the base's (drift), to each other (diversity)."""

import itertools
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.embedding import PictureEncoder
from cersa_diffusion.text import one_line


def similarity_to_references(features: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each picture with all references; its mean over the pictures is CLIP-I or DINO (Ruiz et al. 2023).

    Args:
        features: unit vectors of pictures (pictures, width).
        references: unit vectors of reference pictures (references, width).

    Returns:
        (pictures,), from -1 to 1.
    """
    return (features @ references.T).mean(1)


def clip_image_similarity(pictures: Sequence[Image.Image], references: Sequence[Image.Image], clip: PictureEncoder) -> float:
    """CLIP-I: the mean cosine over all pairs of a picture and a reference."""
    return float(similarity_to_references(clip.embed_pictures(pictures), clip.embed_pictures(references)).mean())


def paired_distance(features: Tensor, references: Tensor) -> float:
    """Mean of 1 - cosine of each picture and its own reference: the drift, if the references are the pictures of the base.

    Args:
        features: unit vectors (pictures, width).
        references: unit vectors of the same shape.

    Returns:
        From 0 (all the same) to 2.
    """
    return float((1 - (features * references).sum(-1)).mean())


def diversity(features: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of pictures of one prompt: how much the pictures of different seeds differ.

    Args:
        features: unit vectors of the pictures (seeds, width), at least two.

    Returns:
        From 0 (all the same) to 2.
    """
    pairs = torch.triu_indices(len(features), len(features), offset=1)
    return float((1 - (features @ features.T)[pairs[0], pairs[1]]).mean())


class Lpips:
    """LPIPS distance (Zhang et al., arXiv 1801.03924) by torchmetrics.

    The calibration comes with torchmetrics. The ImageNet network comes from torchvision, which downloads it at the first use
    (AlexNet 233 MB, SqueezeNet 5 MB) into the hub folder of torch.

    Args:
        network: "alex", "vgg" or "squeeze".
        device: where to compute.

    Raises:
        ConfigError: the weights of the network are missing and cannot be downloaded.
    """

    def __init__(self, network: str = "alex", device: str | torch.device = "cpu"):
        # Imported here, because only this class needs torchmetrics, which belongs to the extra `score`.
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            self.metric = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).eval().to(device)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"LPIPS: the ImageNet weights of {network!r} are not in {torch.hub.get_dir()}/checkpoints and cannot be "
                f"downloaded ({one_line(error, 120)}): leave LPIPS out; the diversity by the other features needs no download"
            ) from error

    @torch.inference_mode()
    def diversity(self, pictures: Sequence[Image.Image]) -> float:
        """Mean LPIPS over all pairs of pictures.

        Args:
            pictures: RGB pictures of one size, at least two.
        """
        pixels = [pil_to_tensor(picture)[None].float().to(self.metric.device) / 255 for picture in pictures]
        distances = [float(self.metric(first, second)) for first, second in itertools.combinations(pixels, 2)]
        return sum(distances) / len(distances)


@torch.inference_mode()
def latent_distance(pictures: list[Image.Image], references: list[Image.Image], autoencoder: AutoencoderKL) -> float:
    """Root mean square difference between the latents of each picture and its own reference, averaged over the pairs.

    The unit is the standard deviation of the latents (`scaling_factor` applied): unrelated pictures have a distance of about 1.4.
    Unlike CLIP-I it compares position by position, which suits references that show the subject where the model draws it.

    Args:
        pictures: RGB pictures of one size.
        references: one per picture, of the same size.
        autoencoder: autoencoder of the base.

    Raises:
        ConfigError: the numbers of pictures and references differ.
    """
    if len(pictures) != len(references):
        raise ConfigError(f"{len(pictures)} pictures and {len(references)} references: expected one reference per picture")
    difference = _latents(pictures, autoencoder) - _latents(references, autoencoder)
    return float(difference.square().mean(dim=(1, 2, 3)).sqrt().mean())


def _latents(pictures: list[Image.Image], autoencoder: AutoencoderKL, batch_size: int = 16) -> Tensor:
    latents = []
    for start in range(0, len(pictures), batch_size):
        pixels = torch.stack([pil_to_tensor(picture) for picture in pictures[start : start + batch_size]])
        pixels = pixels.to(autoencoder.device, autoencoder.dtype) / 127.5 - 1
        latents.append(autoencoder.encode(pixels).latent_dist.mean.float().cpu())
    return autoencoder.config.scaling_factor * torch.cat(latents)
