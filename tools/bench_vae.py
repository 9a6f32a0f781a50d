"""Decode or encode by eager, Inductor and pvae, side by side in one process: time, peak memory, error against float64.

    python -m pvae.tools.bench_vae wan2.1 qwen-image [--rows eager,inductor,pvae] [--profile]

Rivals: eager; eager with channels-last weights; Inductor with channels-last weights, `dynamic=False` and a raised
recompile limit (the best that a user gets from torch alone). Each row is measured after two warm-up calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pvae
from pvae.testing import relative_error
from pvae.tools.zoo import Case, load


def channels_last_weights(model: nn.Module) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.data = module.weight.data.to(memory_format=formats[module.weight.dim()])


def _regions(case: Case) -> list[nn.Module]:
    return [case.model.get_submodule(name) if name else case.model for name in case.regions]


def eager(case: Case) -> None:
    """As it comes."""


def eager_channels_last(case: Case) -> None:
    channels_last_weights(case.model)


def inductor(case: Case) -> None:
    channels_last_weights(case.model)
    for region in _regions(case):
        region.compile(dynamic=False)


def pvae_compile(case: Case, **options: Any) -> None:
    pvae.compile(case.model, **options)


def pvae_dynamo(case: Case) -> None:
    for region in _regions(case):
        region.compile(backend="pvae", dynamic=False)


ROWS: dict[str, Callable[[Case], None]] = {
    "eager": eager,
    "eager-channels-last": eager_channels_last,
    "inductor": inductor,
    "pvae": pvae_compile,
    "pvae-frozen": lambda case: pvae_compile(case, weights="frozen"),
    "pvae-native": lambda case: pvae_compile(case, conv3d="channels_last"),
    "pvae-unfold": lambda case: pvae_compile(case, conv3d="unfold2d"),
    "pvae-dynamo": pvae_dynamo,
}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(case: Case, device: str, runs: int) -> dict[str, float]:
    """First call in seconds, median of `runs` in ms, peak memory in GiB (CUDA)."""
    start = time.perf_counter()
    case.run()
    _synchronize(device)
    first = time.perf_counter() - start
    case.run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(runs):
        _synchronize(device)
        start = time.perf_counter()
        case.run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan")
    return {"first_s": first, "ms": statistics.median(times) * 1e3, "peak_gib": peak}


def kernels(case: Case, top: int = 14) -> list[str]:
    """The kernels that take the most time in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        case.run()
        torch.cuda.synchronize()
    rows = [(e.self_device_time_total / 1e3, e.count, e.key) for e in prof.key_averages()]
    rows = sorted((r for r in rows if r[0] > 0), reverse=True)
    total = sum(r[0] for r in rows)
    return [f"all kernels {total:.1f} ms"] + [f"{ms:8.2f} ms {count:5d} x {key[:110]}" for ms, count, key in rows[:top]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--part", default="decode")
    parser.add_argument("--preset", default="full")
    parser.add_argument("--size", default="", help="pixels, frames x height x width, instead of the preset's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="eager,inductor,pvae", help=", ".join(ROWS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--error-size", default="", help="also compare with float64 at this size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)
    results: list[dict[str, Any]] = []
    for name in args.models:
        for row in args.rows.split(","):
            torch._dynamo.reset()
            pvae.reset()

            def build(size: str = args.size, name: str = name) -> Case:
                pixels = tuple(map(int, size.split("x"))) if size else None
                dtype = getattr(torch, args.dtype)
                return load(name, preset=args.preset, part=args.part, dtype=dtype, device=args.device, size=pixels)

            case = build()
            ROWS[row](case)
            found: dict[str, Any] = {"model": name, "row": row, **measure(case, args.device, args.runs)}
            line = f"{name:18s} {row:20s} {found['ms']:9.2f} ms  peak {found['peak_gib']:6.2f} GiB"
            line += f"  first {found['first_s']:6.1f} s"
            if args.profile and args.device.startswith("cuda"):
                found["kernels"] = kernels(case)
            if args.error_size:
                small = build(args.error_size)
                reference = small.cast(torch.float64).run()
                ROWS[row](small)
                found["error"] = relative_error(small.run(), reference)
                line += f"  error against float64 {found['error']:.2e}"
                del small, reference
            print(line, flush=True)
            for text in found.get("kernels", []):
                print("   ", text, flush=True)
            results.append(found)
            del case
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
