"""Pipelines in memory: bounded, shared, and one visitor at a time in each."""

import threading

import torch

from gradio_app.library import Library
from gradio_app.store import PipelineStore, weight_bytes


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
