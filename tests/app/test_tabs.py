"""What the events of the tabs do, without a browser: called as Gradio calls them."""

import dataclasses
import shutil
from types import SimpleNamespace

import gradio as gr
import pytest
from safetensors.torch import load_file

from cersa_diffusion.errors import ConfigError
from gradio_app.comparing import UNTOUCHED, Comparison
from gradio_app.tabs.compare import CompareTab
from gradio_app.tabs.inspect import InspectTab
from gradio_app.tabs.train import LORA_FORMATS, TrainTab
from gradio_app.training import TrainForm

from ..conftest import assert_named, raises
from .conftest import wait_for

RUN = "trained: cat-cersa"


def built(tab_class, app):
    with gr.Blocks():
        return tab_class(app)


def form(**changes) -> list:
    return list(dataclasses.asdict(TrainForm("small", instance_prompt="a cat", steps=2, batch_size=1, **changes)).values())


@pytest.fixture
def pictures(subject_path) -> list[str]:
    return [str(path) for path in sorted((subject_path / "instance").glob("*.png"))]


def test_a_training_from_the_form_becomes_a_column_and_a_lora(app, pictures):
    tab, compare = built(TrainTab, app), built(CompareTab, app)
    assert tab.watch(None, None)[:-2] == [gr.skip()] * (len(tab.watching) - 2)
    chosen, _ = tab.submit(pictures, *form())
    name = chosen["value"]
    first = tab.watch(name, None)
    assert "waiting" in first[1] or "preparing" in first[1]
    wait_for(lambda jobs: jobs[name][0].state == "finished", app.jobs)
    seen = tab.watch(name, first[-1])
    assert "finished" in seen[1] and "<img" in seen[4] and len(seen[3]["value"]) == 2
    assert tab.watch(name, seen[-1]) == [gr.skip()] * len(tab.watching)
    _, columns = compare.refresh_columns((), "small", [UNTOUCHED], {})
    assert name in columns["choices"] and columns["value"] == [UNTOUCHED]
    file = tab.choose_result(name)[0]
    assert load_file(file["value"]) and str(app.settings.runs_dirs[0]) not in file["value"]
    [made] = tab.make_lora(name, 4, "diffusers")
    lora, report = tab.offer_lora(made, name, 4, "diffusers")
    assert any(".lora_A." in key for key in load_file(lora["value"])) and "rank 4" in report["value"]
    assert str(app.settings.work_dir) not in report["value"]
    assert lora["value"].endswith(f"{name}-lora-r4-diffusers.safetensors")
    for changed in (
        (name, 5, "diffusers"),
        (name, 4, next(key for key in LORA_FORMATS if "kohya" in key)),
        (None, 4, "diffusers"),
    ):
        lora, report = tab.offer_lora(made, *changed)
        assert lora["value"] is None and not lora["interactive"] and not report["visible"]


@pytest.mark.parametrize(
    ("count", "changes", "named"),
    [
        (2, {}, "2 pictures 3 20"),
        (5, {"beta": 0.0}, "beta 0.0 alpha"),
        (5, {"method": "os.system"}, "method 'os.system'"),
        (5, {"alpha": 7.0}, "alpha 7.0"),
    ],
)
def test_nothing_is_written_for_a_form_that_is_wrong(app, pictures, count, changes, named):
    tab = built(TrainTab, app)
    with raises(ConfigError, *named.split()):
        tab.submit(pictures[:count], *form(**changes))
    assert not list(app.settings.runs_dirs[0].iterdir()) and not app.jobs.jobs()


def test_the_plan_says_why_there_is_none(app):
    tab = built(TrainTab, app)
    assert "together" in tab.show_plan(*form())
    assert_named(tab.show_plan(*form(memory_budget="much")), "memory_budget", "'much'", "900MB")


def test_shared_settings_fill_the_form(app):
    tab = built(CompareTab, app)
    shared = Comparison("small", (UNTOUCHED, RUN, "gone"), ("a", "b"), (4, 5), {RUN: 0.5}, steps=7, negative_prompt="dog")
    values = tab.use_settings(shared.to_json(), {})
    assert values[1]["value"] == [UNTOUCHED, RUN] and values[2] == "a\nb" and values[4] == "4, 5" and values[5] == 7
    assert values[9]["value"] == 0.5 and values[9]["visible"] and not values[10]["visible"] and values[-1] == [RUN]
    for text in ("", "{}", '{"base": "/etc"}', shared.to_json().replace('"steps": 7', '"steps": 700')):
        with pytest.raises((ConfigError, TypeError)):
            tab.use_settings(text, {})


def test_strengths_stay_with_their_adapters(app):
    tab = built(CompareTab, app)
    names = [RUN, "trained: cat-lora"]
    after = tab.update_strengths({}, ["trained: cat-lora"], names, 0.3, 0.7, 1, 1, 1, 1)
    assert after[1] == ["trained: cat-lora"] and after[2]["value"] == 0.7 and after[3]["value"] == 1.0


def test_an_uploaded_adapter_is_a_column_of_its_visitor_alone(app, runs_dir, tmp_path):
    tab = built(CompareTab, app)
    file = tmp_path / "from elsewhere.safetensors"
    file.write_bytes((runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors").read_bytes())
    mine, columns = tab.add_adapter(str(file), {}, "small", [UNTOUCHED])
    assert columns["value"] == [UNTOUCHED, "upload: from elsewhere"]
    values = ["small", columns["value"], "a cat", "", "0", 1, 4.0, "DDIM", "sks", *[1.0] * 6]
    *_, last = tab.run(mine, *values)
    assert last[0] == "2 pictures, done"
    with raises(ConfigError, "'upload: from elsewhere'"):
        list(tab.run({}, *values))


def test_inspecting_draws_and_describes(app, runs_dir):
    tab = built(InspectTab, app)
    *figures, table, kinds = tab.inspect("small", 0.9, 4, None)
    assert all(open(path, "rb").read(4) == b"\x89PNG" for path in figures) and "CERSA" in table
    again = tab.inspect("small", 0.9, 4, kinds["choices"][-1])
    assert again[-1]["value"] == kinds["choices"][-1]
    [text] = tab.describe(str(runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors"))
    assert "instance_prompt" in text and "error of the weight changes" in text


def test_used_uploads_are_removed_and_nothing_else(app, pictures, runs_dir):
    weights = runs_dir / "cat-cersa" / "pytorch_cersa_weights.safetensors"
    folder = app.folder.uploads / "0123"
    folder.mkdir(parents=True)

    def uploaded(path) -> str:
        return shutil.copy(path, folder)

    train, compare, inspect = (built(tab, app) for tab in (TrainTab, CompareTab, InspectTab))
    train.submit([uploaded(path) for path in pictures], *form())
    inspect.describe(uploaded(weights))
    mine, _ = compare.add_adapter(uploaded(weights), {}, "small", [UNTOUCHED])
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(b"x")
    for call in (inspect.describe, lambda path: compare.add_adapter(path, mine, "small", [])):
        with pytest.raises(ValueError):
            call(str(damaged))
        damaged.touch()
    damaged.unlink()
    assert list(folder.iterdir()) == [] and len(list(app.folder.adapters.iterdir())) == 1
    inspect.describe(str(weights))
    assert weights.exists()
    app.jobs.close()


def test_what_a_shared_address_lacks_is_said_in_the_status(app):
    tab = built(CompareTab, app)
    shared = Comparison("small", (UNTOUCHED, "<gone>"), ("a",), (4,)).to_json()
    request = SimpleNamespace(query_params={"settings": shared})
    *_, status = tab.from_address({}, request)
    assert "&lt;gone&gt;" in status
    *_, status = tab.from_address({}, SimpleNamespace(query_params={"settings": "{}"}))
    assert "not used" in status
    assert tab.from_address({}, SimpleNamespace(query_params={}))[-1] == ""


def test_messages_stand_in_notes(app):
    note = app.messages.noted(lambda: [app.library.base("<b>")], 1)()
    assert note[0] == gr.skip() and "&lt;b&gt;" in note[1]
    stream = app.messages.streamed(built(CompareTab, app).run, 3)({}, *[None] * 15)
    assert "role=" in next(stream)[0]
    with pytest.raises(gr.Error):
        next(stream)
