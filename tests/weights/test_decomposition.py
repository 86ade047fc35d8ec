"""Decomposing many layers: threads, progress, interruption, and several processes that share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing, nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, CersaError
from cersa_diffusion.weights.cache import DecompositionCache, leading_factors
from cersa_diffusion.weights.decompose import LayerJob, decompose_layers, shares
from cersa_diffusion.weights.stored import FinestWeight

from ..conftest import DEVICE, frozen_parameters, raises

SHAPES = ((30, 20), (64, 64), (9, 50), (64, 48), (1, 7), (33, 40))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> DecompositionCache:
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path / "cache"))
    return DecompositionCache.default()


@pytest.fixture
def no_cache(monkeypatch):
    monkeypatch.setenv("CERSA_CACHE", "off")


@pytest.fixture
def threads():
    """Sets the number of threads as users do; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(n, m) for m, n in SHAPES)).to(DEVICE)


def jobs_of(model: nn.Module) -> list[LayerJob]:
    return [
        LayerJob(name, tuple(layer.weight.shape), partial(FinestWeight, layer.weight), lambda s: min(5, len(s)))
        for name, layer in model.named_children()
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_changes_neither_order_nor_bits(no_cache, threads, count):
    model = network(0)
    threads(count)
    with decompose_layers(jobs_of(model), show_progress=False) as results:
        found = dict(results)
    assert torch.get_num_threads() == count
    assert list(found) == [name for name, _ in model.named_children()]
    threads(1)
    for name, layer in model.named_children():
        expected = leading_factors(layer.weight, lambda s: min(5, len(s)), None)
        assert all(torch.equal(a, b) for a, b in zip(found[name], expected, strict=True))


def test_work_is_only_a_little_ahead_of_the_results_taken(no_cache, threads):
    threads(2)
    loaded = []

    def job(number: int) -> LayerJob:
        weight = FinestWeight(torch.eye(8, device=DEVICE))
        return LayerJob(str(number), (8, 8), lambda: loaded.append(number) or weight, lambda s: 2)

    with decompose_layers([job(number) for number in range(40)], show_progress=False) as results:
        for taken in range(1, 11):
            next(results)
            assert len(loaded) <= taken + 3
    assert len(loaded) < 20


def test_the_bar_names_layers_and_says_the_remaining_time(no_cache, capsys):
    with decompose_layers(jobs_of(network(0))) as results:
        list(results)
    last = capsys.readouterr().err.rstrip().split("\r")[-1]
    assert "decomposed 6/6 5" in last and "100%" in last and "<00:00" in last


def test_a_solver_that_gives_up_names_the_layer_and_leaves_the_model(no_cache):
    model = network(0)
    model[3] = nn.Linear(4, 4, dtype=torch.float64, device=DEVICE)
    nn.init.constant_(model[3].weight, 1e200)  # finite, but its square is not
    with raises(CersaError, "3"):
        cersa.inject_cersa(model, CersaConfig(), show_progress=False)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)


@given(st.lists(st.integers(1, 10**6), max_size=60), st.integers(1, 9))
def test_shares_are_a_partition_and_balanced(costs, parts):
    split = shares(costs, parts)
    assert sorted(number for part in split for number in part) == list(range(len(costs)))
    loads = [sum(costs[number] for number in part) for part in split]
    assert max(loads) - min(loads) <= max(costs, default=0)


INTERRUPTED = """
import torch, cersa_diffusion as cersa
model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(300)))
try:
    cersa.inject_cersa(model, cersa.CersaConfig())
except KeyboardInterrupt:
    print(all(type(layer) is torch.nn.Linear for layer in model), torch.get_num_threads())
"""


def test_ctrl_c_leaves_whole_entries_and_the_model_as_it_was(cache):
    # Whoever starts the tests in the background has them ignore Ctrl-C, and every process below them too.
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(list(cache.folder.glob("*/*.safetensors"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert output.split() == ["True", str(torch.get_num_threads())]
    entries = list(cache.folder.glob("*/*.safetensors"))
    assert 5 <= len(entries) < 300 and not list(cache.folder.glob("*/*.tmp"))
    assert all(cache.read(path.stem) is not None for path in entries)


def injected(seed: int, before_first=lambda: None) -> dict:
    """Injects a network, and says which layers (by shape) this process decomposed and what came out.

    `before_first` is called once, when this process is about to decompose its first layer.
    """
    import cersa_diffusion.weights.cache as cache_module

    decompose, solved = cache_module.decompose, []

    def recorded(weight):
        solved.append(list(weight.shape))
        if len(solved) == 1:
            before_first()
        return decompose(weight)

    cache_module.decompose = recorded
    model = network(seed)
    if seed == 3:
        model[3] = nn.Linear(4, 4, dtype=torch.float64, device=DEVICE)
        nn.init.constant_(model[3].weight, 1e200)
    try:
        cersa.inject_cersa(model, CersaConfig(alpha=0.8), show_progress=False)
    except CersaError as error:
        return {"error": str(error)}
    finally:
        cache_module.decompose = decompose
    return {"solved": solved, "factors": {name: tensor.tolist() for name, tensor in frozen_parameters(model).items()}}


def one_rank(rank: int, folder: str) -> None:
    os.environ["CERSA_CACHE"] = f"{folder}/cache"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def both_have_begun():
        # On a busy machine one process would otherwise finish all of these small layers before the other starts.
        open(f"{folder}/begun-{rank}", "w").close()
        deadline = time.monotonic() + 120
        while not os.path.exists(f"{folder}/begun-{1 - rank}") and time.monotonic() < deadline:
            time.sleep(0.01)

    found = {"shared": injected(1, both_have_begun)}
    distributed.barrier()
    found["unsolvable"] = injected(3)
    distributed.barrier()
    os.environ["CERSA_CACHE"] = "off"
    found["uncached"] = injected(1)
    distributed.barrier()
    os.environ["CERSA_CACHE"] = f"{folder}/cache"
    if rank == 0:  # the other one never comes
        found["alone"] = injected(2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    os._exit(0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_decompose_every_layer_once_and_agree(two_ranks):
    first, second = (found["shared"] for found in two_ranks)
    assert sorted(first["solved"] + second["solved"]) == sorted(map(list, SHAPES))
    assert first["solved"] and second["solved"]
    assert first["factors"] == second["factors"]


def test_a_layer_that_cannot_be_decomposed_is_an_error_in_every_process(two_ranks):
    assert all("layer 3 cannot be decomposed" in found["unsolvable"]["error"] for found in two_ranks)


def test_with_the_cache_off_every_process_decomposes_all(two_ranks):
    first, second = (found["uncached"] for found in two_ranks)
    assert sorted(first["solved"]) == sorted(second["solved"]) == sorted(map(list, SHAPES))
    assert first["factors"] == second["factors"] == two_ranks[0]["shared"]["factors"]


def test_one_process_on_its_own_does_not_wait_for_the_others(two_ranks):
    assert sorted(two_ranks[0]["alone"]["solved"]) == sorted(map(list, SHAPES))
