"""Study files and subjects: what is read, and what is refused before anything is loaded."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cersa_diffusion import ConfigError
from cersa_diffusion.study.definition import Study, read_study
from cersa_diffusion.study.subjects import TEST, VALIDATION, read_subject

from ..conftest import REPOSITORY, raises
from .conftest import STUDY, write_subject


def test_a_study_survives_json(study_file):
    matched = {"lora_rank": 2, "lora_learning_rates": [1e-3], "cersa_learning_rates": [1e-2, 1e-3]}
    study = read_study(study_file(matched_memory=matched, tuning_subjects=["my-dog"]))
    again = Study.from_dict(json.loads(json.dumps(study.to_dict())))
    assert again.to_dict() == study.to_dict() and again.rows == study.rows and again.sampling == study.sampling


def test_options_replace_what_the_file_says(study_file):
    study = read_study(study_file(), subjects=["my-dog"], rows=["cersa-.9"], seeds=1, steps=7, dtype="bfloat16")
    assert list(study.read_subjects()) == ["my-dog"] and [row.name for row in study.rows] == ["base", "cersa-.9"]
    assert study.seeds == 1 and study.training["max_train_steps"] == 7
    assert (study.sampling.dtype, study.sampling.pictures) == ("bfloat16", STUDY["sampling"]["pictures"])


def test_every_row_gets_the_same_settings_but_its_own(study_file):
    study = read_study(study_file(text_encoder_rate=0.1))
    subject = study.read_subjects()["my-cat"]
    lora, cersa = (
        vars(study.config(study.row(name), subject, learning_rate=1e-2, seed=1, output_dir="x"))
        for name in ("lora-r2", "cersa-.9")
    )
    assert {name for name in lora if lora[name] != cersa[name]} == {"method", "rank", "alpha"}
    assert lora["text_encoder_lr"] == pytest.approx(1e-3)


ROWS, TRAINING = STUDY["rows"], STUDY["training"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"base": "no-such-base"}, "no-such-base"),
        ({"base": None}, "base"),
        ({"colour": "red"}, "colour"),
        ({"subjects": ["small-base"]}, "small-base subject.json"),
        ({"subjects": ["my-cat", "my-cat"]}, "subjects my-cat"),
        ({"seeds": 0}, "seeds 0"),
        ({"select_by": "beauty"}, "select_by beauty distance"),
        ({"tuning_subjects": ["fox"]}, "tuning_subjects fox my-cat my-dog"),
        ({"sampling": {"steps": 0}}, "sampling.steps 0"),
        ({"sampling": {"scheduler": "x"}}, "sampling scheduler"),
        ({"sampling": {"dtype": "half"}}, "sampling.dtype half auto float32 float16 bfloat16"),
        ({"scoring": {"clip": "emoji-clip"}}, "scoring vision"),
        ({"training": {"resolution": 16}}, "training.max_train_steps"),
        ({"training": TRAINING | {"max_trian_steps": 2}}, "max_trian_steps max_train_steps"),
        ({"training": TRAINING | {"learning_rate": 1.0}}, "training.learning_rate"),
        ({"training": TRAINING | {"output_dir": "x"}}, "training.output_dir"),
        ({"rows": ROWS | {"x": {"method": "lora"}}}, "rows.x.learning_rates None"),
        ({"rows": ROWS | {"x": {"method": "lora", "learning_rates": [-1.0]}}}, "rows.x.learning_rates -1.0"),
        ({"rows": ROWS | {"x": {"method": "guess", "learning_rates": [1.0]}}}, "x method guess"),
        ({"rows": ROWS | {"x": {"method": "full", "rank": 4, "learning_rates": [1.0]}}}, "x full rank"),
        ({"rows": ROWS | {"x": {"method": "cersa", "alpha": 1.5, "learning_rates": [1.0]}}}, "x alpha 1.5"),
        (
            {"rows": ROWS | {"x": {"method": "cersa", "seed": 1, "learning_rates": [1.0]}}},
            "x seed",
        ),
        ({"rows": ROWS | {"x": {"method": "truncated", "learning_rates": [1.0]}}}, "x truncated"),
        ({"rows": ROWS | {"../x": {"method": "lora", "learning_rates": [1.0]}}}, "../x"),
        ({"matched_memory": {"lora_learning_rates": [1.0], "cersa_learning_rates": [1.0]}}, "lora_rank budget"),
        ({"matched_memory": {"lora_rank": 2, "lora_learning_rates": [1.0]}}, "matched_memory.cersa_learning_rates None"),
    ],
)
def test_a_study_that_cannot_run_is_one_clear_error(changes, names, study_file):
    with raises(ConfigError, *names.split()) as caught:
        read_study(study_file("bad.toml", **changes))
    assert str(caught.value).startswith("study ") and "\n" not in str(caught.value)


def test_unknown_names_in_options_are_refused(study_file):
    for name, value, named in (("rows", ["dora"], "dora"), ("subjects", ["fox"], "fox"), ("lora_rank", 4, "matched_memory")):
        with raises(ConfigError, named):
            read_study(study_file(), **{name: value})


def test_selecting_by_distance_needs_held_back_pictures(materials, study_file):
    if not (materials / "plain").exists():
        write_subject(materials / "plain", "apple", held_back=0)
    with raises(ConfigError, "plain"):
        read_study(study_file(subjects=["plain"]))
    study = read_study(study_file(subjects=["plain"], select_by="similarity"))
    subject = study.read_subjects()["plain"]
    assert [path.parent.name for path in subject.references(TEST)] == ["instance", "instance"]


@given(evaluation=st.integers(0, 6), held_back=st.integers(0, 4), shared=st.integers(0, 4))
def test_the_parts_are_disjoint_and_leave_nothing_out(materials, evaluation, held_back, shared):
    folder = materials / "my-cat"
    entries = json.loads((folder / "subject.json").read_text())
    behind = [f"held back {number}" for number in range(held_back)]
    prompts = [*(f"prompt {number}" for number in range(evaluation)), *behind[:shared]]
    other = materials / "drawn"
    other.mkdir(exist_ok=True)
    for name in ("instance", "held_back"):
        if not (other / name).exists():
            (other / name).symlink_to(folder / name)
    entries |= {
        "evaluation_prompts": prompts,
        "held_back": [{"prompt": prompt, "file": "held_back/0.png"} for prompt in behind],
    }
    (other / "subject.json").write_text(json.dumps(entries))
    try:
        parts = read_subject(other).parts
    except ConfigError as error:
        assert "do not make two parts" in str(error) and len({*prompts, *behind}) < 3
        return
    validation, test = parts[VALIDATION], parts[TEST]
    assert not set(validation.prompts) & set(test.prompts)
    assert {*validation.prompts, *test.prompts} == {*prompts, *behind}
    assert {*validation.held_back, *test.held_back} == set(behind)
    assert held_back < 2 or (validation.held_back and test.held_back)


@pytest.mark.parametrize("folder", sorted((REPOSITORY / "assets" / "subjects").iterdir()), ids=lambda path: path.name)
def test_every_bundled_subject_can_be_compared_on(folder: Path):
    subject = read_subject(folder)
    assert all(part.held_back for part in subject.parts.values()) and subject.drift_prompts


def test_the_bundled_study_can_be_run():
    study = read_study(REPOSITORY / "benchmarks" / "study_emoji.toml")
    methods = [row.method for row in study.rows]
    assert {"base", "truncated", "full", "lora", "pissa", "svfit", "svft", "cersa"} == set(methods) and study.seeds == 3
    assert len(study.read_subjects()) >= 2
