"""Pictures and prompts from disk: every format says the same, and everything that is wrong is said before any work."""

import csv
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cersa_diffusion import ConfigError
from cersa_diffusion.metrics.inputs import read_picture_prompts, read_pictures, read_prompt_list

from ..conftest import raises

NAMES = ["a.png", "b.png", "c.png"]
PROMPTS = ["a red dog", 'a dog, "wet"', "ein Hündchen"]


def write(path, prompts=PROMPTS, names=NAMES, column="prompt"):
    """The prompts in the format that the suffix names."""
    rows = [{"file_name": name, column: prompt} for name, prompt in zip(names, prompts, strict=True)]
    if path.suffix == ".txt":
        path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("column", ["prompt", "text"])
@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv"])
def test_every_format_gives_the_same_prompts(suffix, column, tmp_path):
    path = write(tmp_path / f"prompts.{suffix}", column=column)
    assert read_prompt_list(path, "--prompts") == PROMPTS
    assert read_picture_prompts(path, NAMES, "--prompts") == PROMPTS


def test_a_json_object_of_file_names(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(dict(reversed(list(zip(NAMES, PROMPTS, strict=True))))))
    assert read_picture_prompts(path, NAMES, "--prompts") == PROMPTS
    with raises(ConfigError, "--prompts", "prompts.json"):
        read_prompt_list(path, "--prompts")


printable = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(printable.filter(lambda word: word.strip() == word), min_size=1, max_size=4, unique=True))
def test_any_words_survive_json_and_csv(words, tmp_path):
    names = [f"{number}.png" for number in range(len(words))]
    for suffix in ("json", "jsonl", "csv"):
        path = write(tmp_path / f"prompts.{suffix}", words, names)
        assert read_picture_prompts(path, names, "--prompts") == words


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("prompts.json", "{}", "a.png b.png c.png"),
        ("prompts.json", '{"a.png": "x", "b.png": " ", "c.png": "z"}', "b.png"),
        ("prompts.json", '{"a.png": "x", "b.png": "y", "c.png": "z", "d.png": "w"}', "d.png"),
        ("prompts.json", "{", "prompts.json"),
        ("prompts.json", "7", "int"),
        ("prompts.yaml", "a: b", ".yaml"),
        ("prompts.txt", "one\ntwo\n", "2 3"),
        ("prompts.csv", "file_name,prompt\na.png,x\na.png,y\nb.png,y\nc.png,z\n", "a.png"),
        ("prompts.csv", "name,prompt\na.png,x\n", "1 file_name"),
        ("prompts.csv", "file_name,caption\na.png,x\n", "1 prompt text"),
    ],
)
def test_faulty_prompts_for_pictures(name, text, names, tmp_path):
    (tmp_path / name).write_text(text)
    with raises(ConfigError, "--prompts", name, *names.split()):
        read_picture_prompts(tmp_path / name, NAMES, "--prompts")


@pytest.mark.parametrize(("name", "text"), [("p.txt", "\n\n"), ("p.json", "[]"), ("p.csv", "prompt\n"), ("p.jsonl", "")])
def test_an_empty_list(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with raises(ConfigError, "--prompts", name):
        read_prompt_list(tmp_path / name, "--prompts")
    with raises(ConfigError, "--prompts", "missing.txt"):
        read_prompt_list(tmp_path / "missing.txt", "--prompts")


def test_pictures_of_a_folder_by_name(subject_path, tmp_path):
    for path in (subject_path / "instance").glob("*.png"):
        shutil.copy(path, tmp_path)
    (tmp_path / "prompts.json").write_text("{}")
    found = read_pictures(tmp_path, "--images")
    assert list(found) == sorted(path.name for path in (subject_path / "instance").glob("*.png"))
    assert all(picture.mode == "RGB" for picture in found.values())


def test_an_unreadable_picture_is_an_error_not_a_smaller_folder(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "text.jpg").write_text("no picture")
    with raises(ConfigError, "--images", "damaged.png", "text.jpg"):
        read_pictures(tmp_path, "--images")


def test_a_folder_without_pictures(tmp_path):
    with raises(ConfigError, "--references"):
        read_pictures(tmp_path, "--references")
    with raises(ConfigError, "--references"):
        read_pictures(tmp_path / "missing", "--references")
