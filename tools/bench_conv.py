"""`pvae::conv_taps` beside cuDNN and the temporal unfold, convolution by convolution: `python -m pvae.tools.bench_conv`.

The shapes are seven of `docs/measurements.md` and others of the zoo's full models; `--collect MODEL` lists any model's by
their share of its arithmetic. Every form gets its input as it likes it and its weight laid out for it. cuDNN's is the
fastest of contiguous and channels-last, with the zeros around the picture in the buffer already or asked of cuDNN, as 3-D
convolution or, where kernels are one frame deep, as 2-D on frames; and it leaves out the bias, which `conv_taps` adds. The
frames of a causal cache lie before x for all but `conv_taps`, which reads them from a tensor of their own.

Times are of CUDA graphs of several calls, replayed in another order each round (this hardware runs at its power limit), and
medians over rounds. The share is of the rate of an 8192^3 matrix product taken in the same rounds. Errors are relative (L2)
against float64 over two opposite corners of the last two frames.

    --tuned            also the fastest of `candidate_configs`, each tried
    --store FILE       add the times to a tuning store, as `pvae tune` does; `passes/conv_table_h200.json` was made so
    --shapes TEXT      CHANNELS-OUT:KERNEL:SIZE[:sSTRIDE][:nBATCH] with commas between, such as 96-96:3x3x3:4x480x832; the
                       size is the result's
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.kernels import conv3d_unfold, conv_taps
from pvae.kernels.channels_last import FORMATS
from pvae.options import parse_options
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.conv_problem import precision
from pvae.passes.tuning_store import DeviceTable, merge
from pvae.testing import relative_error
from pvae.tools.conv_shapes import MEASURED, Shape, collect, shapes_named, shares
from pvae.tools.conv_table import figures
from pvae.tools.conv_trial import copy_rate
from pvae.tools.model_run import Request, RequestError, dtype_name, dtype_named
from pvae.tools.timing import seconds

CORNER = 48  # rows and columns of each window in which errors are taken
REPLAY_MS = 3.0  # what a CUDA graph is filled to with calls of one form

# Forms -----------------------------------------------------------------------------------------------------------------

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """The tensors of a shape. `padded` is all that the kernel reads, frames and zeros; `inner` what of it is not zeros."""

    shape: Shape
    padded: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=dtype, device=device, generator=generator)

        reads = [s * (n - 1) + k for k, s, n in zip(shape.kernel, shape.stride, shape.size, strict=True)]
        padded = drawn(shape.batch, shape.channels, *reads).contiguous(memory_format=FORMATS[len(reads) + 2])
        for dim, (front, back) in zip((-2, -1), shape.borders(), strict=True):
            padded.narrow(dim, 0, front).zero_()
            padded.narrow(dim, reads[dim] - back, back).zero_()
        taps = shape.channels * math.prod(shape.kernel)
        weight = drawn(shape.out_channels, shape.channels, *shape.kernel) / math.sqrt(taps)
        return cls(shape, padded, weight, drawn(shape.out_channels))

    @property
    def inner(self) -> Tensor:
        (top, bottom), (left, right) = self.shape.borders()
        height, width = self.padded.shape[-2:]
        return self.padded[..., top : height - bottom, left : width - right]

    def widths(self) -> list[int]:
        """The op's `padding`."""
        time = [0, 0] if len(self.shape.kernel) == 3 else []
        return time + [n for pair in self.shape.borders() for n in pair]

    def windows(self) -> list[list[slice]]:
        """Two corners of the result: of the last two frames the first and the last rows and columns."""
        frames = [slice(max(0, self.shape.size[0] - 2), None)] if len(self.shape.size) == 3 else []
        corner = [min(CORNER, n) for n in self.shape.size[-2:]]
        return [[*frames, *(slice(0, n) for n in corner)], [*frames, *(slice(-n, None) for n in corner)]]

    def exact(self) -> list[Tensor]:
        """Those windows without the bias, in float64."""
        return [self._exact(window) for window in self.windows()]

    def _exact(self, window: Sequence[slice]) -> Tensor:
        x, shape = self.padded[:1], self.shape
        for i, part in enumerate(window):
            start, stop, _ = part.indices(shape.size[i])
            x = x.narrow(2 + i, start * shape.stride[i], (stop - start - 1) * shape.stride[i] + shape.kernel[i])
        return _convolve(x.double(), self.weight.double(), shape.stride)

    def error(self, result: Tensor, exact: Sequence[Tensor], bias: bool) -> float:
        """Relative to `exact`, plus the bias where the form added it."""
        added = self.bias.double().view(-1, *[1] * len(self.shape.size)) if bias else 0.0
        got = [result[(slice(0, 1), slice(None), *window)] for window in self.windows()]
        return relative_error(torch.cat([g.flatten() for g in got]), torch.cat([(e + added).flatten() for e in exact]))


def _convolve(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Any = 0) -> Tensor:
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, None, tuple(stride), padding)


def native_forms(problem: Problem) -> Iterator[tuple[str, Call]]:
    """cuDNN's (on a CPU oneDNN's), each in its layout."""
    shape, last = problem.shape, FORMATS[problem.padded.dim()]
    borders = shape.borders()
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", last)):
        weight = problem.weight.contiguous(memory_format=memory_format)
        padded = problem.padded.contiguous(memory_format=memory_format)
        yield f"{layout} padded", partial(_convolve, padded, weight, shape.stride)
        if any(front for front, _ in borders) and all(front == back for front, back in borders):
            inner = problem.inner.contiguous(memory_format=memory_format)
            pads = (*[0] * (len(shape.kernel) - 2), *(front for front, _ in borders))
            yield layout, partial(_convolve, inner, weight, shape.stride, pads)
    if len(shape.kernel) == 3 and shape.kernel[0] == 1 and shape.stride[0] == 1:
        frames = problem.padded.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        flat = problem.weight[:, :, 0].contiguous(memory_format=torch.channels_last)

        def frame_by_frame() -> Tensor:
            y = _convolve(frames, flat, shape.stride[1:])
            return y.unflatten(0, (shape.batch, shape.size[0])).transpose(1, 2)

        yield "frames padded", frame_by_frame


def unfold_forms(problem: Problem) -> Iterator[tuple[str, Call]]:
    """The temporal unfold, where there is time to unfold."""
    shape = problem.shape
    if len(shape.kernel) == 2 or shape.kernel[0] == 1:
        return
    for layout in ("contiguous", "channels_last"):
        last = layout == "channels_last"
        x = problem.inner.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        flat = conv3d_unfold.unfold_weight(problem.weight, 1)
        weight = flat.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        arguments = (shape.kernel[0], list(shape.stride), problem.widths(), [1, 1, 1], 1, last)
        yield layout, partial(conv3d_unfold.OP, x, weight, None, *arguments)


def taps_form(problem: Problem) -> Callable[[Sequence[int]], Tensor]:
    """`conv_taps` as a function of its config."""
    shape, inner = problem.shape, problem.inner
    memory_format = FORMATS[inner.dim()]
    cached = shape.cached_frames()
    before = inner[:, :, :cached].contiguous(memory_format=memory_format) if cached else None
    x = (inner[:, :, cached:] if cached else inner).contiguous(memory_format=memory_format)
    weight, ones = problem.weight.contiguous(memory_format=memory_format), [1] * len(shape.kernel)
    settings = (list(shape.stride), problem.widths(), ones, False, "none")
    return lambda config: conv_taps.OP(x, before, weight, problem.bias, None, *settings, list(config))


def configs(shape: Shape, dtype: torch.dtype) -> Iterator[conv_taps.Config]:
    height, width = shape.size[-2:]
    return conv_taps.candidate_configs(shape.channels, shape.out_channels, height, width, dtype)


# Measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """Several calls of one form, as one CUDA graph where there is a GPU."""

    run: Callable[[], object]
    calls: int
    device: torch.device

    @classmethod
    def of(cls, call: Call, device: torch.device, pool: Any) -> Replay:
        """`pool` is the memory of graphs whose results nobody reads (`graph_pool`)."""
        if device.type != "cuda":
            call()
            return cls(call, 1, device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # cuDNN and Triton choose and compile before the capture
            call()
            stream.synchronize()
            once = seconds(call, device) * 1e3
        graph = torch.cuda.CUDAGraph()
        calls = max(1, min(50, round(REPLAY_MS / once)))
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(calls):
                call()
        graph.replay()
        return cls(graph.replay, calls, device)

    def ms(self) -> float:
        """Milliseconds of one call."""
        if self.device.type != "cuda":
            return seconds(self.run, self.device) * 1e3 / self.calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def graph_pool(device: torch.device) -> Any:
    """Memory that the graphs of one shape share: a hundred candidates' results side by side would not fit."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def in_turn(replays: Mapping[str, Replay], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, over rounds in which each runs once."""
    order, times = random.Random(0), {name: list[float]() for name in replays}
    for _ in range(rounds):
        for name in order.sample(list(replays), len(replays)):
            times[name].append(replays[name].ms())
    return {name: statistics.median(found) for name, found in times.items()}


@dataclass
class Row:
    """One shape: milliseconds of every form tried, which native and unfold forms were fastest, errors of those."""

    shape: str
    tflop: float
    ms: dict[str, float]
    native: str
    unfold: str
    error: dict[str, float]
    matrix_tflops: float
    tuned_config: list[int] = field(default_factory=list)
    note: str = ""

    def rate(self, name: str) -> float:
        """TFLOP/s."""
        return self.tflop / self.ms[name] * 1e3

    @property
    def ours(self) -> str:
        """The faster of the rule's config and the tuned one."""
        return min((n for n in ("taps", "tuned") if n in self.ms), key=self.ms.__getitem__)

    @property
    def ratio(self) -> float:
        return self.ms[self.native] / self.ms[self.ours]

    @property
    def share(self) -> float:
        return self.rate(self.ours) / self.matrix_tflops

    def __str__(self) -> str:
        unfold = f"{self.ms[self.unfold]:8.3f} {self.rate(self.unfold):4.0f}" if self.unfold else f"{'-':>13s}"
        tuned = f"{self.ms['tuned']:8.3f} {self.rate('tuned'):4.0f}" if "tuned" in self.ms else f"{'-':>13s}"
        return (
            f"{self.shape:32s} {self.ms[self.native]:8.3f} {self.rate(self.native):4.0f} {unfold} "
            f"{self.ms['taps']:8.3f} {self.rate('taps'):4.0f} {tuned} {self.ratio:6.2f}x {100 * self.share:4.0f}%"
            f"  {self.error['taps']:.2e} {self.error['native']:.2e}  {self.native.removeprefix('native ')}"
            + (f"  {self.tuned_config}" if self.tuned_config else "")
            + (f"  ({self.note})" if self.note else "")
        )


HEAD = (
    f"{'shape':32s} {'native':>8s} TF/s {'unfold':>8s} TF/s {'taps':>8s} TF/s {'tuned':>8s} TF/s   ratio share"
    "  error    native's  native form"
)


def matrix_call(n: int, dtype: torch.dtype, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return lambda: a @ b


def _first_call(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    taps_form(Problem.of(shape, dtype, device))([])


def compiled(calls: Sequence[Callable[[], object]]) -> list[Exception | None]:
    """Call each once, many at a time: a call of a new kernel is a compilation. What it raised, of each."""

    def attempt(call: Callable[[], object]) -> Exception | None:
        try:
            call()
        except Exception as error:  # said by who asked: a config that does not fit is not a candidate
            return error
        return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(attempt, calls))


def tune(problem: Problem, rounds: int) -> tuple[list[int], str]:
    """The fastest config of all candidates, and what is to be said of those that could not run."""
    device, form = problem.padded.device, taps_form(problem)
    numbers = [config.numbers() for config in configs(problem.shape, problem.padded.dtype)]
    failures = compiled([partial(form, c) for c in numbers])
    able = {str(c): c for c, failure in zip(numbers, failures, strict=True) if failure is None}
    if not able:
        raise failures[0] or RuntimeError(f"{problem.shape}: there is no candidate")
    pool = graph_pool(device)
    found = in_turn({name: Replay.of(partial(form, c), device, pool) for name, c in able.items()}, rounds)
    refused = [f"{type(f).__name__}" for f in failures if f is not None]
    note = f"{len(refused)} of {len(numbers)} candidates failed: {', '.join(sorted(set(refused)))}" if refused else ""
    return able[min(found, key=found.__getitem__)], note


@torch.no_grad()
def measure(shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int, tuned: bool, matrix: int) -> Row:
    """All forms of one shape in the same rounds as a matrix product of `matrix`^3."""
    problem = Problem.of(shape, dtype, device)
    form = taps_form(problem)
    calls: dict[str, Call] = {f"native {name}": call for name, call in native_forms(problem)}
    calls |= {f"unfold {name}": call for name, call in unfold_forms(problem)}
    calls["taps"] = partial(form, [])
    config: list[int] = []
    refusal = conv_taps.refusal(problem.inner, problem.weight)
    note = f"not the kernel: {refusal}" if refusal else ""
    if tuned and refusal is None:
        config, note = tune(problem, 3)
        calls["tuned"] = partial(form, config)
    exact = problem.exact()
    pool, product = graph_pool(device), matrix_call(matrix, dtype, device)
    ms = in_turn({n: Replay.of(c, device, pool) for n, c in (calls | {"matrix": product}).items()}, rounds)

    def fastest(prefix: str) -> str:
        return min((n for n in calls if n.startswith(prefix)), key=ms.__getitem__, default="")

    native = fastest("native")
    errors = {"native": problem.error(calls[native](), exact, bias=False)}
    errors |= {n: problem.error(calls[n](), exact, bias=True) for n in ("taps", "tuned") if n in calls}
    if unfold := fastest("unfold"):
        errors["unfold"] = problem.error(calls[unfold](), exact, bias=False)
    rate = 2 * matrix**3 / ms["matrix"] / 1e9
    return Row(str(shape), shape.flop / 1e12, ms, native, unfold, errors, rate, config, note)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(rows: Mapping[Shape, Row]) -> list[str]:
    """Geometric means over the measured shapes, the others and all; the shares that the kernel is judged by."""
    groups = {
        "shapes of measurements.md": [r for s, r in rows.items() if s in MEASURED],
        "others": [r for s, r in rows.items() if s not in MEASURED],
        "all": list(rows.values()),
    }
    lines = [
        f"{name}: {geometric_mean([r.ratio for r in group]):.3f}x native in the geometric mean of {len(group)}, "
        f"slower in {sum(r.ratio < 1 for r in group)}"
        for name, group in groups.items()
        if group
    ]
    for name, wanted in (("C = 96", lambda s: s.channels == 96), ("C >= 192", lambda s: s.channels >= 192)):
        found = {s: r.share for s, r in rows.items() if wanted(s) and s in MEASURED and s.out_channels >= 96}
        if found:
            lines.append(
                f"{name}: " + ", ".join(f"{100 * share:.0f} %" for share in found.values()) + " of the matrix rate"
            )
    rates = [r.matrix_tflops for r in rows.values()]
    return [*lines, f"matrix product: {statistics.median(rates):.3g} TFLOP/s ({min(rates):.3g} to {max(rates):.3g})"]


# The command -----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="all", help="all, measured, or shapes with commas between")
    parser.add_argument(
        "--collect", metavar="MODEL", help="list a model's convolutions (NAME, or NAME encode) and stop"
    )
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (computed in tf32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--matrix", type=int, help="size of the matrix product (8192, on a CPU 1024)")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, help="a tuning store (JSON)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for usage. A form that cannot run raises."""
    p = parser()
    args = p.parse_args(arguments)
    try:
        if args.collect:
            name, _, part = args.collect.partition(" ")
            found = collect(Request(name, part or None, "full", torch.bfloat16, "meta"))
            for share, count, shape in shares(found):
                print(f"{100 * share:5.1f} % {count:5d} x {shape.flop / 1e9:9.1f} GFLOP  {shape}")
            return 0
        shapes, dtype, device = shapes_named(args.shapes), dtype_named(args.dtype), torch.device(args.device)
        if args.rounds < 1:
            raise RequestError(f"--rounds {args.rounds} measures nothing")
    except RequestError as error:
        p.error(str(error))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # read for fp32 alone
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    if device.type == "cuda":
        first = [partial(_first_call, shape, dtype, device) for shape in shapes]
        if failure := next((f for f in compiled(first) if f is not None), None):
            raise failure
        torch.cuda.empty_cache()
    here = ComputeDevice.of(device, parse_options({}, {}))
    computed = precision(dtype) if device.type == "cuda" else dtype_name(dtype)
    copy = copy_rate(device) if args.store else 0.0
    matrix = args.matrix or (1024 if device.type == "cpu" else 8192)
    rows: dict[Shape, Row] = {}
    print(HEAD, flush=True)
    for shape in shapes:
        rows[shape] = measure(shape, dtype, device, args.rounds, args.tuned, matrix)
        print(rows[shape], flush=True)
        if args.json:
            about = {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "dtype": dtype_name(dtype),
                "cudnn_benchmark": args.cudnn_benchmark,
            }
            args.json.write_text(json.dumps({**about, "rows": [asdict(r) for r in rows.values()]}, indent=1))
        if args.store:
            merge(args.store, DeviceTable.of(here, copy, figures(asdict(rows[shape]), computed)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(summary(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
