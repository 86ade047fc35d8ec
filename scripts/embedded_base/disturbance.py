"""Disturbed pictures: what the models that look at pictures are trained on."""

import torch
from torch.nn import functional as F


def disturbed(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures moved, resized, blurred and with noise, so that drawn pictures are accepted as well as originals.

    Args:
        pictures: Pictures between -1 and 1.
    """
    count = len(pictures)
    scale = 0.85 + 0.35 * torch.rand(count)
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = scale
    matrices[:, :, 2] = 0.3 * (torch.rand(count, 2) - 0.5)
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    noise = 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(moved)
    return (moved + share * (blurred - moved) + noise).clamp(-1, 1)
