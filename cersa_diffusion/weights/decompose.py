"""Decomposing the layers of a model: worker threads, progress, the on-disk cache, and a share for each process.

On the CPU each layer is decomposed by one worker thread (LAPACK runs without Python's lock). With at least as many layers as
threads, and at most `MAX_WORKERS` threads, every solver runs on a single thread, and the results do not depend on the number of
threads. Otherwise, and between machines, results may differ in the last digits of float64, and singular vectors of close values
may rotate: the format of the adapter file allows for this (docs/file-format.md). Where there is an accelerator, layers are
decomposed there, one at a time, wherever the model is.

Several processes share the work only through the cache: each process decomposes its own share first, and then the missing layers
of the other shares; the locks of the cache prevent that a layer is decomposed twice. A process that dies does not block the
others, a single process may call this alone, and machines need not share a cache. Without a cache every process decomposes all
layers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm

from cersa_diffusion.errors import CersaError
from cersa_diffusion.weights.cache import DecompositionCache, LeadingFactors, leading_factors
from cersa_diffusion.weights.stored import FinestWeight

# Limits the memory: a worker holds the float64 factors of a layer, about 200 MB for 5120 x 1280.
MAX_WORKERS = 16


@dataclass(frozen=True)
class LayerJob:
    """One weight to decompose.

    Args:
        name: name of the layer, for progress and errors.
        shape: (m, n).
        load: returns the weight; called in a worker thread, so that a file is read only when its turn comes. It should not hold
            the weight of a model: the model could then not drop it while the next layers are decomposed.
        choose_rank: gives the required number of triplets for the whole spectrum (float64, descending).
        build: makes the result from the weight and its factors, in the worker thread; default: the factors are the result.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], FinestWeight]
    choose_rank: Callable[[Tensor], int]
    build: Callable[[FinestWeight, LeadingFactors], Any] = lambda weight, factors: factors

    @property
    def cost(self) -> int:
        """The number of floating-point operations, up to a constant factor."""
        return self.shape[0] * self.shape[1] * min(self.shape)


@contextmanager
def decompose_layers(
    jobs: Sequence[LayerJob], *, device: torch.device | None = None, show_progress: bool = True
) -> Iterator[Iterator[tuple[str, Any]]]:
    """Decomposes layers, each once, with the cache that the environment names.

    The context manager stops the work after an error or Ctrl-C in the loop over the results: layers in progress are finished
    (and kept in the cache), the others are not started.

    Args:
        jobs: the layers.
        device: where to decompose; default: the accelerator, if there is one that has float64, else the CPU.
        show_progress: show a bar with layer names and remaining time, in the first process only.

    Yields:
        An iterator over (name, result of `LayerJob.build`) in the order of the jobs. It holds at most one result more than there
        are workers.

    Raises:
        ConfigError: the settings of the cache cannot be used.
        CersaError: a solver failed on a layer.
    """
    cache, (rank, world_size) = DecompositionCache.default(), _rank_and_world_size()
    device = device or solver_device()
    divided = cache is not None and world_size > 1
    with _workers(len(jobs)) as run, _Progress(jobs, show_progress and rank == 0) as progress:
        if divided:
            ordered = _own_share_first(jobs, rank, world_size)
            for job, _ in zip(ordered, run(partial(_fill_cache, cache=cache, device=device), ordered), strict=True):
                progress.count(job)
        yield _results(jobs, run(partial(_result, cache=cache, device=device), jobs), None if divided else progress)
    if cache:
        cache.trim()


def solver_device() -> torch.device:
    """The accelerator, if there is one that has float64 (Apple's has not), else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def _results(jobs: Sequence[LayerJob], results: Iterator[Any], progress: "_Progress | None") -> Iterator[tuple[str, Any]]:
    for job, result in zip(jobs, results, strict=True):
        if progress:
            progress.count(job)
        yield job.name, result


def shares(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The job indices of `parts` parts of about equal cost: each job, from the most expensive on, goes to the cheapest part."""
    job_indices, loads = [[] for _ in range(parts)], [0] * parts
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        cheapest = loads.index(min(loads))
        job_indices[cheapest].append(job)
        loads[cheapest] += costs[job]
    return job_indices


def _own_share_first(jobs: Sequence[LayerJob], rank: int, world_size: int) -> list[LayerJob]:
    # The other shares are reversed: a process that finishes early works from their ends towards the slower processes.
    job_indices = shares([job.cost for job in jobs], world_size)
    others = [job for distance in range(1, world_size) for job in reversed(job_indices[(rank + distance) % world_size])]
    return [jobs[index] for index in job_indices[rank] + others]


def _rank_and_world_size() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _fill_cache(job: LayerJob, cache: DecompositionCache, device: torch.device) -> None:
    """Decomposes a layer into the cache; it returns nothing, so that the factors do not stay in memory."""
    _factors(job, job.load().tensor, cache, device)


def _result(job: LayerJob, cache: DecompositionCache | None, device: torch.device) -> Any:
    weight = job.load()
    return job.build(weight, _factors(job, weight.tensor, cache, device))


def _factors(job: LayerJob, weight: Tensor, cache: DecompositionCache | None, device: torch.device) -> LeadingFactors:
    try:
        return leading_factors(weight, job.choose_rank, cache, device)
    except torch.linalg.LinAlgError as error:
        raise CersaError(f"layer {job.name} cannot be decomposed ({error}): exclude it") from error


class _Progress:
    """A bar with the name of the layer that was finished last and the remaining time."""

    def __init__(self, jobs: Sequence[LayerJob], show: bool):
        self.done, self.layers = 0, len(jobs)
        # The bar counts cost instead of layers: the widest layers of a UNet take most of the time.
        layout = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}"
        self.bar = tqdm(total=sum(job.cost for job in jobs), desc="decomposing", bar_format=layout, disable=not show)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def count(self, job: LayerJob) -> None:
        self.done += 1
        self.bar.set_description_str(f"decomposed {self.done}/{self.layers} {job.name[-40:]}", refresh=False)
        self.bar.update(job.cost)


@contextmanager
def _workers(jobs: int) -> Iterator[Callable]:
    """Yields a function like `map` that runs on worker threads and computes only a few results ahead of their use."""
    threads = torch.get_num_threads()
    count = max(1, min(threads, jobs, MAX_WORKERS))
    pool = ThreadPoolExecutor(count, "cersa-decompose", torch.set_num_threads, (threads // count,))

    def run(function: Callable, items: Iterable) -> Iterator:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)
        # The workers change the thread count of BLAS libraries for all threads, so it is set back here.
        torch.set_num_threads(threads)
