"""The pictures of a run and their order, which depend only on the seed and the number of the sample.

Nothing here has a state: sample i of a run has the same picture, crop and noise for every number of interruptions and processes
(with several buckets: for the same number of samples per step). The samples of an optimizer step have consecutive numbers, in
batches that the processes take in turn: two processes together see the pictures of one process with batches of twice the size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from cersa_diffusion.training.data.buckets import PictureOrder, Size, bucket_sizes, covering_size, nearest_bucket
from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.settings.config import DreamBoothConfig

# The streams of random numbers for `sample_generator`; the noise of prompt group g (instance, class) has stream NOISE + g.
FRAMING, NOISE, FIXED_CROP = 0, 1, 3


def sample_generator(seed: int, sample: int, stream: int) -> torch.Generator:
    """The random numbers of one sample; every use has its own `stream`."""
    # torch seeds its CPU generator with 32 bits, too few to pack the numbers into: they are mixed.
    mixed = np.random.SeedSequence((seed, sample, stream)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


@dataclass(frozen=True)
class View:
    """A picture as the models see it: scaled to cover a size, cropped to this size, and mirrored or not.

    Args:
        example: the picture.
        target: the size, (height, width).
        corner: (top, left) of the crop in the scaled picture.
        flipped: whether the picture is mirrored.
    """

    example: Example
    target: Size
    corner: tuple[int, int]
    flipped: bool

    @property
    def conditioning(self) -> tuple[int, ...]:
        """The size conditions of SDXL: original height and width, top and left of the crop, height and width of the target."""
        top, left = self.corner
        if self.flipped:
            left = covering_size(self.example.size, self.target)[1] - self.target[1] - left
        return (*self.example.size, top, left, *self.target)

    def pixels(self) -> Tensor:
        """(3, height, width) float32 in [-1, 1]."""
        scaled = covering_size(self.example.size, self.target)
        picture = transforms.resize(self.example.load(), list(scaled), antialias=True)
        picture = transforms.crop(picture, *self.corner, *self.target)
        if self.flipped:
            picture = transforms.horizontal_flip(picture)
        return transforms.to_dtype(transforms.to_image(picture), torch.float32, scale=True) * 2 - 1


def picture_buckets(instance: list[Example], config: DreamBoothConfig) -> list[Size]:
    """The size of each instance picture: the same square for all, or the nearest aspect-ratio bucket."""
    if not config.aspect_ratio_buckets:
        return [(config.resolution, config.resolution)] * len(instance)
    sizes = bucket_sizes(config.resolution, config.bucket_step)
    return [nearest_bucket(example.size, sizes) for example in instance]


def _crop_corner(example: Example, target: Size, config: DreamBoothConfig, generator: torch.Generator) -> tuple[int, int]:
    margins = [scaled - cropped for scaled, cropped in zip(covering_size(example.size, target), target, strict=True)]
    if config.center_crop:
        return margins[0] // 2, margins[1] // 2
    left, top = (int(torch.randint(margin + 1, (1,), generator=generator)) for margin in reversed(margins))
    return top, left


def _fixed_corner(group: int, index: int, example: Example, target: Size, config: DreamBoothConfig) -> tuple[int, int]:
    return _crop_corner(example, target, config, sample_generator(config.seed, index, FIXED_CROP + group))


def fixed_views(instance: list[Example], classes: list[Example], config: DreamBoothConfig) -> list[View]:
    """All views of a run in which the crop of each picture is drawn only once.

    Args:
        instance: the pictures of the subject.
        classes: the class pictures, which have views in every size of the instance pictures.
        config: the settings.
    """
    buckets = picture_buckets(instance, config)
    flips = (False, True) if config.random_flip else (False,)
    crops = [(0, index, example, bucket) for index, (example, bucket) in enumerate(zip(instance, buckets, strict=True))]
    crops += [(1, index, example, bucket) for index, example in enumerate(classes) for bucket in sorted(set(buckets))]
    return [
        View(example, bucket, _fixed_corner(group, index, example, bucket, config), flipped)
        for group, index, example, bucket in crops
        for flipped in flips
    ]


class DreamBoothDataset(Dataset):
    """Samples of a run: each has an instance picture and, with prior preservation, a class picture.

    Args:
        instance: the pictures of the subject.
        classes: the class pictures; empty without prior preservation.
        config: the settings: seed, sizes, crops and flips.
        first: number of the first sample.
        last: number after the last sample.
        samples_per_step: samples of one optimizer step, over all processes and accumulated batches; all have the same size.
        latents: mean and standard deviation of the latents of all `fixed_views`, which replace the pixels.
    """

    def __init__(
        self,
        instance: list[Example],
        classes: list[Example],
        config: DreamBoothConfig,
        *,
        first: int,
        last: int,
        samples_per_step: int,
        latents: Mapping[View, tuple[Tensor, Tensor]] | None = None,
    ):
        self.instance, self.classes, self.config, self.latents = instance, classes, config, latents
        self.first, self.last = first, last
        self.order = PictureOrder(picture_buckets(instance, config), config.seed, samples_per_step)
        # Class pictures have one order of their own for all sizes.
        self.class_order = PictureOrder([(0, 0)] * len(classes), config.seed, samples_per_step) if classes else None

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict:
        sample = self.first + index
        bucket, number = self.order(sample)
        item = {"sample": sample, "instance": self._picture(0, self.instance, number, bucket, sample)}
        if self.class_order is not None:
            item["class"] = self._picture(1, self.classes, self.class_order(sample)[1], bucket, sample)
        return item

    def _picture(self, group: int, examples: list[Example], number: int, bucket: Size, sample: int) -> dict:
        example, generator = examples[number], sample_generator(self.config.seed, sample, FRAMING)
        if self.latents is None:
            corner = _crop_corner(example, bucket, self.config, generator)
        else:
            corner = _fixed_corner(group, number, example, bucket, self.config)
        flipped = self.config.random_flip and bool(torch.rand(1, generator=generator) < 0.5)
        view = View(example, bucket, corner, flipped)
        picture = {"prompt": example.prompt, "size": view.conditioning}
        if self.latents is None:
            return picture | {"pixels": view.pixels()}
        mean, std = self.latents[view]
        return picture | {"latent_mean": mean, "latent_std": std}


def collate(items: list[dict]) -> dict:
    """A batch of samples with p pictures each (instance, class); the b instance pictures come first.

    Args:
        items: b samples of `DreamBoothDataset`, of one size.

    Returns:
        "pixels" (p b, 3, h, w) float32, or "latent_mean" and "latent_std" (p b, c, h', w'); "prompts", p b strings; "samples",
        (b,) int64 numbers; "sizes", (p b, 6) int64 as in `View.conditioning`.
    """
    pictures = [item["instance"] for item in items] + [item["class"] for item in items if "class" in item]
    tensors = [name for name in ("pixels", "latent_mean", "latent_std") if name in pictures[0]]
    return {name: torch.stack([picture[name] for picture in pictures]) for name in tensors} | {
        "prompts": [picture["prompt"] for picture in pictures],
        "samples": [item["sample"] for item in items],
        "sizes": torch.tensor([picture["size"] for picture in pictures]),
    }
