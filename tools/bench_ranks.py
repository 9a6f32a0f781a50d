"""What the benches over several ranks share: the world, rows that fail on all ranks together, figures and errors."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import pvae
from pvae.testing import relative_error
from pvae.tools.model_run import RequestError, dtype_name, dtype_named, one_of
from pvae.tools.zoo import Case

T = TypeVar("T")


class RowError(RuntimeError):
    """A row cannot run, on one rank at least; the message says why."""


@dataclass(frozen=True)
class World:
    """This process among the ranks. `control` is a CPU group, on which ranks tell each other what went wrong."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    def gather(self, value: T) -> list[T]:
        """Each rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def attempt(self, do: Callable[[], T]) -> T:
        """`do()`, or on every rank RowError where it raised on any: so all go on with the next row together."""
        try:
            result, failure = do(), None
        except Exception as error:  # told to all ranks and raised below
            expected = isinstance(error, RowError)
            said = str(error) if expected else f"{type(error).__name__}: {error}"
            failure = said, "" if expected else traceback.format_exc()
        failures = {rank: found for rank, found in enumerate(self.gather(failure)) if found is not None}
        if not failures:
            return result
        rank, (said, trace) = next(iter(failures.items()))
        if self.rank == 0 and trace:
            print(trace, file=sys.stderr, flush=True)
        raise RowError(said if len(failures) == self.size else f"on rank {rank}: {said}")


def add_arguments(parser: argparse.ArgumentParser, unit: str, runs: int) -> None:
    """What the benches over ranks take alike; `unit` is that of sizes."""
    parser.add_argument("--preset", default="full")
    parser.add_argument("--size", default="", help=f"{unit}, frames x height x width, instead of the preset's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: GPUs if there are any")
    parser.add_argument("--runs", type=int, default=runs, help="calls of each row")
    parser.add_argument("--error-size", default="", help=f"also compare with float64 at this size, in {unit}")
    parser.add_argument(
        "-o", "--option", action="append", default=[], help="KEY=VALUE of pvae's rows, such as mesh=2x2"
    )
    parser.add_argument("--json", type=Path)


def started(args: argparse.Namespace, rows: Sequence[str], bench: str) -> list[str]:
    """The rows that the command asks for. RequestError where it was not started by torchrun, or asks for nothing."""
    if not dist.is_torchelastic_launched():
        raise RequestError(f"start it with torchrun --nproc_per_node N -m pvae.tools.{bench} ...")
    if args.runs < 1:
        raise RequestError(f"--runs {args.runs} measures nothing")
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)
    return [one_of("--rows", row, tuple(rows)) for row in args.rows.split(",")]


def write_json(args: argparse.Namespace, world: World, options: Mapping[str, Any], **more: Any) -> None:
    """What was measured, with what, and the results in `more`; to the file of `--json`."""
    about = {
        "model": args.model,
        "preset": args.preset,
        "size": args.size,
        "error_size": args.error_size,
        "dtype": dtype_name(dtype_named(args.dtype)),
        "world": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "options": options,
    }
    args.json.write_text(json.dumps({**about, **more}, indent=1))


@contextmanager
def joined(on_gpu: bool, timeout: timedelta) -> Iterator[World]:
    """The world that torchrun started, one GPU a rank or on CPUs. Raises RequestError if there are too few GPUs."""
    device = torch.device("cpu")
    if on_gpu:
        local = dist.get_node_local_rank()
        if local >= torch.cuda.device_count():
            raise RequestError(f"local rank {local} has no GPU: torch sees {torch.cuda.device_count()} here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        yield World(dist.get_rank(), dist.get_world_size(), device, control)
        dist.barrier(group=control)
    finally:
        pvae.reset()  # CUDA graphs hold communicators
        dist.destroy_process_group()


@dataclass(frozen=True)
class Figures:
    """A row's figures, over all ranks: the slowest time, the highest peak, the worst error; or why there are none.

    `spread` is how far the medians of the rounds lie apart, as a part of `ms`. `form` is what `pvae` compiled with, or to.
    `peak_gib` is None on CPUs, the errors without `--error-size`, `ratio` where the first row failed.
    """

    row: str
    ms: float | None = None
    ratio: float | None = None
    first_s: float | None = None
    peak_gib: float | None = None
    error: float | None = None
    eager_error: float | None = None
    form: Mapping[str, Any] | None = None
    failed: str = ""
    spread: float | None = None

    def __str__(self) -> str:
        name = f"{self.row:20s}"
        if self.failed:
            return f"{name} failed: {self.failed}"
        text = f"{name} {self.ms:9.2f} ms"
        text += f" (+-{50 * self.spread:4.1f} %)" if self.spread is not None else ""
        text += f" {self.ratio:6.2f}x" if self.ratio is not None else " " * 8
        text += f"  peak {self.peak_gib:6.2f} GiB" if self.peak_gib is not None else ""
        text += f"  first {self.first_s:6.1f} s"
        if self.error is not None:
            text += f"  error {self.error:.2e} (eager {self.eager_error:.2e})"
        if self.row == "auto" and self.form:
            text += "  chose " + " ".join(f"{key}={value}" for key, value in self.form.items())
        return text


class Comparison:
    """Errors against float64 of one small case, compiled by one row after another; each rank computes the reference."""

    def __init__(self, world: World, load: Callable[[], Case]) -> None:
        self.world, self.load = world, load
        case = load()
        self.reference = case.cast(torch.float64).run().cpu()
        self.eager_error = self._error(case)

    def error(self, install: Callable[[Case], None]) -> float:
        """The worst rank's; RowError where a rank cannot run it."""
        case = self.load()
        self.world.attempt(lambda: install(case))
        return self._error(case)

    def _error(self, case: Case) -> float:
        errors = self.world.gather(self.world.attempt(lambda: relative_error(case.run().cpu(), self.reference)))
        return max(errors, key=lambda e: (e != e, e))  # NaN is the worst
