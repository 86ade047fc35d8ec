"""The decomposition cache: same layers with and without it, robust against damage, races and growth."""

import copy
import multiprocessing
import os

import pytest
import torch
from torch import nn

import cersa_diffusion as cersa
from cersa_diffusion import CersaConfig, ConfigError
from cersa_diffusion.cache import DecompositionCache, leading_factors, weight_key
from cersa_diffusion.functional import Decomposition, decompose


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
    monkeypatch.setattr("cersa_diffusion.cache.decompose", no_solver)
    cersa.inject_cersa(second, CersaConfig(alpha=0.8), show_progress=False)
    cersa.inject_cersa(third, CersaConfig(alpha=0.9), show_progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("CERSA_CACHE", "off")
    cersa.inject_cersa(network, CersaConfig(alpha=0.9), show_progress=False)
    for other in (first, third):
        assert all(torch.equal(buffer, other.get_buffer(name)) for name, buffer in network.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_bases_have_entries_of_their_own(cache, dtype):
    weight = torch.randn(12, 8)
    assert weight_key(weight) != weight_key(weight.to(dtype)) != weight_key(weight.to(dtype).T)
    direct = leading_factors(weight.to(dtype), lambda s: 5, None)
    leading_factors(weight.to(dtype), lambda s: 5, cache)
    cached = leading_factors(weight.to(dtype), lambda s: 5, cache)
    assert all(torch.equal(a, b) for a, b in zip(direct, cached, strict=True))


def test_more_components_than_the_entry_has_are_computed_and_kept(cache):
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    assert leading_factors(weight, lambda s: 4, cache).U.shape == (20, 4)
    assert leading_factors(weight, lambda s: 9, cache).U.shape == (20, 9)
    assert cache.read(weight_key(weight)).Vh.shape == (9, 16) and cache.info().entries == 1


def test_a_damaged_entry_is_replaced(cache):
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    expected = leading_factors(weight, lambda s: 4, cache)
    (path,) = cache.folder.glob("*/*")
    path.write_bytes(path.read_bytes()[:100])
    again = leading_factors(weight, lambda s: 4, cache)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert cache.read(weight_key(weight)) is not None


def test_the_limit_removes_what_was_unused_for_longest(cache):
    weights = [torch.randn(30, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for age, weight in enumerate(weights):
        cache.write(weight_key(weight), decompose(weight))
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
        cache.write(key, Decomposition(torch.full((50, 50), value), torch.full((50,), value), torch.full((50, 50), value)))


def test_two_processes_write_the_same_entry_and_readers_see_whole_ones(cache):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(str(cache.folder), "ab" * 32, value)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = cache.read("ab" * 32)
        if found is not None:
            assert all(tensor.unique().numel() == 1 for tensor in found) and len({float(t.max()) for t in found}) == 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.suffix for path in cache.folder.glob("*/*")] == [".safetensors"]


def test_off_and_unusable_limits(network, monkeypatch, tmp_path):
    monkeypatch.setenv("CERSA_CACHE", "off")
    assert DecompositionCache.default() is None
    monkeypatch.setenv("CERSA_CACHE", str(tmp_path))
    for limit in ("0", "-1", "nan", "inf", "much"):
        monkeypatch.setenv("CERSA_CACHE_LIMIT", limit)
        with pytest.raises(ConfigError, match="CERSA_CACHE_LIMIT"):
            cersa.inject_cersa(network, CersaConfig(), show_progress=False)
    assert isinstance(network[0], nn.Linear) and not list(tmp_path.iterdir())
