"""The builder of the embedded models: what it leaves out, what captions say, and that its training resumes."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ..conftest import REPOSITORY, raises, run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))

from embedded_base.captions import captions_of
from embedded_base.clip import unpaired_pictures, without
from embedded_base.evaluation import recognition
from embedded_base.names import Emoji, is_held_back, read_vocabulary
from embedded_base.render import Pictures
from embedded_base.settings import COLOURS, STYLES
from embedded_base.spectra import spectrum_table
from embedded_base.subjects import SUBJECTS
from embedded_base.training import Stage, learning_rate_factor, make_optimizer
from embedded_base.vit import split_names


@pytest.mark.parametrize("name", ["grinning cat", "crying cat", "monkey face", "robot", "ghost"])
def test_subjects_are_left_out_in_the_fluent_looks_only(name):
    assert [is_held_back(name, style) for style in ("3d", "flat", "noto", "twemoji")] == [True, True, False, False]
    assert not is_held_back("dog face", "3d")


def test_every_subject_is_held_back_or_of_a_look_that_nobody_learns():
    for subject in SUBJECTS:
        for entry in (*subject.instance, *subject.held_back):
            assert not subject.artwork.style or is_held_back(entry.drawing, subject.artwork.style)


def test_bundled_subjects_are_complete():
    for subject in SUBJECTS:
        folder = REPOSITORY / "assets" / "subjects" / subject.name
        description = json.loads((folder / "subject.json").read_text())
        entries = [*description["instance"], *description["held_back"]]
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
        assert files == {entry["file"] for entry in entries} and len(files) == len(entries) >= 7
        for entry in entries:
            corner = np.array(Image.open(folder / entry["file"]).convert("RGB"))[0, 0]
            assert np.abs(corner.astype(int) - COLOURS[entry["background"]]).max() <= 1
        assert all("sks" in prompt for prompt in description["evaluation_prompts"])
        assert not any("sks" in prompt for prompt in description["drift_prompts"])


def toy_pictures(names: list[str]) -> Pictures:
    pairs = [(name, style) for name in names for style in STYLES]
    return Pictures(np.zeros((len(pairs), 2, 2, 4), np.uint8), [name for name, _ in pairs], [style for _, style in pairs])


def test_clip_learns_every_name_and_misses_a_hundred_in_one_style_each():
    pictures = toy_pictures([f"thing {number:03}" for number in range(230)])
    learned, unpaired = without(pictures, unpaired_pictures(pictures))
    pairs = set(zip(learned.names, learned.styles, strict=True))
    kept_out = set(zip(unpaired.names, unpaired.styles, strict=True))
    assert len(kept_out) == len(set(unpaired.names)) == 100 and not pairs & kept_out
    assert set(learned.names) == set(pictures.names) and len(pairs) + len(kept_out) == 4 * 230
    assert [unpaired.styles.count(style) for style in STYLES] == [25] * 4


def test_vit_holds_names_out_in_all_styles_and_never_sees_a_subject():
    names = ["robot", *(f"thing {number}" for number in range(40))]
    emoji = [Emoji(name, "0", "0", "Objects", ()) for name in names]
    learned, held_out = split_names(toy_pictures(names), emoji)
    assert not set(learned.names) & set(held_out.names)
    shown = set(zip([*learned.names, *held_out.names], [*learned.styles, *held_out.styles], strict=True))
    assert {style for name, style in shown if name == "robot"} == {"noto", "twemoji"}
    assert len(set(held_out.names)) == 5


def test_an_unknown_name_in_a_vocabulary_is_named():
    with raises(SystemExit, "vocabulary small", "grinning face"):
        read_vocabulary("small", [Emoji("only this", "0", "0", "Objects", ())])


def test_recognition_counts_the_place_of_the_right_name():
    first = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.7, 0.1, 0.4, 0.5]])
    other = first.clone()
    other[1, 1] = 1.2  # on average the second picture's name comes first, too
    report = recognition(torch.stack([first, other]), torch.tensor([0, 1, 3]), "x")
    assert report["x_top1"] == pytest.approx(1 / 3) and report["x_top5"] == pytest.approx(2 / 3)
    assert report["x_matched_score"] == pytest.approx(100 * (0.9 + 0.8 + 0.1) / 3)
    assert report["x_averaged_top1"] == pytest.approx(2 / 3) and report["x_averaged_top5"] == pytest.approx(2 / 3)


def test_captions_name_the_look_and_the_background():
    captions = captions_of("red apple", "3d", "blue", None, ("fruit",))
    assert "a 3d emoji of a red apple on a blue background" in captions
    assert all(caption.endswith("on a blue background") for caption in captions)
    assert not all("background" in caption for caption in captions_of("red apple", "3d", "white", None, ()))


def test_learning_rate_rises_and_falls_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1001)]
    assert factors[0] < 0.01 and factors[300] == 1.0 and factors[1000] == 0.0


def train_toy(folder, steps, stop_at=None) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer, schedule = make_optimizer([(model, 1e-2)], steps, weight_decay=0.1)
    stage = Stage(folder, steps, 8, {"model": model, "optimizer": optimizer, "schedule": schedule})

    def train_step(step):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step + 1 == stop_at:
            stage._ask_to_stop()
        return loss.detach()

    stage.run(train_step)
    return model.weight.detach()


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = train_toy(tmp_path / "whole", 60)
    with raises(SystemExit, "step 25", "60"):
        train_toy(tmp_path / "parts", 60, stop_at=25)
    assert torch.equal(train_toy(tmp_path / "parts", 60), whole)


def test_spectrum_table_of_a_layer_of_known_spectrum():
    model = torch.nn.Module()
    model.to_q = torch.nn.Linear(10, 10)
    model.to_q.weight.data = torch.eye(10)
    assert "| time embedding | 1 | 0.80 | 0.90 | 1.00 |" in spectrum_table({"m": model}).replace("| m ", "")


def test_help_names_the_stages():
    finished = run_script("scripts/build_base.py", "--help")
    assert finished.returncode == 0 and "autoencoder" in finished.stdout and "--vocabulary" in finished.stdout
