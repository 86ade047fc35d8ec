"""Aspect-ratio buckets: which sizes there are, how a picture gets to one, and which pictures every step is made of.

All sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np

from cersa_diffusion.errors import ConfigError

Size = tuple[int, int]
# Height to width and width to height: anything longer is cropped.
LONGEST_RATIO = 2.0


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The sizes of at most resolution x resolution pixels that cannot grow on either side, and the square, sorted.

    Args:
        resolution: side of the square that bounds the number of pixels.
        step: sides are multiples of it.

    Raises:
        ConfigError: a step that no such size is a multiple of.
    """
    if not 1 <= step <= resolution:
        raise ConfigError(f"bucket_step is {step}, expected 1 to the resolution ({resolution})")

    def longest_beside(side: int) -> int:
        return resolution**2 // side // step * step

    def is_short(size: Size) -> bool:
        return max(size) <= LONGEST_RATIO * min(size)

    square = resolution // step * step
    sides = range(step, int(resolution * math.sqrt(LONGEST_RATIO)) + 1, step)
    sizes = {size for size in ((longest_beside(side), side) for side in sides) if is_short(size)}
    return sorted({(square, square)} | {(height, width) for height, width in sizes if longest_beside(height) == width})


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to a picture's, measured by the logarithm; the larger one of two that tie."""

    def distance(bucket: Size) -> tuple[float, int]:
        # Ratios of one shape must tie exactly, which differences of logarithms would not.
        cross = bucket[0] * size[1], bucket[1] * size[0]
        return math.log(max(cross) / min(cross)), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def covering_size(size: Size, bucket: Size) -> Size:
    """The smallest size with a picture's aspect ratio that covers a bucket; one of the sides fits it exactly."""
    (height, width), (bucket_height, bucket_width) = size, bucket
    if bucket_height * width >= bucket_width * height:
        return bucket_height, bucket_height * width // height
    return bucket_width * height // width, bucket_width


class PictureOrder:
    """Which picture each sample of a run shows, as a function of the seed and the sample's number.

    With several buckets it is one of `samples_per_step` as well.

    All samples of an optimizer step come from one bucket. The buckets take turns such that over `cycle` steps every picture comes
    up equally often, and nearly so over any shorter stretch; within a bucket every epoch is a permutation of its own.

    Args:
        buckets: (n,) the bucket of each picture.
        seed: the run's seed.
        samples_per_step: samples of one optimizer step, over all processes and accumulated batches.
    """

    def __init__(self, buckets: Sequence[Size], seed: int, samples_per_step: int):
        self.seed, self.samples_per_step = seed, samples_per_step
        self.members = {bucket: [i for i, other in enumerate(buckets) if other == bucket] for bucket in sorted(set(buckets))}
        sizes = [len(members) for members in self.members.values()]
        self.turns = [size // math.gcd(*sizes) for size in sizes]
        self.cycle = sum(self.turns)

    def __call__(self, sample: int) -> tuple[Size, int]:
        """The bucket of a sample and the number of its picture."""
        step, offset = divmod(sample, self.samples_per_step)
        cycle, position = divmod(step, self.cycle)
        schedule = self._schedule(cycle)
        number = schedule[position]
        earlier = cycle * self.turns[number] + schedule[:position].count(number)
        bucket, members = list(self.members.items())[number]
        epoch, position = divmod(earlier * self.samples_per_step + offset, len(members))
        # One bucket needs no name of its own: runs without buckets stay what they are.
        stream = (self.seed, epoch) if len(self.members) == 1 else (self.seed, epoch, *bucket)
        return bucket, members[int(np.random.default_rng(stream).permutation(len(members))[position])]

    def _schedule(self, cycle: int) -> list[int]:
        """Numbers of the buckets whose turn it is in each step of a cycle: each one's turns are spread evenly, with jitter."""
        if self.cycle == 1:
            return [0]
        random = np.random.default_rng((self.seed, cycle, len(self.members)))
        times = np.concatenate([(np.arange(turns) + random.random(turns)) / turns for turns in self.turns])
        return np.repeat(np.arange(len(self.turns)), self.turns)[np.argsort(times, kind="stable")].tolist()
