"""Two processes train in the same coordinates even where their singular vectors differ, refuse, stop and draw together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from cersa_diffusion.functional import Decomposition
from cersa_diffusion.training import DreamBoothConfig, TrainingCallback, train_dreambooth
from cersa_diffusion.training.data.classes import sample_class_pictures
from cersa_diffusion.weights import cache

from ..conftest import DEVICE

STEPS = 4


class Losses(TrainingCallback):
    def __init__(self):
        self.values = []

    def on_step(self, progress):
        self.values.append(progress.loss)


class StopAfterTwo(Losses):
    def should_stop(self):
        return len(self.values) >= 2


def _flip_signs() -> None:
    decompose = cache.decompose

    def flipped(weight: torch.Tensor) -> Decomposition:
        U, s, Vh = decompose(weight)
        signs = torch.where(torch.arange(len(s)) % 2 == 0, 1.0, -1.0).to(s)
        return Decomposition(U * signs, s, signs[:, None] * Vh)

    cache.decompose = flipped


def _process(rank: int, port: int, work: Callable, arguments: tuple, outcomes) -> None:
    # Without a cache no process takes its singular vectors from another one.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
                   "CERSA_CACHE": "off"}  # fmt: skip
    torch.set_num_threads(1)
    try:
        outcomes.put((rank, work(rank, *arguments)))
    except Exception as error:
        outcomes.put((rank, f"{type(error).__name__}: {error}"))


def _train(rank: int, configs: list[DreamBoothConfig], flip: bool, callback: type[Losses]) -> list[float]:
    if flip and rank == 1:
        _flip_signs()
    losses = callback()
    train_dreambooth(configs[rank], [losses])
    return losses.values


def _draw_class_pictures(rank: int, config: DreamBoothConfig) -> list[str]:
    """Draws as the trainer does; returns the names of the pictures that this process has written."""
    device, written, save = Accelerator().device, [], Image.Image.save

    def noted(picture, path, **options):
        written.append(path.stem.removeprefix("."))
        save(picture, path, **options)

    Image.Image.save = noted
    sample_class_pictures(config, device)
    assert len(list(Path(config.class_data_dir).glob("*.png"))) == config.num_class_images
    return written


def train_by_two(
    configs: list[DreamBoothConfig], flip: bool = False, callback: type[Losses] = Losses
) -> dict[int, list[float] | str]:
    """Rank -> losses (of the first process) or error."""
    return by_two(_train, configs, flip, callback)


def by_two(work: Callable, *arguments) -> dict[int, object]:
    """Rank -> what `work` returns in two processes that train together, called with the rank and the arguments; or its error."""
    # A fork server imports everything once for all the processes of these tests; CUDA cannot be used after a fork.
    context = multiprocessing.get_context("forkserver" if DEVICE.type == "cpu" else "spawn")
    if DEVICE.type == "cpu":
        context.set_forkserver_preload(["cersa_diffusion.training"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcomes = context.Queue()
    processes = [context.Process(target=_process, args=(rank, port, work, arguments, outcomes)) for rank in (0, 1)]
    for process in processes:
        process.start()
    ended = dict(outcomes.get(timeout=300) for _ in processes)
    for process in processes:
        process.join(60)
    return ended


@pytest.fixture
def config(small_settings) -> DreamBoothConfig:
    return DreamBoothConfig(**small_settings | {"alpha": 0.8, "learning_rate": 1e-3, "max_train_steps": STEPS})


@pytest.mark.parametrize("method", ["cersa", pytest.param("svft", marks=pytest.mark.slow)])
def test_flipped_signs_in_one_process_change_nothing(config, tmp_path, method):
    config = replace(config, method=method, sparse_pattern="top_k" if method == "svft" else "banded", off_diagonals=2, alpha=0.95)
    runs = {flip: replace(config, output_dir=str(tmp_path / str(flip))) for flip in (False, True)}
    equal, flipped = (train_by_two([run, run], flip)[0] for flip, run in runs.items())
    assert len(equal) == STEPS and flipped == equal
    first, second = (load_file(next(Path(run.output_dir).glob("*.safetensors"))) for run in runs.values())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_processes_that_keep_other_components_all_say_so(config):
    outcomes = train_by_two([config, replace(config, alpha=0.5)])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith("CersaError") and "[1]" in outcomes[0]


def test_a_stop_that_one_process_asks_for_ends_both_after_the_same_step(config):
    """The request comes after the losses of step 2 are exchanged, so it travels with those of step 3."""
    config = replace(config, max_train_steps=8)
    outcomes = train_by_two([config, config], callback=StopAfterTwo)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith("TrainingStopped") and "checkpoint-3" in outcomes[0]
    assert [folder.name for folder in Path(config.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.fixture
def one_thread():
    """As in the processes: the last bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_draw_the_class_pictures_of_one(config, tmp_path, one_thread):
    prior = {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 5, "sample_batch_size": 2}
    one, two = (replace(config, class_data_dir=str(tmp_path / name), **prior) for name in ("one", "two"))
    sample_class_pictures(one, DEVICE)
    written = by_two(_draw_class_pictures, two)
    assert written == {0: ["class-00000", "class-00001", "class-00004"], 1: ["class-00002", "class-00003"]}
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(first) == 5 and first == second
