"""Aspect-ratio buckets: their sizes in pixels, the bucket of a picture, and the pictures of every step."""

import math
from collections.abc import Sequence

import numpy as np

from cersa_diffusion.errors import ConfigError

# Height and width in pixels.
Size = tuple[int, int]
# The largest ratio of the longer to the shorter side; longer pictures are cropped.
LONGEST_RATIO = 2.0


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The square and all sizes of at most resolution x resolution pixels of which no side can be longer, sorted.

    Args:
        resolution: side of the square that limits the number of pixels.
        step: all sides are multiples of this number.

    Raises:
        ConfigError: the step is outside 1 to the resolution.
    """
    if not 1 <= step <= resolution:
        raise ConfigError(f"bucket_step is {step}, expected 1 to the resolution ({resolution})")

    def longest_beside(side: int) -> int:
        return resolution**2 // side // step * step

    square = resolution // step * step
    sides = range(step, int(resolution * math.sqrt(LONGEST_RATIO)) + 1, step)
    sizes = [size for size in ((longest_beside(side), side) for side in sides) if max(size) <= LONGEST_RATIO * min(size)]
    return sorted({(square, square)} | {(height, width) for height, width in sizes if longest_beside(height) == width})


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket with the aspect ratio nearest to a picture's, by the difference of logarithms; of equal ones the larger."""

    def distance(bucket: Size) -> tuple[float, int]:
        # Buckets of one aspect ratio must have exactly the same distance; subtracted logarithms would differ by rounding.
        cross = bucket[0] * size[1], bucket[1] * size[0]
        return math.log(max(cross) / min(cross)), -bucket[0] * bucket[1]

    return min(sizes, key=distance)


def covering_size(size: Size, bucket: Size) -> Size:
    """The smallest size with a picture's aspect ratio that covers a bucket; one of its sides equals the bucket's."""
    (height, width), (bucket_height, bucket_width) = size, bucket
    if bucket_height * width >= bucket_width * height:
        return bucket_height, bucket_height * width // height
    return bucket_width * height // width, bucket_width


class PictureOrder:
    """The picture of every sample of a run, which depends only on the seed and the sample's number.

    With several buckets, it also depends on `samples_per_step`.

    All samples of an optimizer step come from one bucket. The buckets alternate such that over `cycle` steps all pictures are
    equally frequent, and nearly so over fewer steps; within a bucket every epoch has its own permutation.

    Args:
        buckets: (n,) the bucket of each picture.
        seed: seed of the run.
        samples_per_step: samples of one optimizer step, over all processes and accumulated batches.
    """

    def __init__(self, buckets: Sequence[Size], seed: int, samples_per_step: int):
        self.seed, self.samples_per_step = seed, samples_per_step
        self.members = {size: [index for index, bucket in enumerate(buckets) if bucket == size] for size in sorted(set(buckets))}
        sizes = [len(members) for members in self.members.values()]
        self.turns = [size // math.gcd(*sizes) for size in sizes]
        self.cycle = sum(self.turns)

    def __call__(self, sample: int) -> tuple[Size, int]:
        """The bucket of a sample and the number of its picture."""
        step, offset = divmod(sample, self.samples_per_step)
        cycle, position = divmod(step, self.cycle)
        order = self._bucket_order(cycle)
        number = order[position]
        earlier_steps = cycle * self.turns[number] + order[:position].count(number)
        bucket, members = list(self.members.items())[number]
        epoch, position = divmod(earlier_steps * self.samples_per_step + offset, len(members))
        # A single bucket is not part of the seed, so that runs without buckets keep their order.
        stream = (self.seed, epoch) if len(self.members) == 1 else (self.seed, epoch, *bucket)
        return bucket, members[int(np.random.default_rng(stream).permutation(len(members))[position])]

    def _bucket_order(self, cycle: int) -> list[int]:
        """The number of the bucket for each step of a cycle; the steps of each bucket are spread evenly, with jitter."""
        if self.cycle == 1:
            return [0]
        random = np.random.default_rng((self.seed, cycle, len(self.members)))
        times = np.concatenate([(np.arange(turns) + random.random(turns)) / turns for turns in self.turns])
        return np.repeat(np.arange(len(self.turns)), self.turns)[np.argsort(times, kind="stable")].tolist()
