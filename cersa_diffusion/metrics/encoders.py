"""Vision transformers that say how alike two pictures are: DINO, as the DreamBooth paper has it, or any other ViT."""

import os
from collections.abc import Sequence
from pathlib import PurePath

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.metrics.embedding import embed_in_batches, scoring_device
from cersa_diffusion.text import one_line

# The encoder of the DreamBooth paper.
DREAMBOOTH_ENCODER = "facebook/dino-vits16"
# Their first token is [CLS], whose state after the last layer norm is the feature that the DINO papers compare.
_WITH_CLASS_TOKEN = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class VisionEncoder:
    """The [CLS] feature of a vision transformer, with the preprocessing of its checkpoint.

    Args:
        name_or_path: a folder or a model id on the hub, in transformers' format.
        device: where to compute; the GPU where there is one when left out.

    Attributes:
        label: "DINO" where model type or name say so, else "ViT features": those of a classifier are not DINO's.

    Raises:
        ConfigError: no such folder or model, or it has no [CLS] feature.
    """

    def __init__(self, name_or_path: str | os.PathLike, device: str | torch.device | None = None):
        self.name, self.device = os.fspath(name_or_path), scoring_device(device)
        verbosity = logging.get_verbosity()
        try:
            # Neither a classifier's head nor the pooler that transformers makes up in its place is used: no reason to warn.
            logging.set_verbosity(logging.CRITICAL)
            self.model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(self.device)
            # As PIL pictures, which is how these models were evaluated.
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(f"vision model {self.name}: cannot be loaded ({reason})") from error
        finally:
            logging.set_verbosity(verbosity)
        model_type = self.model.config.model_type
        if model_type not in _WITH_CLASS_TOKEN:
            raise ConfigError(
                f"vision model {self.name}: its type is {model_type}, expected one with a [CLS] feature: "
                f"{', '.join(_WITH_CLASS_TOKEN)}"
            )
        is_dino = "dino" in model_type or "dino" in PurePath(self.name).name.lower()
        self.label = "DINO" if is_dino else "ViT features"

    def embed_pictures(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit vectors of pictures: (pictures, width), float32, on the CPU."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0]

        return embed_in_batches(pictures, embed, batch_size, self.label)
