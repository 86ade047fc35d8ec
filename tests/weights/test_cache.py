"""The decomposition cache: same layers with and without it, robust against damage, races and growth."""

import copy
import multiprocessing
import os
import random
import stat
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cersa_diffusion as cersa
import cersa_diffusion.weights.cache as cache_module
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.weights.cache import DecompositionCache, LeadingFactors, leading_factors, weight_key

from ..conftest import DEVICE, frozen_parameters, raises, randn, warns


@pytest.fixture
def cache(tmp_path, monkeypatch) -> DecompositionCache:
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path / "cache"))
    return DecompositionCache.default()


def no_solver(weight):
    raise AssertionError("decomposed again")


def test_second_injection_reads_and_gives_the_same_bits_as_none(network, cache, monkeypatch):
    first, second, third = (copy.deepcopy(network) for _ in range(3))
    cersa.inject_cersa(first, CersaConfig(alpha=0.9), show_progress=False)
    assert cache.info().entries == 3
    monkeypatch.setattr("cersa_diffusion.weights.cache.decompose", no_solver)
    cersa.inject_cersa(second, CersaConfig(alpha=0.8), show_progress=False)
    cersa.inject_cersa(third, CersaConfig(alpha=0.9), show_progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("CERSA_CACHE", "off")
    cersa.inject_cersa(network, CersaConfig(alpha=0.9), show_progress=False)
    for other in (first, third):
        assert all(torch.equal(tensor, other.get_parameter(name)) for name, tensor in frozen_parameters(network).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_bases_have_entries_of_their_own(cache, dtype):
    weight = randn(12, 8)
    assert weight_key(weight) != weight_key(weight.to(dtype)) != weight_key(weight.to(dtype).T)
    direct = leading_factors(weight.to(dtype), lambda s: 5, None)
    leading_factors(weight.to(dtype), lambda s: 5, cache)
    cached = leading_factors(weight.to(dtype), lambda s: 5, cache)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(direct, cached, strict=True))


def test_more_components_than_the_entry_has_are_computed_and_kept(cache):
    weight = randn(20, 16, generator=torch.Generator().manual_seed(0))
    assert leading_factors(weight, lambda s: 4, cache).U.shape == (20, 4)
    assert leading_factors(weight, lambda s: 9, cache).U.shape == (20, 9)
    assert cache.read(weight_key(weight)).Vh.shape == (9, 16) and cache.info().entries == 1


def only_entry(cache: DecompositionCache) -> Path:
    (path,) = cache.folder.glob("*/*.safetensors")
    return path


def flipped(content: bytes, place: int, bits: int = 1) -> bytes:
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


@pytest.mark.parametrize("damage", ["cut in the header", "cut in the numbers", "one bit of a number", "a longer header", "empty"])
def test_a_damaged_entry_is_named_and_replaced(cache, damage):
    weight = randn(20, 16, generator=torch.Generator().manual_seed(0))
    expected = leading_factors(weight, lambda s: 4, cache)
    path = only_entry(cache)
    content = path.read_bytes()
    damaged = {
        "cut in the header": content[:100],
        "cut in the numbers": content[:-100],
        "one bit of a number": flipped(content, len(content) - 100),
        "a longer header": flipped(content, 6),
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with warns(UserWarning, str(path)) as caught:
        again = leading_factors(weight, lambda s: 4, cache)
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert path.read_bytes() == content


def test_an_entry_of_another_weight_is_replaced(cache):
    weight = randn(20, 16, generator=torch.Generator().manual_seed(0))
    expected = leading_factors(weight, lambda s: 4, cache)
    cache.write(weight_key(weight), leading_factors(randn(16, 20), lambda s: 4, None))
    again = leading_factors(weight, lambda s: 4, cache)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_a_thousand_flipped_bytes_are_each_noticed(cache):
    leading_factors(randn(12, 9, generator=torch.Generator().manual_seed(0)), lambda s: 4, cache)
    path = only_entry(cache)
    content, chance = path.read_bytes(), random.Random(0)
    header = range(8 + int.from_bytes(content[:8], "little"))
    places = [*header, *(chance.randrange(len(content)) for _ in range(1000 - len(header)))]
    for place in places:
        path.write_bytes(flipped(content, place, chance.randrange(1, 256)))
        with warns(UserWarning, str(path)):
            assert cache.read(path.stem) is None, f"byte {place} of {len(content)}"
        assert not path.exists()
    path.write_bytes(content)
    assert cache.read(path.stem) is not None


def test_half_of_a_basis_lost_costs_a_decomposition_and_no_accuracy(network, cache):
    again = copy.deepcopy(network)
    cersa.inject_cersa(network, CersaConfig(alpha=0.9), show_progress=False)
    entries = list(cache.folder.glob("*/*.safetensors"))
    for path in entries:
        tensors = load_file(path)
        place = path.read_bytes().index(tensors["U"].numpy().tobytes())
        size = tensors["U"].numel() * 4 // 2
        content = bytearray(path.read_bytes())
        content[place : place + size] = bytes(size)
        path.write_bytes(content)
    with pytest.warns(UserWarning) as caught:
        cersa.inject_cersa(again, CersaConfig(alpha=0.9), show_progress=False)
    assert len(caught) == len(entries) == 3
    assert all(any(str(path) in str(warning.message) for warning in caught) for path in entries)
    for layer in (0, 2, 4):
        assert torch.equal(again[layer].effective_weight(), network[layer].effective_weight())


def test_a_damaged_entry_in_a_read_only_cache_is_not_used(read_only_cache):
    path = only_entry(read_only_cache)
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 100))
    with warns(UserWarning, path.name):
        again = leading_factors(torch.eye(9, 5, device=DEVICE), lambda s: 3, read_only_cache)
    expected = leading_factors(torch.eye(9, 5, device=DEVICE), lambda s: 3, None)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_what_a_killed_writer_left_is_counted_and_removed(cache):
    leading_factors(torch.eye(9, 5, device=DEVICE), lambda s: 3, cache)
    entry = only_entry(cache)
    old, new = entry.with_name(".old.tmp"), entry.with_name(".new.tmp")
    for path in (old, new):
        path.write_bytes(bytes(1000))
    os.utime(old, (1000, 1000))
    info = cache.info()
    assert (info.entries, info.size_bytes) == (1, entry.stat().st_size + 2000)
    cache.trim()
    assert entry.exists() and new.exists() and not old.exists()
    cache.clear()
    assert cache.info().size_bytes == 0 and not new.exists()


def test_the_limit_removes_what_was_unused_for_longest(cache):
    weights = [randn(30, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for age, weight in enumerate(weights):
        leading_factors(weight, len, cache)
        path = cache.folder / weight_key(weight)[:2] / f"{weight_key(weight)}.safetensors"
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.read(weight_key(weights[0])) is not None  # used now, so the second is the oldest
    cache.limit_bytes = cache.info().size_bytes - 1
    cache.trim()
    assert [cache.read(weight_key(weight)) is not None for weight in weights] == [True, False, True]
    cache.clear()
    assert cache.info().entries == 0


def write_often(folder: str, key: str, value: float) -> None:
    cache = DecompositionCache(folder, 2**30)
    for _ in range(100):
        cache.write(key, LeadingFactors(*(torch.full(shape, value) for shape in ((50, 50), (50,), (50, 50), (50,), (50,)))))


def test_two_processes_write_the_same_entry_and_readers_see_whole_ones(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(str(cache.folder), "ab" * 32, value)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        time.sleep(0.001)  # the writers need the processor too
        found = cache.read("ab" * 32)
        if found is not None:
            assert all(tensor.unique().numel() == 1 for tensor in found) and len({float(t.max()) for t in found}) == 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.suffix for path in cache.folder.glob("*/*")] == [".safetensors"]


def decompose_and_note(folder: str, log: str, barrier) -> None:
    solve = cache_module.decompose

    def noted(weight):
        with open(log, "a") as file:
            file.write(f"{weight.shape[1]}\n")
        return solve(weight)

    cache_module.decompose = noted
    cache = DecompositionCache(folder, 2**30)
    barrier.wait()
    for size in range(20, 40):
        leading_factors(torch.eye(40, size, device=DEVICE), lambda s: 4, cache)


def test_two_processes_that_want_the_same_entries_compute_each_once(cache, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, log = context.Barrier(2), tmp_path / "log"
    processes = [context.Process(target=decompose_and_note, args=(str(cache.folder), str(log), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(20, 40))


def hold_for_ever(folder: str, key: str, held) -> None:
    with DecompositionCache(folder, 2**30).claim(key):
        held.set()
        threading.Event().wait()


def test_a_process_that_dies_while_it_computes_holds_nobody_up(cache):
    weight = randn(9, 5)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=hold_for_ever, args=(str(cache.folder), weight_key(weight), held))
    holder.start()
    assert held.wait(60)
    holder.kill()
    assert leading_factors(weight, lambda s: 3, cache).U.shape == (9, 3)


@pytest.fixture
def read_only_cache():
    """A filled cache in a folder that this process may not write."""
    with tempfile.TemporaryDirectory() as folder:
        cache = DecompositionCache(Path(folder) / "cache", 2**30)
        leading_factors(torch.eye(9, 5, device=DEVICE), lambda s: 3, cache)
        only_entry(cache).chmod(0o666)  # for whoever damages it; nobody may add or remove files
        os.chmod(folder, 0o755)
        for path in (cache.folder, *cache.folder.glob("**/*/")):
            path.chmod(0o555)
        privileged = os.geteuid() == 0  # root may write everywhere
        if privileged:
            os.seteuid(65534)
        yield cache
        if privileged:
            os.seteuid(0)
        for path in (cache.folder, *cache.folder.glob("**/*/")):
            path.chmod(0o755)


def test_a_read_only_cache_is_read_and_costs_one_warning(read_only_cache):
    key = weight_key(torch.eye(9, 5, device=DEVICE))
    assert read_only_cache.read(key) is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in (6, 7, 8):
            assert leading_factors(torch.eye(9, size, device=DEVICE), lambda s: 3, read_only_cache).U.shape == (9, 3)
        read_only_cache.limit_bytes = 1
        read_only_cache.trim()
    assert [str(read_only_cache.folder) in str(warning.message) for warning in caught] == [True]
    assert read_only_cache.read(key) is not None


def test_a_cache_that_cannot_even_be_a_folder_does_not_stop_an_injection(network, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path / "file" / "cache"))
    with warns(UserWarning, "CERSA_CACHE", str(tmp_path / "file" / "cache")) as caught:
        cersa.inject_cersa(network, CersaConfig(), show_progress=False)
    assert len(caught) == 1 and isinstance(network[0], cersa.CersaLinear)


def test_entries_follow_the_umask(cache):
    leading_factors(torch.eye(9, 5, device=DEVICE), lambda s: 3, cache)
    (path,) = cache.folder.glob("*/*.safetensors")
    probe = cache.folder / "probe"
    probe.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(probe.stat().st_mode)


def test_off_and_unusable_limits(network, monkeypatch, tmp_path):
    monkeypatch.setenv("CERSA_CACHE", "off")
    assert DecompositionCache.default() is None
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path))
    for limit in ("0", "-1", "nan", "inf", "much"):
        monkeypatch.setenv("CERSA_CACHE_LIMIT", limit)
        with raises(ConfigError, "CERSA_CACHE_LIMIT", repr(limit)):
            cersa.inject_cersa(network, CersaConfig(), show_progress=False)
    assert isinstance(network[0], nn.Linear) and not list(tmp_path.iterdir())
