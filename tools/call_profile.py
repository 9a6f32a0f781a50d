"""Where one call spends its time: its kernels, and what the CPU needs to launch them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pvae.tools.timing import Run, seconds, synchronize


@dataclass(frozen=True)
class CallProfile:
    """Where one call spends its time.

    `host_ms` is until the call returns, its kernels queued and not waited for; `launch_ms` what the `launches` of kernels
    take of it, under the profiler (None on a CPU). `span_ms` is from the first kernel's start to the last one's end.
    `kernels` are (ms, count, name) by falling time: kernels and copies on a GPU (a collective's includes waiting for the
    other ranks), ops with what they do themselves on a CPU.
    """

    host_ms: float
    launches: int | None
    launch_ms: float | None
    span_ms: float | None
    kernels: tuple[tuple[float, int, str], ...]

    def lines(self, top: int) -> list[str]:
        """As text, with the `top` kernels."""
        total, count = sum(k[0] for k in self.kernels), sum(k[1] for k in self.kernels)
        head = f"returns after {self.host_ms:.2f} ms; {count} kernels take {total:.2f} ms"
        if self.launches is not None:
            head += f" within {self.span_ms:.2f} ms; {self.launches} launches take {self.launch_ms:.2f} ms of the CPU"
        return [head, *(f"{ms:9.3f} ms {n:5d} x {name[:100]}" for ms, n, name in self.kernels[:top])]


def profile_call(run: Run, device: torch.device) -> CallProfile:
    """Profile one call of `run`, which must be warm: it is called three times."""
    on_gpu = device.type == "cuda"
    seconds(run, device)
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        seconds(run, device)
    events = profiler.key_averages()
    if not on_gpu:
        kernels = [(e.self_cpu_time_total / 1e3, e.count, e.key) for e in events]
        return CallProfile(host * 1e3, None, None, None, tuple(sorted(kernels, reverse=True)))
    kernels = [
        (e.self_device_time_total / 1e3, e.count, e.key)
        for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation and e.self_device_time_total > 0
    ]
    ranges = [e.time_range for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    launches = [e for e in events if e.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))]
    return CallProfile(
        host * 1e3,
        sum(e.count for e in launches),
        sum(e.self_cpu_time_total for e in launches) / 1e3,
        (max(r.end for r in ranges) - min(r.start for r in ranges)) / 1e3,
        tuple(sorted(kernels, reverse=True)),
    )
