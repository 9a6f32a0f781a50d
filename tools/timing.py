"""How long a call takes, and how much GPU memory it needs at its peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call (compilation included), the median of the later ones, their peak bytes on a GPU."""

    first_s: float
    median_s: float
    peak_bytes: int | None


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """Call `run` once, once more unmeasured (what is prepared then counts in neither), then `repeats` times."""
    on_gpu = device.type == "cuda"

    def seconds() -> float:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = seconds()
    seconds()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    median = statistics.median(seconds() for _ in range(repeats))
    return Timing(first, median, torch.cuda.max_memory_allocated(device) if on_gpu else None)
