"""Pictures and their order: functions of seed and sample number, robust against what folders hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from cersa_diffusion import ConfigError
from cersa_diffusion.training.data import DreamBoothDataset, load_picture, picture_paths


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def dataset(folder, first=0, last=12, **changes) -> DreamBoothDataset:
    options = {"resolution": 32, "center_crop": False, "random_flip": True, "seed": 5, "first": first, "last": last}
    return DreamBoothDataset(picture_paths(folder, "instance_data_dir"), [], **(options | changes))


def test_a_later_start_sees_the_same_samples(folder):
    whole, rest = dataset(folder), dataset(folder, first=7)
    assert len(rest) == 5
    for index in range(5):
        assert rest[index]["sample"] == index + 7
        assert torch.equal(rest[index]["instance"], whole[index + 7]["instance"])


def test_every_epoch_shows_every_picture_once_in_changing_order(folder):
    names = [[sample_path.name for sample_path in epoch(folder, number)] for number in range(6)]
    assert all(sorted(order) == ["0.png", "1.png", "2.png"] for order in names)
    assert len({tuple(order) for order in names}) > 1


def epoch(folder, number):
    data = dataset(folder)
    return [data._pick(data.instance_paths, 3 * number + i) for i in range(3)]


def test_crops_differ_between_visits_unless_centred(folder):
    first_picture = [picture_paths(folder, "x")[0]]
    options = {"resolution": 32, "random_flip": False, "seed": 5, "first": 0, "last": 8}
    random = DreamBoothDataset(first_picture, [], center_crop=False, **options)
    centred = DreamBoothDataset(first_picture, [], center_crop=True, **options)
    assert any(not torch.equal(random[0]["instance"], random[i]["instance"]) for i in range(1, 8))
    assert all(torch.equal(centred[0]["instance"], centred[i]["instance"]) for i in range(1, 8))
    assert centred[0]["instance"].shape == (3, 32, 32) and centred[0]["instance"].min() >= -1


def test_other_files_are_skipped_with_one_warning_that_names_them(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / ".ipynb_checkpoints").mkdir()
    with pytest.warns(UserWarning, match=r"\.ipynb_checkpoints, broken\.jpg, notes\.txt"):
        assert [path.name for path in picture_paths(folder, "instance_data_dir")] == ["0.png", "1.png", "2.png"]


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ConfigError, match="instance_data_dir: no pictures"):
        picture_paths(tmp_path, "instance_data_dir")
    with pytest.raises(ConfigError, match="is not a folder"):
        picture_paths(tmp_path / "nowhere", "instance_data_dir")


def test_transparency_goes_on_white_and_modes_become_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "b.jpg")
    assert load_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_picture(tmp_path / "b.jpg").mode == "RGB"
