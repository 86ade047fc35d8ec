"""Vision transformers that measure the similarity of two pictures: DINO, as in the DreamBooth paper, or any other ViT."""

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
# The first token of these models is [CLS]; the DINO papers compare its state after the last layer norm.
_WITH_CLASS_TOKEN = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")


class VisionEncoder:
    """The [CLS] feature of a vision transformer, with the preprocessing of its checkpoint.

    Args:
        name_or_path: a folder or a model id on the hub, in transformers' format.
        device: where to compute; by default the GPU if there is one.

    Attributes:
        label: "DINO" if the model type or the name contains it, else "ViT features": the features of a classifier are not DINO.

    Raises:
        ConfigError: there is no such folder or model, or the model has no [CLS] feature.
    """

    def __init__(self, name_or_path: str | os.PathLike, device: str | torch.device | None = None):
        self.name, self.device = os.fspath(name_or_path), scoring_device(device)
        verbosity = logging.get_verbosity()
        try:
            # transformers warns that it drops the head of a classifier and initialises a pooler at random; neither is used here.
            logging.set_verbosity(logging.CRITICAL)
            self.model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32).eval().to(self.device)
            # These models were evaluated with preprocessing of PIL pictures.
            self.processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
        except (OSError, ValueError) as error:
            raise ConfigError(f"vision model {self.name}: cannot be loaded ({one_line(error)})") from error
        finally:
            logging.set_verbosity(verbosity)
        model_type = self.model.config.model_type
        if model_type not in _WITH_CLASS_TOKEN:
            raise ConfigError(
                f"vision model {self.name}: its type is {model_type}, expected one with a [CLS] feature: "
                f"{', '.join(_WITH_CLASS_TOKEN)}"
            )
        self.label = "DINO" if "dino" in model_type or "dino" in PurePath(self.name).name.lower() else "ViT features"

    def embed_pictures(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit vectors of pictures: (pictures, width), float32, on the CPU."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0]

        return embed_in_batches(pictures, embed, batch_size, self.label)
