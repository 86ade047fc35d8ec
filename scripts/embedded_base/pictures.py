"""Pictures as tensors on coloured backgrounds."""

import torch

from .render import Pictures
from .settings import COLOURS


def colour_table() -> torch.Tensor:
    """The background colours, `[colours, 3, 1, 1]`, between 0 and 1."""
    return torch.tensor(list(COLOURS.values())).view(-1, 3, 1, 1) / 255


class Compositor:
    """Puts pictures on backgrounds, as the models see them.

    Args:
        pictures: The pictures.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.rgba = torch.from_numpy(pictures.rgba).permute(0, 3, 1, 2).contiguous()
        self.colours = colour_table()

    def __call__(self, picture: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        """Composited pictures, `[count, 3, size, size]`, between -1 and 1.

        Args:
            picture: Indices of the pictures.
            colour: Indices of the backgrounds.
        """
        rgba = self.rgba[picture].float() / 255
        mixed = rgba[:, :3] + (1 - rgba[:, 3:]) * self.colours[colour]
        return mixed.clamp(0, 1) * 2 - 1
