"""Unit vectors of pictures and texts, computed batch by batch on the device of the model."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm


class PictureEncoder(Protocol):
    """A model that turns pictures into unit vectors.

    Attributes:
        label: name of its features in tables.
    """

    label: str

    def embed_pictures(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit vectors of pictures: (pictures, width), float32, on the CPU."""
        ...


def scoring_device(device: str | torch.device | None) -> torch.device:
    """The requested device, or else the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.inference_mode()
def embed_in_batches(items: Sequence, embed: Callable[[Sequence], Tensor], batch_size: int, title: str) -> Tensor:
    """Unit vectors of all items: (items, width), float32, on the CPU.

    Args:
        items: pictures or texts, at least one.
        embed: batch of items -> vectors (batch, width).
        batch_size: number of items per call of `embed`.
        title: title of the progress bar.
    """
    starts = tqdm(range(0, len(items), batch_size), desc=title, unit="batch", leave=False, disable=len(items) <= batch_size)
    return torch.cat([normalize(embed(items[start : start + batch_size]).float(), dim=-1).cpu() for start in starts])
