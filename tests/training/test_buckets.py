"""Aspect-ratio buckets and the order of pictures, against their definitions."""

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as transforms

from cersa_diffusion import ConfigError
from cersa_diffusion.training.data.buckets import PictureOrder, bucket_sizes, covering_size, nearest_bucket

from ..conftest import raises

SIDES = st.integers(8, 6000)
SIZES = st.tuples(SIDES, SIDES)


def test_buckets_of_stable_diffusion():
    assert bucket_sizes(512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert bucket_sizes(64, 64) == [(64, 64)]


@given(st.integers(1, 32), st.integers(1, 64))
def test_buckets_are_as_large_as_they_may_be(step_in_eights, factor):
    step = 8 * step_in_eights
    resolution = step * factor
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0 and max(height, width) <= 2 * min(height, width)
        assert height * width <= resolution**2 < min((height + step) * width, height * (width + step))
        assert (width, height) in sizes


@given(st.integers(8, 2000), st.integers(1, 300))
def test_there_is_always_a_bucket(resolution, step):
    if step > resolution:
        with raises(ConfigError, "bucket_step", str(step)):
            bucket_sizes(resolution, step)
    else:
        square = resolution // step * step
        assert (square, square) in bucket_sizes(resolution, step)


@given(SIZES, st.sampled_from([(512, 64), (64, 8), (1024, 64)]))
def test_the_nearest_bucket_has_the_nearest_ratio(size, grid):
    sizes = bucket_sizes(*grid)
    found = nearest_bucket(size, sizes)
    distances = [abs(math.log(size[0] / size[1]) - math.log(height / width)) for height, width in sizes]
    assert found in sizes
    assert abs(math.log(size[0] / size[1]) - math.log(found[0] / found[1])) <= min(distances) + 1e-12


def test_of_two_buckets_of_one_shape_the_larger_is_taken():
    assert nearest_bucket((30, 20), [(300, 200), (600, 400), (100, 100)]) == (600, 400)


@given(SIZES, st.tuples(st.integers(8, 1024), st.integers(8, 1024)))
def test_a_covering_size_covers_and_fits_one_side(size, bucket):
    height, width = covering_size(size, bucket)
    assert height >= bucket[0] and width >= bucket[1] and (height == bucket[0] or width == bucket[1])
    exact = max(bucket[0] / size[0], bucket[1] / size[1])
    assert abs(height - size[0] * exact) < 1 + 1e-6 and abs(width - size[1] * exact) < 1 + 1e-6


@given(SIZES, st.integers(8, 1024))
def test_in_a_square_it_is_the_size_that_torchvision_takes(size, side):
    expected = transforms._geometry._compute_resized_output_size(size, [side])
    assert list(covering_size(size, (side, side))) == expected


BUCKETS = st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1)]), min_size=1, max_size=12)


@given(BUCKETS, st.integers(0, 2**32), st.integers(1, 6))
def test_every_step_is_of_one_bucket_and_a_cycle_shows_every_picture_equally(buckets, seed, per_step):
    order = PictureOrder(buckets, seed, per_step)
    cycles = per_step * math.gcd(*Counter(buckets).values())  # enough for whole epochs of every bucket
    shown = [order(sample) for sample in range(order.cycle * cycles * per_step)]
    for start in range(0, len(shown), per_step):
        assert len({bucket for bucket, _ in shown[start : start + per_step]}) == 1
    assert all(bucket == buckets[number] for bucket, number in shown)
    counts = Counter(number for _, number in shown)
    assert len(counts) == len(buckets) and len(set(counts.values())) == 1


@settings(max_examples=30)
@given(BUCKETS, st.integers(0, 1000), st.integers(1, 4), st.integers(1, 40))
def test_any_stretch_shows_all_pictures_about_equally_often(buckets, seed, per_step, epochs):
    order = PictureOrder(buckets, seed, per_step)
    steps = max(1, epochs * len(buckets) // per_step)
    counts = Counter(order(sample)[1] for sample in range(steps * per_step))
    mean = steps * per_step / len(buckets)
    # A turn of a bucket more or less, spread over its pictures, and one for an epoch that is under way.
    for number, bucket in enumerate(buckets):
        assert abs(counts[number] - mean) <= 2 * math.ceil(per_step / buckets.count(bucket)) + 1


@settings(max_examples=30)
@given(BUCKETS, st.integers(0, 1000))
def test_within_a_bucket_every_epoch_is_a_permutation(buckets, seed):
    order = PictureOrder(buckets, seed, 2)
    shown = [order(sample) for sample in range(2 * 3 * len(buckets))]
    for bucket, members in order.members.items():
        own = [number for other, number in shown if other == bucket]
        for start in range(0, len(own) - len(members) + 1, len(members)):
            assert sorted(own[start : start + len(members)]) == members


def test_orders_differ_between_epochs_cycles_and_seeds():
    single = PictureOrder([(1, 1)] * 6, 3, 2)
    epochs = [tuple(single(sample)[1] for sample in range(6 * epoch, 6 * epoch + 6)) for epoch in range(4)]
    assert len(set(epochs)) == 4
    buckets = [(1, 1)] * 3 + [(1, 2)] * 4
    schedules = {
        tuple(PictureOrder(buckets, seed, 2)(sample)[0] for sample in range(start, start + 14, 2))
        for seed in range(3)
        for start in (0, 14)
    }
    assert len(schedules) > 3


def test_without_buckets_the_order_does_not_depend_on_the_batch():
    """The order that runs had before there were buckets: a permutation per epoch, from seed and epoch."""
    expected = [int(number) for epoch in range(4) for number in np.random.default_rng((3, epoch)).permutation(5)]
    for per_step in (1, 4, 7):
        order = PictureOrder([(64, 64)] * 5, 3, per_step)
        assert [order(sample)[1] for sample in range(20)] == expected
