"""Which prompt a picture comes with: its side-car, its row of metadata, its row of a data set, or the prompt of the run."""

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image

from cersa_diffusion import ConfigError
from cersa_diffusion.training.data.captions import caption_summary, class_examples, read_examples
from cersa_diffusion.training.settings.config import DreamBoothConfig

from ..conftest import raises, warns

NAMES = ("a.png", "b.jpg", "c.png")


def picture(number: int, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        picture(number).save(tmp_path / name)
    return tmp_path


def settings(**source) -> DreamBoothConfig:
    return DreamBoothConfig(pretrained_model_name_or_path="base", instance_prompt="a sks cat", **source)


def prompts(folder, **changes) -> dict[str, str]:
    return {example.name: example.prompt for example in read_examples(settings(instance_data_dir=str(folder), **changes))}


def write_metadata(folder, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8"
    )


def test_without_captions_all_have_the_prompt_of_the_run(folder):
    assert prompts(folder) == dict.fromkeys(NAMES, "a sks cat")


def test_side_cars_come_before_metadata_before_the_prompt_of_the_run(folder):
    (folder / "a.txt").write_text("\ufeffa sks cat\n  on a mat \n", encoding="utf-8")
    write_metadata(folder, [{"file_name": "a.png", "text": "lost"}, {"file_name": "./b.jpg", "text": "a \u2028 sks cat"}])
    assert prompts(folder) == {"a.png": "a sks cat on a mat", "b.jpg": "a sks cat", "c.png": "a sks cat"}


def test_captions_may_be_in_another_column(folder):
    write_metadata(folder, [{"file_name": "b.jpg", "text": "no", "caption": "a cat in the sun"}])
    assert prompts(folder, caption_column="caption")["b.jpg"] == "a cat in the sun"
    with raises(ConfigError, "description", "caption_column", "caption", "file_name", "text"):
        prompts(folder, caption_column="description")


def test_metadata_without_captions_is_fine_unless_a_column_was_named(folder):
    write_metadata(folder, [{"file_name": "b.jpg", "width": 3}])
    assert set(prompts(folder).values()) == {"a sks cat"}
    (folder / "metadata.jsonl").unlink()
    with raises(ConfigError, "metadata.jsonl", "caption", "caption_column"):
        prompts(folder, caption_column="caption")


def test_rows_of_pictures_that_are_not_there_are_named(folder):
    write_metadata(folder, [{"file_name": name, "text": "x"} for name in ("a.png", "gone.png", "more/b.jpg")])
    with warns(UserWarning, "metadata.jsonl", "gone.png", "more/b.jpg"):
        assert prompts(folder)["a.png"] == "x"


@pytest.mark.parametrize("caption", ["", " \n", None, 3])
def test_empty_captions_are_refused(folder, caption):
    write_metadata(folder, [{"file_name": "b.jpg", "text": caption}])
    with raises(ConfigError, "metadata.jsonl", "text", "b.jpg", "instance_prompt"):
        prompts(folder)
    (folder / "b.txt").write_text(" \n")
    with raises(ConfigError, "b.txt"):
        prompts(folder)


@pytest.mark.parametrize("line", ["{", '"a.png"', '{"text": "x"}', '{"file_name": 3}'])
def test_lines_that_are_no_metadata_are_refused(folder, line):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n\n' + line)
    with raises(ConfigError, "metadata.jsonl", "3", "file_name"):
        prompts(folder)


def test_captions_must_be_utf8(folder):
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    with raises(ConfigError, "a.txt", "UTF-8"):
        prompts(folder)


def test_examples_know_their_size_and_pass_between_processes(folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(5).save(folder / "turned.jpg", exif=exif)
    examples = read_examples(settings(instance_data_dir=str(folder)))
    assert [example.size for example in examples] == [(20, 30)] * 3 + [(30, 20)]
    again = pickle.loads(pickle.dumps(examples))
    assert again == examples and hash(again[0]) == hash(examples[0])
    assert [(e.load().height, e.load().width) for e in again] == [example.size for example in examples]


def test_class_pictures_have_the_class_prompt(folder):
    config = settings(
        instance_data_dir=str(folder / "elsewhere"),
        with_prior_preservation=True,
        class_data_dir=str(folder),
        class_prompt="a cat",
    )
    (folder / "a.txt").write_text("a caption of its own")
    assert [example.prompt for example in class_examples([folder / name for name in NAMES], config)] == ["a cat"] * 3


def test_the_summary_counts_captions(folder):
    config = settings(instance_data_dir=str(folder))
    assert caption_summary(read_examples(config), config) == "3 pictures, all of 'a sks cat'"
    (folder / "a.txt").write_text("a sks cat on a mat")
    assert caption_summary(read_examples(config), config) == "3 pictures, 1 with captions of their own"
    assert caption_summary(read_examples(config)[:1], config) == "1 picture, 1 with captions of their own"


def test_without_the_package_data_sets_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises(ConfigError, "cersa-diffusion[train]"):
        read_examples(settings(dataset_name="someone/pictures"))


class TestDataSets:
    """Through the real package, on local folders and files."""

    @pytest.fixture(autouse=True)
    def datasets(self, tmp_path_factory, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        return datasets

    def test_a_folder_of_pictures(self, folder):
        examples = read_examples(settings(dataset_name=str(folder)))
        expected = read_examples(settings(instance_data_dir=str(folder)))
        assert [example.prompt for example in examples] == ["a sks cat"] * 3
        assert [example.size for example in examples] == [(20, 30)] * 3
        for first, second in zip(pickle.loads(pickle.dumps(examples)), expected, strict=True):
            assert np.array_equal(np.asarray(first.load()), np.asarray(second.load()))
        assert len(set(examples)) == 3

    def test_captions_of_a_folder(self, folder):
        write_metadata(folder, [{"file_name": name, "text": f"a cat of {name}"} for name in NAMES])
        assert [e.prompt for e in read_examples(settings(dataset_name=str(folder)))] == [f"a cat of {name}" for name in NAMES]

    @pytest.fixture
    def parquet(self, datasets, tmp_path):
        """Column -> values, written as the hub has it: the pictures' files inside of it."""

        def write(**columns) -> str:
            table = datasets.Dataset.from_dict(columns)
            for name, values in columns.items():
                if isinstance(values[0], Image.Image | dict):
                    table = table.cast_column(name, datasets.Image())
            (tmp_path / "set").mkdir()
            table.to_parquet(tmp_path / "set" / "train-00000.parquet")
            return str(tmp_path / "set")

        return write

    def test_columns_are_chosen(self, parquet):
        name = parquet(picture=[picture(0), picture(1)], caption=["one", "two"], text=["no", "no"])
        config = settings(dataset_name=name, image_column="picture", caption_column="caption")
        examples = read_examples(config)
        assert [(example.name, example.prompt) for example in examples] == [("row 0", "one"), ("row 1", "two")]
        assert np.array_equal(np.asarray(examples[1].load()), np.asarray(picture(1)))

    @pytest.mark.parametrize(
        ("columns", "names"),
        [
            ({}, "image image_column caption picture number"),
            ({"image_column": "number"}, "number image_column"),
            (
                {"image_column": "picture", "caption_column": "words"},
                "words caption_column caption number picture",
            ),
            ({"image_column": "picture", "caption_column": "caption"}, "caption 1"),
            ({"image_column": "picture", "caption_column": "number"}, "number 0 4"),
        ],
    )
    def test_columns_that_cannot_be_used(self, parquet, columns, names):
        name = parquet(caption=["one", ""], picture=[picture(0), picture(1)], number=[4, 5])
        with raises(ConfigError, *names.split()):
            read_examples(settings(dataset_name=name, **columns))

    def test_rows_without_a_usable_picture_are_skipped(self, parquet):
        broken = {"bytes": b"\x89PNG", "path": None}
        name = parquet(image=[picture(0), picture(1, (1, 1)), broken, None, picture(2)], text=["a", "b", "c", "d", "e"])
        with warns(UserWarning, "dataset_name", "row 1", "1x1", "row 2", "row 3"):
            examples = read_examples(settings(dataset_name=name))
        assert [example.prompt for example in examples] == ["a", "e"]
        assert np.array_equal(np.asarray(examples[1].load()), np.asarray(picture(2)))

    def test_nothing_usable(self, parquet):
        name = parquet(image=[picture(1, (1, 1))])
        with pytest.warns(UserWarning), raises(ConfigError, "image", "1"):
            read_examples(settings(dataset_name=name))

    def test_what_is_not_there(self, tmp_path):
        with raises(ConfigError, "nowhere", "train"):
            read_examples(settings(dataset_name=str(tmp_path / "nowhere")))
