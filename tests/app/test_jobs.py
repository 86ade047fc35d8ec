"""Trainings in the queue: real ones, of a few steps on the smallest base."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from cersa_diffusion.errors import ConfigError
from cersa_diffusion.training import DreamBoothConfig, train_dreambooth
from cersa_diffusion.training.run.lock import training_process
from gradio_app.inspection import plan_of
from gradio_app.jobs import JobQueue, new_name
from gradio_app.library import Library
from gradio_app.messages import Messages
from gradio_app.settings import Limits
from gradio_app.store import PipelineStore
from gradio_app.training import NO_PRESET, TrainForm

from ..conftest import assert_named, raises
from .conftest import wait_for

LIMITS = Limits()


@pytest.fixture
def config(models_dir, subject_path, tmp_path):
    def make(name: str, **changes) -> DreamBoothConfig:
        settings = {
            "pretrained_model_name_or_path": str(models_dir / "small"),
            "instance_data_dir": str(subject_path / "instance"),
            "instance_prompt": "a cat",
            "output_dir": str(tmp_path / "runs" / name),
            "resolution": 16,
            "max_train_steps": 3,
            "train_batch_size": 1,
            "validation_prompt": "a cat",
            "num_validation_images": 1,
            "checkpointing_steps": 1000,
        }
        return DreamBoothConfig(**settings | changes)

    return make


@pytest.fixture
def queue(tmp_path) -> JobQueue:
    return JobQueue(Messages({tmp_path: "work"}), most_waiting=3, make_room=lambda: None)


def test_one_after_the_other_with_places(queue, config):
    queue.submit("first", config("first", max_train_steps=200))
    wait_for(lambda jobs: jobs["first"][0].step > 0, queue)
    queue.submit("second", config("second", mixed_precision="bf16"))
    queue.submit("third", config("third"))
    places = {job.name: place for job, place in queue.jobs()}
    assert places == {"first": None, "second": 1, "third": 2}
    queue.submit("fourth", config("fourth"))
    with raises(ConfigError, "3 trainings", "waiting"):
        queue.submit("fifth", config("fifth"))
    queue.cancel("second")
    assert {job.name: place for job, place in queue.jobs()}["third"] == 1
    queue.cancel("first")
    wait_for(lambda jobs: jobs["fourth"][0].state == "finished", queue)
    jobs = {job.name: job for job, _ in queue.jobs()}
    assert [jobs[name].state for name in ("first", "second", "third")] == ["stopped", "stopped", "finished"]
    assert jobs["third"].step == 3 and [step for step, _ in jobs["third"].losses] == [1, 2, 3]
    assert [step for step, _ in jobs["third"].previews] == [0, 3] and "truncation" in jobs["third"].description


def test_a_cancelled_training_goes_on_where_it_was(queue, config):
    whole = train_dreambooth(config("whole", max_train_steps=40), [])
    queue.submit("parts", config("parts", max_train_steps=40))
    wait_for(lambda jobs: jobs["parts"][0].step > 1, queue)
    queue.cancel("parts")
    wait_for(lambda jobs: jobs["parts"][0].state == "stopped", queue)
    job = queue.job("parts")
    assert job.resumable and 1 < job.step < 40 and "resumed" in job.message
    queue.resume("parts")
    wait_for(lambda jobs: jobs["parts"][0].state == "finished", queue)
    assert not job.resumable
    first, second = (
        load_file(Path(folder) / "pytorch_cersa_weights.safetensors") for folder in (whole.output_dir, job.config.output_dir)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_crash_leaves_the_next_alone_and_says_what_it_can(queue, config, tmp_path):
    broken = config("broken")
    queue.submit("broken", replace(broken, instance_data_dir=str(tmp_path / "nowhere")))
    queue.submit("diverged", config("diverged", learning_rate=1e30, max_train_steps=20))
    Path(broken.output_dir).parent.mkdir(parents=True)
    (Path(broken.output_dir).parent / "blocked").write_text("a file where the folder would be")
    queue.submit("blocked", config("blocked"))
    wait_for(lambda jobs: all(job.state == "failed" for job, _ in jobs.values()), queue)
    queue.submit("fine", config("fine"))
    wait_for(lambda jobs: jobs["fine"][0].state == "finished", queue)
    messages = {job.name: job.message for job, _ in queue.jobs()}
    assert messages["broken"] == "instance_data_dir: work/nowhere is not a folder"
    assert_named(messages["diverged"], "loss", "learning_rate")
    assert_named(messages["blocked"], "output_dir", "blocked", "file")
    assert not any(str(tmp_path) in message for message in messages.values())


def test_only_what_can_be_cancelled_or_resumed_is(queue, config):
    queue.submit("one", config("one"))
    wait_for(lambda jobs: jobs["one"][0].state == "finished", queue)
    for call, name in ((queue.cancel, "one"), (queue.resume, "one"), (queue.cancel, "../x"), (queue.resume, "nothing")):
        with pytest.raises(ConfigError):
            call(name)


def test_what_a_killed_server_left_can_be_resumed(queue, config, models_dir, tmp_path):
    queue.submit("left", config("left", max_train_steps=200))
    wait_for(lambda jobs: jobs["left"][0].step > 0, queue)
    queue.cancel("left")
    wait_for(lambda jobs: jobs["left"][0].state == "stopped", queue)
    step = queue.job("left").step
    library = Library([models_dir], [tmp_path / "runs"])
    another = JobQueue(Messages({}), most_waiting=3, make_room=lambda: None)
    another.restore(library.unfinished())
    [(job, _)] = another.jobs()
    assert job.resumable and job.step == step and job.config.max_train_steps == 200
    job = another.job("left")
    job.config = replace(job.config, max_train_steps=step + 1)
    another.resume("left")
    wait_for(lambda jobs: jobs["left"][0].state == "finished", another)
    assert list(library.runs()) == ["left"] and not library.unfinished()


def test_a_run_that_another_process_trains_is_listed_and_left_alone(queue, config, models_dir, tmp_path):
    queue.submit("shared", config("shared", max_train_steps=400, checkpointing_steps=2))
    wait_for(lambda jobs: jobs["shared"][0].step > 3, queue)
    other = JobQueue(Messages({}), most_waiting=3, make_room=lambda: None)
    other.restore(Library([models_dir], [tmp_path / "runs"]).unfinished())
    [(job, _)] = other.jobs()
    assert (job.state, job.resumable) == ("elsewhere", False) and "process" in job.message
    with raises(ConfigError, "shared", training_process(tmp_path / "runs" / "shared")):
        other.resume("shared")
    with raises(ConfigError, "shared", "cancel"):
        other.cancel("shared")
    queue.cancel("shared")
    wait_for(lambda jobs: jobs["shared"][0].state == "stopped", queue)
    [(job, _)] = other.jobs()
    assert job.state == "stopped" and job.resumable and job.step >= 2
    (Path(job.config.output_dir) / "result.json").write_text("{}")
    assert other.jobs()[0][0].state == "finished"


def test_the_form_becomes_the_settings_of_a_run(app, tmp_path):
    form = TrainForm("small", beta=0.8, alpha=0.9, class_prompt="a dog", steps=40, instance_prompt=" a cat ")
    base = app.library.base("small")
    with app.store.lease(base) as pipe:
        made = form.config(pipe, base.source, tmp_path / "run", LIMITS)
        assert (made.alpha, made.beta, made.resolution, made.instance_prompt) == (0.9, 0.8, 16, "a cat")
        assert made.caches_latents and not made.caches_text_embeddings
        assert made.with_prior_preservation and made.validation_prompt == "a cat" and made.memory_budget is None
        assert replace(form, beta=0.95).config(pipe, base.source, tmp_path, LIMITS).beta is None
        assert replace(form, memory_budget="1MB").config(pipe, base.source, tmp_path, LIMITS).memory_budget == "1MB"
        assert (made.rank_multiple, made.uniform_blocks) == (8, False)
        compiled = replace(form, rank_multiple=16, uniform_blocks=True).config(pipe, base.source, tmp_path, LIMITS)
        assert (compiled.rank_multiple, compiled.uniform_blocks) == (16, True)
        lora = replace(form, method="lora", rank=7).config(pipe, base.source, tmp_path, LIMITS)
        assert lora.rank == 7 and lora.alpha == DreamBoothConfig.alpha
        for change in (
            {"steps": 0},
            {"method": "x"},
            {"batch_size": 1000},
            {"instance_prompt": "x" * 999},
            {"instance_prompt": " "},
        ):
            with pytest.raises(ConfigError):
                replace(form, **change).config(pipe, base.source, tmp_path, LIMITS)
        if not torch.cuda.is_available():
            with raises(ConfigError, "12gb", "float16", "GPU"):
                replace(form, preset="12gb").config(pipe, base.source, tmp_path, LIMITS)


def test_the_plan_follows_the_form(app):
    base = app.library.base("small")
    with app.store.lease(base) as pipe:
        plans = {
            name: TrainForm("small", **settings).plan(pipe, base.source, LIMITS)
            for name, settings in {
                "high": {}, "low": {"alpha": 0.6}, "lora": {"method": "lora", "rank": 4}, "full": {"method": "full"},
                "small": {"preset": "8gb"},
            }.items()
        }  # fmt: skip
        with raises(ConfigError, "memory_budget", "1000 bytes", "rank_multiple"):
            TrainForm("small", memory_budget="1kB").plan(pipe, base.source, LIMITS)
    assert len(set(plans.values())) == len(plans)
    assert all("together" in plan and "full" in plan for plan in plans.values())
    assert "lora r=4" in plans["lora"] and "text encoder" not in plans["small"] and NO_PRESET


def test_plans_do_not_depend_on_the_dtype_for_drawing(app):
    base, plans, spectra = app.library.base("small"), [], []
    for dtype in (torch.float32, torch.bfloat16):
        with PipelineStore(1, "cpu", dtype).lease(base) as pipe:
            plans.append(TrainForm("small", alpha=0.7).plan(pipe, base.source, LIMITS))
            spectra.append(plan_of(pipe, 0.9, 4).spectra)
    assert plans[0] == plans[1] and spectra[0].keys() == spectra[1].keys()
    assert all(torch.equal(spectrum, spectra[1][name]) for name, spectrum in spectra[0].items())


def test_counting_for_the_plan_touches_no_layer_that_others_draw_with(app):
    base, called = app.library.base("small"), set()
    with app.store.lease(base) as pipe:
        handle = register_module_forward_pre_hook(lambda module, _: called.add(id(module)))
        try:
            TrainForm("small", batch_size=3).plan(pipe, base.source, LIMITS)
        finally:
            handle.remove()
        assert called and not called & {id(module) for model in (pipe.unet, pipe.text_encoder) for module in model.modules()}


def test_names_of_runs_are_the_page_s_own():
    assert new_name("cersa", []).startswith("cersa-")
    assert len({new_name("cersa", ["cersa-1"]) for _ in range(50)}) == 50


def test_a_training_finds_the_memory_of_idle_pipelines_free(app, config, models_dir):
    with app.store.lease(app.library.base("small")):
        pass
    assert app.store.held() == 1
    app.jobs.submit("cat", config("cat", max_train_steps=1))
    wait_for(lambda jobs: jobs["cat"][0].state == "finished", app.jobs)
    assert app.store.held() == 0
