"""Samples are functions of seed and number alone: order, crops, flips, buckets, prompts, sizes and cached latents."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

from cersa_diffusion.training.data.captions import Example
from cersa_diffusion.training.data.dataset import DreamBoothDataset, View, collate, fixed_views, picture_buckets
from cersa_diffusion.training.settings.config import DreamBoothConfig

# Height and width: one is square, two are wide, one is tall.
SHAPES = ((40, 40), (40, 80), (50, 90), (90, 48))


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    """Pictures whose red rises from left to right, and green from top to bottom: their crops can be read off them."""
    found = []
    for number, (height, width) in enumerate(SHAPES):
        pixels = np.zeros((height, width, 3))
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        pixels[..., 2] = 50 * number
        Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / f"{number}.png")
        found.append(Example(tmp_path / f"{number}.png", f"picture {number}"))
    return found


def config(**changes) -> DreamBoothConfig:
    settings = {"resolution": 32, "random_flip": True, "seed": 5, "instance_data_dir": "pictures"} | changes
    return DreamBoothConfig(pretrained_model_name_or_path="base", instance_prompt="a sks cat", **settings)


def dataset(examples, classes=(), first=0, last=12, samples_per_step=2, latents=None, **changes) -> DreamBoothDataset:
    return DreamBoothDataset(
        examples, list(classes), config(**changes), first=first, last=last, samples_per_step=samples_per_step, latents=latents
    )


def equal(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("buckets", [{}, {"aspect_ratio_buckets": True, "bucket_step": 8}])
def test_a_later_start_sees_the_same_samples(examples, buckets):
    whole, rest = dataset(examples, examples[:2], **buckets), dataset(examples, examples[:2], first=7, **buckets)
    assert len(rest) == 5
    for index in range(5):
        assert rest[index]["sample"] == index + 7 and equal(rest[index], whole[index + 7])


def test_every_epoch_shows_every_picture_once_in_changing_order(examples):
    data = dataset(examples, last=24)
    epochs = [tuple(data[4 * epoch + i]["instance"]["prompt"] for i in range(4)) for epoch in range(6)]
    assert all(sorted(order) == [f"picture {number}" for number in range(4)] for order in epochs)
    assert len(set(epochs)) > 1


def test_crops_differ_between_visits_unless_centred(examples):
    random = dataset(examples[1:2], random_flip=False)
    centred = dataset(examples[1:2], random_flip=False, center_crop=True)
    assert any(not torch.equal(random[0]["instance"]["pixels"], random[i]["instance"]["pixels"]) for i in range(1, 8))
    assert all(torch.equal(centred[0]["instance"]["pixels"], centred[i]["instance"]["pixels"]) for i in range(1, 8))
    pixels = centred[0]["instance"]["pixels"]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and -1 <= pixels.min() < pixels.max() <= 1


@pytest.mark.parametrize("number", range(4))
def test_sizes_say_where_the_crop_is(examples, number):
    """Mean red and green of the crop against the place that the sizes claim, mirrored or not."""
    height, width = SHAPES[number]
    seen = set()
    for index in range(12):
        shown = dataset(examples[number : number + 1])[index]["instance"]
        top, left = shown["size"][2:4]
        assert (shown["size"][:2], shown["size"][4:]) == ((height, width), (32, 32))
        scale = 32 / min(height, width)
        red, green = ((shown["pixels"][:2] + 1) / 2).mean(dim=(1, 2)).tolist()
        flipped = bool(shown["pixels"][0, 0, 0] > shown["pixels"][0, 0, -1])
        across = (left + 16) / (width * scale)
        assert red == pytest.approx(1 - across if flipped else across, abs=0.02)
        assert green == pytest.approx((top + 16) / (height * scale), abs=0.02)
        seen.add(flipped)
    assert seen == {False, True}


def test_buckets_show_every_picture_in_its_shape_and_whole_steps_at_one_size(examples):
    options = {"aspect_ratio_buckets": True, "bucket_step": 8, "center_crop": True}
    assert picture_buckets(examples, config(**options)) == [(32, 32), (24, 40), (24, 40), (40, 24)]
    data = dataset(examples, examples[:1], last=64, samples_per_step=4, **options)
    counts = dict.fromkeys((example.prompt for example in examples), 0)
    for step in range(16):
        items = [data[4 * step + i] for i in range(4)]
        assert len({item["instance"]["pixels"].shape for item in items}) == 1
        for item in items:
            assert item["class"]["pixels"].shape == item["instance"]["pixels"].shape
            counts[item["instance"]["prompt"]] += 1
    assert set(counts.values()) == {16}


@pytest.mark.parametrize("buckets", [{}, {"aspect_ratio_buckets": True, "bucket_step": 8}])
def test_two_processes_see_together_what_one_sees_in_twice_the_batch(examples, buckets):
    """As accelerate shards a loader: the processes take its batches in turn."""
    data = dataset(examples, last=24, samples_per_step=4, **buckets)
    one = [batch["samples"] for batch in DataLoader(data, batch_size=4, collate_fn=collate)]
    shards = [
        prepare_data_loader(DataLoader(data, batch_size=2, collate_fn=collate), num_processes=2, process_index=index)
        for index in range(2)
    ]
    two = [first["samples"] + second["samples"] for first, second in zip(*shards, strict=True)]
    assert two == one and len(one) == 6


def test_batches_hold_instance_pictures_first(examples):
    classes = [Example(example.picture, "a cat") for example in examples[:3]]
    data = dataset(examples, classes)
    batch = collate([data[2], data[3]])
    assert batch["samples"] == [2, 3] and batch["pixels"].shape == (4, 3, 32, 32)
    assert batch["prompts"][2:] == ["a cat", "a cat"] and all(text.startswith("picture") for text in batch["prompts"][:2])
    assert batch["sizes"].shape == (4, 6) and batch["sizes"].dtype == torch.int64
    assert torch.equal(batch["pixels"][3], data[3]["class"]["pixels"])


def test_loading_in_other_processes_gives_the_same(examples):
    data = dataset(examples, examples[:2], last=6)
    here, there = (DataLoader(data, batch_size=2, collate_fn=collate, num_workers=count) for count in (0, 1))
    assert all(equal(first, second) for first, second in zip(here, there, strict=True))


class Recorded(dict):
    """Stands for latents: each view's own pixels, so that what is shown can be compared."""

    def __init__(self, views: list[View]):
        super().__init__({view: (view.pixels(), view.pixels() / 2) for view in views})
        self.asked = set()

    def __getitem__(self, view):
        self.asked.add(view)
        return super().__getitem__(view)


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("buckets", [{}, {"aspect_ratio_buckets": True, "bucket_step": 8}])
def test_fixed_views_are_all_that_cached_samples_show(examples, center_crop, buckets):
    options = {"center_crop": center_crop, **buckets}
    classes = [Example(example.picture, "a cat") for example in examples[:2]]
    views = fixed_views(examples, classes, config(**options))
    latents = Recorded(views)
    cached, live = (dataset(examples, classes, last=128, latents=each, **options) for each in (latents, None))
    for index in range(128):
        for part in ("instance", "class"):
            found, expected = cached[index][part], live[index][part]
            assert found["prompt"] == expected["prompt"] and found["size"][4:] == expected["size"][4:]
            # With a fixed crop the flips, too, are those of a run without a cache.
            if center_crop:
                assert found["size"] == expected["size"] and torch.equal(found["latent_mean"], expected["pixels"])
    assert latents.asked == set(views) and len(views) == len(latents)
    assert collate([cached[0], cached[1]])["latent_std"].shape[0] == 4


def test_a_crop_that_is_drawn_once_differs_between_pictures(examples):
    tall = [Example(example.picture, "x") for example in examples[1:3]] * 3
    corners = [view.corner for view in fixed_views(tall, [], config(random_flip=False))]
    assert len(set(corners)) > 2
