"""How much pictures look like reference pictures: CLIP-I of DreamBooth (Ruiz et al. 2023), and distance in latent space."""

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import CLIPProcessor

from cersa_diffusion.metrics.clip_models import TensorFeatures


@torch.inference_mode()
def embed_pictures(pictures: list[Image.Image], clip: tuple[TensorFeatures, CLIPProcessor]) -> Tensor:
    """Unit vectors of pictures under a CLIP: (pictures, width)."""
    model, processor = clip
    features = model.get_image_features(processor(images=pictures, return_tensors="pt")["pixel_values"])
    return features / features.norm(dim=-1, keepdim=True)


def clip_image_similarity(
    pictures: list[Image.Image], references: list[Image.Image], clip: tuple[TensorFeatures, CLIPProcessor]
) -> float:
    """CLIP-I: mean cosine of all pairs of a picture and a reference."""
    return float((embed_pictures(pictures, clip) @ embed_pictures(references, clip).T).mean())


@torch.inference_mode()
def latent_distance(pictures: list[Image.Image], references: list[Image.Image], autoencoder: AutoencoderKL) -> float:
    """Root mean square difference between the latents of each picture and its own reference, averaged over the pairs.

    The unit is the latents' deviation (`scaling_factor` applied): unrelated pictures are about 1.4 apart. Unlike CLIP-I it
    compares place by place, which suits references that stand where the model draws.

    Args:
        pictures: RGB pictures of one size.
        references: as many, of the same size.
        autoencoder: the base's.
    """
    if len(pictures) != len(references):
        raise ValueError(f"{len(pictures)} pictures and {len(references)} references: expected one reference per picture")
    latents = [
        autoencoder.encode(torch.stack([pil_to_tensor(p) for p in group]).to(autoencoder.dtype) / 127.5 - 1).latent_dist.mean
        for group in (pictures, references)
    ]
    difference = autoencoder.config.scaling_factor * (latents[0] - latents[1]).float()
    return float(difference.square().mean(dim=(1, 2, 3)).sqrt().mean())
