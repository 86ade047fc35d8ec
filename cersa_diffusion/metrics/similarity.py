"""How much pictures look like reference pictures: the CLIP-I measure of DreamBooth (Ruiz et al. 2023)."""

import torch
from PIL import Image
from torch import Tensor
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
