"""Decomposing the layers of a model: worker threads, progress, the on-disk cache, and a share for each process.

On the CPU one layer is one worker thread's (LAPACK runs without Python's lock); as long as there are at least as many layers as
threads, and at most `MAX_WORKERS` threads, every solver runs on a single thread and the numbers do not depend on how many there
are. Otherwise, and between machines, they may differ in the last digits of float64, and singular vectors of close values may
turn: the adapter file is made for that (docs/file-format.md). Weights on an accelerator are decomposed there, one at a time.

Several processes share the work through the cache, without talking to each other: each does its own share first, then what is
missing of the others', and the cache's locks see to it that no layer is decomposed twice. So a process that dies holds nobody
up, only one of them may come here at all, and machines with a cache each need not see each other's. With the cache off every
process decomposes everything.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm

from cersa_diffusion.errors import CersaError
from cersa_diffusion.weights.cache import DecompositionCache, LeadingFactors, leading_factors
from cersa_diffusion.weights.stored import StoredWeight, finest_weight

# Bounds the memory: a worker holds a layer's float64 factors, some 200 MB for 5120 x 1280.
MAX_WORKERS = 16


@dataclass(frozen=True)
class LayerJob:
    """One weight to decompose.

    Args:
        name: the layer's name, for progress and errors.
        shape: (m, n).
        load: gives the weight; called in a worker thread, so that a file need not be read ahead of its turn.
        choose_rank: from the whole spectrum (float64, descending) to the number of triplets wanted.
    """

    name: str
    shape: tuple[int, int]
    load: Callable[[], Tensor]
    choose_rank: Callable[[Tensor], int]

    @classmethod
    def of(
        cls, name: str, weight: Tensor, choose_rank: Callable[[Tensor], int], stored: StoredWeight | None = None
    ) -> "LayerJob":
        """The job for a weight that is in memory, and perhaps with more bits in its checkpoint."""
        return cls(name, tuple(weight.shape), lambda: finest_weight(weight, stored), choose_rank)

    @property
    def cost(self) -> int:
        """Floating-point operations, up to a constant."""
        return self.shape[0] * self.shape[1] * min(self.shape)


@contextmanager
def decompose_layers(jobs: Sequence[LayerJob], *, show_progress: bool = True) -> Iterator[Iterator[tuple[str, LeadingFactors]]]:
    """Decomposes layers, each once, through the cache that the environment names.

    A context manager, so that an error or Ctrl-C in the loop over the results ends the work too: layers under way are finished
    (and kept in the cache), the others are not begun.

    Args:
        jobs: the layers.
        show_progress: show a bar with layer names and remaining time, in the first process only.

    Yields:
        An iterator over (name, factors) in the order of the jobs, factors as `leading_factors` gives them. At most one result
        more than there are workers is held for it.

    Raises:
        ConfigError: the cache's settings cannot be used.
        CersaError: a solver gave up on a layer.
    """
    cache, (own, processes) = DecompositionCache.default(), _process()
    divided = cache is not None and processes > 1
    with _workers(len(jobs)) as run, _Progress(jobs, show_progress and own == 0) as progress:
        if divided:
            order = _own_first(jobs, own, processes)
            for job, _ in zip(order, run(partial(_keep, cache=cache), order), strict=True):
                progress.count(job)
        yield _results(jobs, run(partial(_factors, cache=cache), jobs), None if divided else progress)
    if cache:
        cache.trim()


def _results(
    jobs: Sequence[LayerJob], results: Iterator[LeadingFactors], progress: "_Progress | None"
) -> Iterator[tuple[str, LeadingFactors]]:
    for job, result in zip(jobs, results, strict=True):
        if progress:
            progress.count(job)
        yield job.name, result


def shares(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Splits jobs into parts of about equal cost: the dearest first, each to the part that has least so far.

    Args:
        costs: of each job.
        parts: how many.

    Returns:
        The job numbers of each part; every job is in one of them.
    """
    split, loads = [[] for _ in range(parts)], [0] * parts
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        least = loads.index(min(loads))
        split[least].append(job)
        loads[least] += costs[job]
    return split


def _own_first(jobs: Sequence[LayerJob], own: int, processes: int) -> list[LayerJob]:
    # The others' shares from their ends: whoever is done early meets a slower process half-way.
    split = shares([job.cost for job in jobs], processes)
    others = [job for other in range(1, processes) for job in reversed(split[(own + other) % processes])]
    return [jobs[number] for number in split[own] + others]


def _process() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _keep(job: LayerJob, cache: DecompositionCache) -> None:
    """Sees to it that the cache has the layer."""
    _factors(job, cache)


def _factors(job: LayerJob, cache: DecompositionCache | None) -> LeadingFactors:
    try:
        return leading_factors(job.load(), job.choose_rank, cache)
    except torch.linalg.LinAlgError as error:
        raise CersaError(f"layer {job.name} cannot be decomposed ({error}): exclude it") from error


class _Progress:
    """A bar with the name of the layer that was last done and the remaining time."""

    def __init__(self, jobs: Sequence[LayerJob], show: bool):
        self.done, self.layers = 0, len(jobs)
        # By cost, not by layers: the remaining time of a UNet is mostly that of its widest ones.
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
    """Threads, and a function like `map` on them that works only a little ahead of whoever takes its results."""
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
        # The workers' setting reaches BLAS libraries beyond their own threads.
        torch.set_num_threads(threads)
