"""Pipelines in memory: bounded, shared, one visitor at a time in each, in the dtype for drawing, on the base of their run."""

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from cersa_diffusion.pipelines.draw import generate
from cersa_diffusion.training import DreamBoothConfig, load_result, train_dreambooth
from gradio_app.library import Library
from gradio_app.store import PipelineStore, weight_bytes

from ..pipelines_small import SIZE, pipeline, stable_diffusion
from .conftest import PROMPT


def library(settings) -> tuple:
    found = Library(settings.models_dirs, settings.runs_dirs)
    return found.base("small"), found.runs()


def test_the_least_recently_used_makes_room(settings):
    base, runs = library(settings)
    store, seen = PipelineStore(2), {}
    for name in (None, "trained: cat-cersa", None, "trained: cat-lora", None):
        with store.lease(base, runs.get(name)) as pipeline:
            assert name not in seen or seen[name] is pipeline
            seen[name] = pipeline
        assert store.held() <= 2
    with store.lease(base, runs["trained: cat-cersa"]) as again:
        assert again is not seen["trained: cat-cersa"]


def test_equal_parts_are_one_object(settings):
    base, runs = library(settings)
    store = PipelineStore(4)
    with store.lease(base) as first:
        vae, alone = first.vae, weight_bytes(first)
        with store.lease(base, runs["trained: cat-full"]) as other:
            assert other.vae is vae and other.unet is not first.unet
            assert weight_bytes(other) == alone
    assert alone == sum(p.numel() * 4 for m in (first.unet, first.vae, first.text_encoder) for p in m.parameters()) + sum(
        b.numel() * b.element_size() for m in (first.unet, first.vae, first.text_encoder) for b in m.buffers()
    )


def test_a_run_that_cannot_be_loaded_leaves_no_trace(settings, tmp_path):
    base, runs = library(settings)
    store, run = PipelineStore(1), runs["trained: cat-cersa"]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    from dataclasses import replace

    for _ in range(2):
        try:
            with store.lease(base, replace(run, weights_path=broken)):
                raise AssertionError("it was loaded")
        except ValueError as error:
            assert "broken.safetensors" in str(error)
    assert store.held() == 0
    with store.lease(base, run) as pipeline:
        assert isinstance(pipeline.unet, torch.nn.Module)


def test_ten_threads_take_turns_and_memory_stays_bounded(settings):
    base, runs = library(settings)
    store, inside, worst, done = PipelineStore(2), {}, [], []

    def visit(number: int) -> None:
        for run in (None, *list(runs.values())[number % 2 :]):
            with store.lease(base, run) as pipeline:
                assert inside.setdefault(id(pipeline), number) == number
                worst.append(store.held())
                inside.pop(id(pipeline))
        done.append(number)

    threads = [threading.Thread(target=visit, args=[number]) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(10)) and max(worst) <= 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pipelines_draw_in_the_chosen_dtype(settings, dtype):
    base, runs = library(settings)
    store = PipelineStore(4, "cpu", dtype)
    for name in (None, "trained: cat-cersa", "trained: cat-lora", "trained: cat-full"):
        with store.lease(base, runs.get(name)) as leased:
            assert leased.unet.dtype == leased.text_encoder.dtype == (dtype or torch.float32)
            assert leased.vae.dtype == torch.float32
            assert generate(leased, [PROMPT], [0], steps=2)[0][0].size == (SIZE, SIZE)


def test_only_pipelines_that_nobody_uses_are_put_away(settings):
    base, runs = library(settings)
    store, gone = PipelineStore(4), {}
    for name in ("trained: cat-cersa", "trained: cat-lora", "trained: cat-full"):
        with store.lease(base, runs[name]) as idle:
            gone[name] = weakref.ref(idle.unet)
    del idle
    with store.lease(base) as used:
        store.put_away()
        assert store.held() == 1 and not any(reference() for reference in gone.values())
        drawn = generate(used, [PROMPT], [0], steps=2)[0][0]
    store.put_away()
    assert store.held() == 0
    with store.lease(base) as again:
        assert np.array_equal(generate(again, [PROMPT], [0], steps=2)[0][0], drawn)


def test_a_run_is_opened_on_the_variant_of_its_base(tmp_path, subject_path):
    """The files of the variant hold other weights here, so that no other base fits the run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    models, runs = tmp_path / "models", tmp_path / "runs"
    pipeline("sd1").save_pretrained(models / "small")
    torch.manual_seed(5)
    stable_diffusion("epsilon").save_pretrained(models / "small", variant="other")
    config = DreamBoothConfig(
        pretrained_model_name_or_path=str(models / "small"),
        variant="other",
        instance_data_dir=str(subject_path / "instance"),
        instance_prompt=PROMPT,
        output_dir=str(runs / "cat"),
        resolution=SIZE,
        max_train_steps=1,
        train_batch_size=1,
    )
    result = train_dreambooth(config, [])
    found = Library([models], [runs])
    expected = load_result("cersa", Path(result.weights_path), str(models / "small"), variant="other")
    with PipelineStore(2).lease(found.base("small"), found.runs()["cat"]) as leased:
        pictures = [generate(each, [PROMPT], [0], steps=2)[0][0] for each in (leased, expected)]
    assert np.array_equal(*pictures)
