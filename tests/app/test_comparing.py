"""A comparison: what it accepts, what its JSON carries, and that its pictures are those of the pipelines themselves."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.pipelines.open import load_base
from cersa_diffusion.training import load_result
from gradio_app.comparing import SCHEDULERS, SWEEP, UNTOUCHED, Comparison, Scorer, draw, draw_sweep, parse_seeds
from gradio_app.settings import Limits
from gradio_app.view import comparison_table, grid_picture, headings_of

from ..conftest import raises

COMPARISON = Comparison("small", (UNTOUCHED,), ("a cat",), (3,), steps=2)
TEXTS = st.text(max_size=20)


@given(
    st.builds(
        Comparison,
        base=TEXTS,
        columns=st.lists(TEXTS, max_size=3).map(tuple),
        prompts=st.lists(TEXTS, max_size=3).map(tuple),
        seeds=st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple),
        strengths=st.dictionaries(TEXTS, st.floats(0, 1.5), max_size=3),
        negative_prompt=TEXTS,
        steps=st.integers(1, 100),
        guidance=st.floats(0, 30),
        scheduler=st.sampled_from(list(SCHEDULERS)),
        token=TEXTS,
    )
)
def test_settings_come_back_from_their_json(comparison):
    assert Comparison.from_json(comparison.to_json()) == comparison


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_any_other_text_is_a_message(text):
    with pytest.raises(ConfigError):
        Comparison.from_json(text).check(Limits())


@pytest.mark.parametrize(
    "values", [{"steps": "x"}, {"seeds": 3}, {"columns": "abc"}, {"other": 1}, {"strengths": [1]}, {"steps": 1e999}]
)
def test_settings_of_the_wrong_kind_are_refused(values):
    with raises(ConfigError, "settings"):
        Comparison.from_json(json.dumps(json.loads(COMPARISON.to_json()) | values))


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8))
def test_seeds_are_read_as_written(seeds):
    assert parse_seeds(", ".join(map(str, seeds)), 8) == tuple(dict.fromkeys(seeds))


def test_seeds_as_ranges_and_refused_ones():
    assert parse_seeds("0-2 7", 8) == (0, 1, 2, 7)
    for text in ("", "a", "-1", "1.5", "0-999999999", "1,2,3,4,5,6,7,8,9", "٣"):
        with raises(ConfigError, "seeds", repr(text)):
            parse_seeds(text, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"columns": ()}, ("columns", "0", "6")),
        ({"prompts": ("x",) * 9}, ("prompts", "9", "8")),
        ({"prompts": ("x" * 501,)}, ("characters", "501", "500")),
        ({"seeds": (2**32,)}, ("seed", str(2**32))),
        ({"steps": 101}, ("steps", "101", "100")),
        ({"guidance": float("nan")}, ("guidance", "nan", "30.0")),
        ({"strengths": {"a": 1.6}}, ("strength of a", "1.6", "1.5")),
        ({"scheduler": "os"}, ("scheduler", "'os'", "DDIM")),
        ({"columns": ("x",) * 6, "prompts": ("x",) * 4, "seeds": (1, 2, 3)}, ("pictures", "72", "64")),
    ],
)
def test_what_is_beyond_the_limits_is_refused(change, named):
    with raises(ConfigError, *named):
        replace(COMPARISON, **change).check(Limits())


def pixels(picture) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).astype("float32"))


def direct(pipe, seed: int, steps: int = 2) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pixels(pipe("a cat", generator=generator, num_inference_steps=steps, guidance_scale=4.0).images[0])


def test_columns_are_what_the_pipelines_draw(app):
    base, runs = app.library.base("small"), app.library.runs()
    chosen = [None, *runs.values()]
    comparison = replace(COMPARISON, columns=(UNTOUCHED, *runs), seeds=(3, 4))
    drawn = list(draw(comparison, base, chosen, app.store, app.scorer))
    assert [(each.column, each.row) for each in drawn] == [(column, row) for column in range(4) for row in range(2)]
    for each in drawn:
        run = chosen[each.column]
        pipe = load_base(base.source) if run is None else load_result(run.method, run.weights_path, base.source)
        assert torch.equal(pixels(each.picture), direct(pipe, (3, 4)[each.row]))
        assert each.seconds > 0 and each.memory > 0 and each.score is None


@pytest.mark.parametrize("name", ["trained: cat-cersa", "trained: cat-lora"])
def test_strength_and_sweep(app, name):
    base, run = app.library.base("small"), app.library.runs()[name]
    swept = [each.picture for each in draw_sweep(COMPARISON, base, run, app.store, app.scorer)]
    assert len(swept) == len(SWEEP)
    strong = replace(COMPARISON, columns=(name,), strengths={name: 1.5})
    [alone] = draw(strong, base, [run], app.store, app.scorer)
    assert torch.equal(pixels(alone.picture), pixels(swept[-1]))
    pipe = load_result(run.method, run.weights_path, base.source)
    assert torch.equal(pixels(swept[SWEEP.index(1.0)]), direct(pipe, 3))
    # After a strength, the next visitor gets the adapter as trained.
    [again] = draw(replace(COMPARISON, columns=(name,)), base, [run], app.store, app.scorer)
    assert torch.equal(pixels(again.picture), direct(pipe, 3))


def test_a_fully_tuned_model_has_no_sweep(app):
    run = app.library.runs()["trained: cat-full"]
    with raises(ConfigError, "trained: cat-full", "strength"):
        list(draw_sweep(COMPARISON, app.library.base("small"), run, app.store, app.scorer))


def test_schedulers_and_negative_prompts_change_the_picture_and_nothing_stays(app):
    base = app.library.base("small")
    variants = [COMPARISON, replace(COMPARISON, negative_prompt="dog"), replace(COMPARISON, scheduler="Euler"), COMPARISON]
    pictures = [pixels(next(draw(each, base, [None], app.store, app.scorer)).picture) for each in variants]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[0], pictures[3])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws(app, scheduler):
    [drawn] = draw(replace(COMPARISON, scheduler=scheduler), app.library.base("small"), [None], app.store, app.scorer)
    assert drawn.picture.size == (16, 16)


def test_the_score_leaves_the_subject_word_out(clip_path, subject_path):
    pytest.importorskip("torchmetrics")
    from cersa_diffusion.metrics.clip_models import TransformersClip
    from cersa_diffusion.metrics.clipscore import clipscore_torchmetrics
    from cersa_diffusion.pictures import load_picture

    picture = load_picture(next(iter(sorted((subject_path / "instance").glob("*.png")))))
    expected = clipscore_torchmetrics([picture], ["a 3d emoji of a cat"], TransformersClip(clip_path, "cpu"))[0]
    assert Scorer(str(clip_path), "cpu", contextlib.nullcontext()).score(picture, "a 3d emoji of a cat") == pytest.approx(
        expected
    )


def test_the_table_escapes_and_the_grid_holds_every_picture(app):
    comparison = replace(COMPARISON, prompts=("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'))
    drawn = {(each.row, each.column): each for each in draw(comparison, app.library.base("small"), [None], app.store, app.scorer)}
    headings = headings_of(comparison, [None])
    page = comparison_table(comparison.rows(), headings, drawn, ["<b>"])
    assert "<script" not in page and "<img src=x" not in page and page.count("<figure>") == 2
    sheet = grid_picture(comparison.rows(), [*headings, *headings], drawn)
    assert sheet.width > 2 * 128 and sheet.height > 2 * 128
