"""Peak memory by the phases of a run: what preparing the models takes says nothing about the steps."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

PREPARING, TRAINING, DRAWING = "preparing", "training", "drawing"


class PeakMemory:
    """Measures the peak of each phase in bytes: on a GPU the most that was allocated, on a CPU the most that this process held.

    Where a system has no way to forget the peak of a process (macOS, Windows), a phase has the peak of all phases so far.

    Args:
        device: that the run computes on. The first phase is `PREPARING`.

    Attributes:
        at_start: bytes that were in use when the first phase began: on a CPU, what Python and its libraries hold.
    """

    def __init__(self, device: torch.device):
        self.device, self.phase = device, PREPARING
        self.at_start = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        self._peaks: dict[str, int] = {}
        _forget_peak(device)

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another, or continues one that was entered before."""
        self._peaks[self.phase] = self.of(self.phase)
        self.phase = phase
        _forget_peak(self.device)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase for the time of a block; the current phase continues afterwards."""
        outer = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def of(self, phase: str) -> int | None:
        """The peak of a phase so far in bytes, None for a phase that never began."""
        peak = self._peaks.get(phase)
        return max(peak or 0, _peak(self.device)) if phase == self.phase else peak


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # getrusage would also count the memory that the parent process held when it started this one.
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # Imported here: Windows has no such module.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # Some containers forbid it; the peak then is that of all phases so far.
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
