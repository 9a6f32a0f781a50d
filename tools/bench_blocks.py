"""Blocks of diffusion transformers at their published sizes by eager, Inductor and pvae, side by side in one process.

    python -m pvae.tools.bench_blocks wan2.1-dit qwen-image-dit flux-dit [--rows eager,inductor,max,pvae,pvae-max]

The model (zoo preset `full`: published widths, few blocks) runs once in eager mode; each kind of repeated block keeps the
inputs it got there and is then compiled alone. `max` is Inductor's max-autotune without CUDA graphs; `pvae-max` is pvae
with the same settings of Inductor. All rows of a block are compiled first and then measured round after round, in another
order each round and each after as many warm-up calls of its own, because these blocks run at the power limit, where a row
inherits the clock of the one before it. Times are medians over the rounds, by CUDA events, per call. `light` is the time
of all kernels that are neither matrix products nor attention (by the profiler): what a fusion can change.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pvae
from pvae.module import regions
from pvae.testing import relative_error
from pvae.tools.zoo import Case, load

Call = Callable[[], Any]
HEAVY = re.compile(r"gemm|nvjet|cutlass|xmma|flash|fmha|cudnn|_mm|triton_tem|sdpa", re.IGNORECASE)
MAX = "max-autotune-no-cudagraphs"


def _pvae(block: nn.Module, settings: dict[str, Any], **options: str) -> Callable[..., Any]:
    pvae.compile(block, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._inductor.config.patch(settings):  # what was compiled with them is found with them
            return block(*args, **kwargs)

    return call if settings else block


ROWS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda block: block,
    "inductor": lambda block: torch.compile(block, dynamic=False),
    "max": lambda block: torch.compile(block, dynamic=False, mode=MAX),
    "pvae": lambda block: _pvae(block, {}),
    "pvae-off": lambda block: _pvae(block, {}, modulation="off"),
    "pvae-on": lambda block: _pvae(block, {}, modulation="on"),
    "pvae-max": lambda block: _pvae(block, torch._inductor.list_mode_options(MAX)),
}


def blocks(case: Case) -> Iterator[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The first block of each kind, with the inputs that it gets when the model runs."""
    seen: dict[type, tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for name, module in regions(case.model).items():
        if name and type(module) not in {type(case.model.get_submodule(n)) for n, *_ in seen.values()}:

            def keep(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                seen.setdefault(type(m), (name, m, args, kwargs))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    case.run()
    for handle in handles:
        handle.remove()
    yield from seen.values()


def milliseconds(call: Call, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def light(call: Call, calls: int = 5) -> float:
    """Milliseconds a call in kernels that are neither matrix products nor attention."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in prof.key_averages() if not HEAVY.search(e.key)]
    return sum(e.self_device_time_total for e in kernels) / 1e3 / calls


def measure(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Of each row: milliseconds a call and in light kernels, seconds of the first call, peak GiB."""
    found: dict[str, dict[str, float]] = {}
    calls: dict[str, Call] = {}
    for row in rows:
        compiled = ROWS[row](copy.deepcopy(block))
        calls[row] = lambda compiled=compiled: compiled(*args, **kwargs)  # type: ignore[misc]
        begin = time.perf_counter()
        calls[row]()
        torch.cuda.synchronize()
        found[row] = {"first_s": time.perf_counter() - begin}
        calls[row]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        calls[row]()
        torch.cuda.synchronize()
        found[row]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found[row]["light_ms"] = light(calls[row])
    once = max(milliseconds(call, 1) for call in calls.values())
    repeat = max(1, round(30 / once))
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row in random.sample(rows, len(rows)):
            milliseconds(calls[row], repeat)
            times[row].append(milliseconds(calls[row], repeat))
    for row in rows:
        found[row]["ms"] = statistics.median(times[row])
        found[row]["spread"] = (max(times[row]) - min(times[row])) / found[row]["ms"]
    return found


def errors(name: str, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the whole model against float64 at a small size: eager's and pvae's."""
    case = load(name, preset="full", dtype=dtype, device="cuda", size=size, part="forward")
    reference = case.cast(torch.float64).run()
    found = {"eager": relative_error(case.run(), reference)}
    pvae.compile(case.model)
    return {**found, "pvae": relative_error(case.run(), reference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rows", default="eager,inductor,max,pvae,pvae-max", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", default="", help="in latents, instead of the published one")
    parser.add_argument("--error-size", default="", help="also compare the whole model with float64 at this size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = args.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; they are {', '.join(ROWS)}")
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # the copies of a block share their code
    dtype = getattr(torch, args.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}", flush=True)
    results: list[dict[str, Any]] = []
    for name in args.models:
        size = tuple(map(int, args.size.split("x"))) if args.size else None
        case = load(name, preset="full", dtype=dtype, device="cuda", size=size, part="forward")
        for path, block, inputs, kwargs in blocks(case):
            found = measure(block, inputs, kwargs, rows, args.rounds)
            kind = type(block).__name__
            for row, figures in found.items():
                ratio = "".join(
                    f"  {found[r]['ms'] / figures['ms']:5.3f}x {r}" for r in ("inductor", "max") if r in found
                )
                print(
                    f"{name:18s} {kind:32s} {row:9s} {figures['ms']:8.3f} ms (+-{50 * figures['spread']:.1f} %)  "
                    f"light {figures['light_ms']:7.3f} ms  peak {figures['peak_gib']:6.2f} GiB  "
                    f"first {figures['first_s']:5.1f} s{ratio}",
                    flush=True,
                )
            results.append({"model": name, "block": kind, "path": path, "rows": found})
        if args.error_size:
            del case
            torch.cuda.empty_cache()
            found_errors = errors(name, tuple(map(int, args.error_size.split("x"))), dtype)
            print(f"{name:18s} error against float64: {found_errors}", flush=True)
            results[-1]["errors"] = found_errors
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
