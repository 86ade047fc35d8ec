"""The cost of truncation before any training: the error of the weights, and the change of the loss on the instance pictures."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from cersa_diffusion.inject import InjectionReport
from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.data.dataset import DreamBoothDataset, collate
from cersa_diffusion.training.data.latent_cache import LatentCache
from cersa_diffusion.training.run.loss import DreamBoothLoss

PROBE_SAMPLES = 8


@dataclass(frozen=True)
class TruncationCost:
    """The cost of truncation; ``str()`` gives it as one line.

    Attributes:
        mean_weight_error: relative Frobenius error of a weight, mean over all layers.
        worst_weight_error: the largest of these errors.
        worst_layer: the layer with the largest error, "component.name".
        base_loss: mean squared error of the base on the instance pictures.
        truncated_loss: mean squared error of the truncated, untrained model on the same pictures with the same noise.
    """

    mean_weight_error: float
    worst_weight_error: float
    worst_layer: str
    base_loss: float
    truncated_loss: float

    @classmethod
    def of(cls, reports: Mapping[str, InjectionReport], base_loss: float, truncated_loss: float) -> "TruncationCost":
        """Computes the cost from the reports of the injection, by component, and from both losses."""
        errors = {
            f"{component}.{layer.name}": math.sqrt(max(0.0, 1 - layer.kept_energy))
            for component, report in reports.items()
            for layer in report.layers
        }
        worst = max(errors, key=errors.get)
        return cls(sum(errors.values()) / len(errors), errors[worst], worst, base_loss, truncated_loss)

    def __str__(self) -> str:
        return (
            f"truncation: relative weight error {self.mean_weight_error:.1%} (mean of the layers), {self.worst_weight_error:.1%} "
            f"(worst, {self.worst_layer}); denoising loss on the instance pictures {self.base_loss:.4f} -> "
            f"{self.truncated_loss:.4f} ({self.truncated_loss / self.base_loss - 1:+.1%}, {PROBE_SAMPLES} draws of noise)"
        )


@torch.no_grad()
def probe_loss(
    loss: DreamBoothLoss,
    instance: list[Example],
    models: Mapping[str, nn.Module],
    autocast: AbstractContextManager,
    latents: LatentCache | None = None,
) -> float:
    """Mean squared error on the first `PROBE_SAMPLES` samples of a run, as the training will draw them.

    Args:
        loss: the loss of the run.
        instance: the pictures of the subject.
        models: the components by name, before or after the injection.
        autocast: the precision of the training.
        latents: the cached latents of the run, if it caches them.
    """
    size = loss.config.train_batch_size
    dataset = DreamBoothDataset(instance, [], loss.config, first=0, last=PROBE_SAMPLES, samples_per_step=size, latents=latents)
    with autocast:
        errors = [loss.squared_errors(batch, models)[0] for batch in DataLoader(dataset, batch_size=size, collate_fn=collate)]
    return float(torch.cat(errors).mean())
