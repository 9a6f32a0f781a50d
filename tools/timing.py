"""How long a call takes, and how much GPU memory it needs at its peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call (compilation included), the median of the later ones, their peak bytes on a GPU."""

    first_s: float
    median_s: float
    peak_bytes: int | None


def synchronize(device: torch.device) -> None:
    """Wait for the device's kernels; on a CPU there are none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """Wall time of one call and its kernels."""
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(run: Run, device: torch.device, repeats: int) -> Timing:
    """Call `run` once, once more unmeasured (what is prepared then counts in neither), then `repeats` times."""
    on_gpu = device.type == "cuda"
    first = seconds(run, device)
    seconds(run, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    median = statistics.median(seconds(run, device) for _ in range(repeats))
    return Timing(first, median, torch.cuda.max_memory_allocated(device) if on_gpu else None)
