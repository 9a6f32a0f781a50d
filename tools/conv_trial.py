"""One convolution in each of its forms, run and timed on a device, with every result checked.

Inputs are random, lie in the layout that the form reads, and change from call to call where they would stay in the chip's
cache. Frames before x and a pad that a convolution cannot say are copied together beforehand for the forms that need it:
in a compiled model what makes x writes it so. No bias: Inductor adds it in what comes next.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from pvae.kernels import conv3d_unfold, conv_taps
from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps_config import Config, candidate_configs
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.conv_rules import no_gain
from pvae.passes.tuning_store import Measured
from pvae.testing import relative_error
from pvae.tools.timing import synchronize

Run = Callable[[Tensor], Tensor]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}  # others: float32
CACHE_BYTES = 256 * 2**20  # inputs and outputs of successive calls together are larger than any chip's cache
WRONG = 2.0  # a form may err so many times as much as ATen's convolution; a wrong tile errs by a lot more


@dataclass(frozen=True)
class Trial:
    """A convolution's forms as measured, and what was left out: `(form and config, reason)`."""

    problem: ConvProblem
    forms: dict[str, Measured]
    dropped: list[tuple[str, str]] = field(default_factory=list)


class Bench:
    """Inputs of one problem, its reference result, and the timing."""

    def __init__(self, problem: ConvProblem, device: torch.device, *, seconds: float = 0.05) -> None:
        self.problem, self.device, self.seconds = problem, device, seconds
        self.dtype = DTYPES.get(problem.precision, torch.float32)
        generator = torch.Generator(device).manual_seed(0)
        kernel = (problem.channels // problem.groups, *problem.kernel)
        fan = torch.Size(kernel).numel()

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32)

        frames = problem.sizes[0] + problem.before
        self.x = random(problem.batch, problem.channels, frames, *problem.sizes[1:]).to(self.dtype)
        self.weight = (random(problem.out_channels, *kernel) / fan**0.5).to(self.dtype)
        self.reference = self._reference()
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        least = torch.finfo(self.dtype).eps * (0.25 if narrow else 8)  # where ATen's own error happens to be none
        self.allowed = WRONG * max(self.error(self._convolve(self._padded(self.x))), least)

    def _reference(self) -> Tensor:
        """The result in float64, of half precision on a GPU in float32."""
        gpu = self.device.type == "cuda" and self.dtype not in (torch.float32, torch.float64)
        wide = torch.float32 if gpu else torch.float64
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._convolve(self._padded(self.x.to(wide)), self.weight.to(wide))

    def error(self, y: Tensor) -> float:
        return relative_error(y, self.reference)

    # The forms ------------------------------------------------------------------------------------------------------

    @property
    def even(self) -> list[int]:
        """The padding that a convolution can say: as much on both sides."""
        return [min(pair) for pair in self.problem.padding]

    def _padded(self, x: Tensor) -> Tensor:
        """x with what padding is left, one-sided, written out."""
        widths = [w - e for pair, e in zip(self.problem.padding, self.even, strict=True) for w in pair]
        pairs = [widths[i : i + 2] for i in range(0, len(widths), 2)]
        return functional.pad(x, [w for pair in reversed(pairs) for w in pair]) if any(widths) else x

    def _convolve(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        p = self.problem
        convolution = functional.conv3d if p.ndim == 3 else functional.conv2d
        return convolution(
            x, self.weight if weight is None else weight, None, p.stride, self.even, p.dilation, p.groups
        )

    def _laid(self, x: Tensor, last: bool) -> Tensor:
        return x.contiguous(memory_format=FORMATS[x.dim()]) if last else x.contiguous()

    def native(self) -> tuple[Tensor, Run]:
        return self._padded(self.x).contiguous(), self._convolve

    def channels_last(self) -> tuple[Tensor, Run]:
        weight = self._laid(self.weight, True)
        return self._laid(self._padded(self.x), True), lambda x: self._convolve(x, weight)

    def unfold2d(self) -> tuple[Tensor, Run]:
        p, last = self.problem, self.device.type == "cuda"
        weight = self._laid(conv3d_unfold.unfold_weight(self.weight, p.groups), last)
        widths = [w for pair in p.padding for w in pair]
        return self._laid(self.x, last), lambda x: conv3d_unfold.OP(
            x, weight, None, p.kernel[0], p.stride, widths, p.dilation, p.groups, last
        )

    def linear(self) -> tuple[Tensor, Run]:
        p, weight = self.problem, self.weight.flatten(1)
        counts = p.out_sizes

        def in_groups(x: Tensor) -> Tensor:
            y = torch.bmm(weight.unflatten(0, (p.groups, -1)), x.transpose(0, 1).reshape(p.groups, weight.shape[1], -1))
            return y.reshape(p.out_channels, p.batch, *counts).transpose(0, 1)

        if p.groups > 1:
            return self._laid(self.x, no_gain(self.weight) is None), in_groups

        def run(x: Tensor) -> Tensor:
            for i, (count, patch) in enumerate(zip(counts, p.kernel, strict=True)):
                x = x.narrow(2 + 2 * i, 0, count * patch).unflatten(2 + 2 * i, (count, patch))
            order = [0, *(2 + 2 * i for i in range(p.ndim)), 1, *(3 + 2 * i for i in range(p.ndim))]
            patches = x.permute(order).flatten(1 + p.ndim)
            return functional.linear(patches, weight).movedim(-1, 1)

        return self._laid(self.x, no_gain(self.weight) is None), run

    def frames(self) -> tuple[Tensor, Run]:
        p, last = self.problem, no_gain(self.weight) is None
        weight = self._laid(self.weight[:, :, 0], last)

        def run(x: Tensor) -> Tensor:
            x = x[:, :, :: p.stride[0]]
            flat = x.transpose(1, 2).flatten(0, 1)
            y = functional.conv2d(flat, weight, None, p.stride[1:], self.even[1:], p.dilation[1:], p.groups)
            return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

        return self._laid(self._padded(self.x), last), run

    def taps(self, config: Sequence[int]) -> tuple[Tensor, Run]:
        p, weight = self.problem, self._laid(self.weight, True)
        widths = [w for pair in p.padding for w in pair]

        def run(x: Tensor) -> Tensor:
            before = x[:, :, : p.before] if p.before else None
            own = x[:, :, p.before :] if p.before else x
            return conv_taps.OP(
                own, before, weight, None, None, p.stride, widths, p.dilation, False, "none", list(config)
            )

        return self._laid(self.x, True), run

    # Timing ---------------------------------------------------------------------------------------------------------

    def time(self, x: Tensor, run: Run) -> float:
        """Median ms of a call."""
        one = 2 * x.numel() * x.element_size()
        copies = min(16, max(1, CACHE_BYTES // max(one, 1)))
        inputs = itertools.cycle([x, *(x.clone() for _ in range(copies - 1))])
        return median_ms(run, inputs, self.device, self.seconds)


def median_ms(run: Run, inputs: Iterator[Tensor], device: torch.device, seconds: float) -> float:
    """Milliseconds of a call: the median of 7 groups of calls that together take about `seconds`."""
    run(next(inputs))
    synchronize(device)
    start = time.perf_counter()
    run(next(inputs))
    synchronize(device)
    calls = max(1, min(50, int(seconds / 7 / max(time.perf_counter() - start, 1e-6))))
    return statistics.median(_group(run, inputs, device, calls) for _ in range(7))


def _group(run: Run, inputs: Iterator[Tensor], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run(next(inputs))
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run(next(inputs))
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written together."""
    x = torch.zeros((512 if device.type == "cuda" else 64) * 2**20, dtype=torch.uint8, device=device)
    return 2e3 * x.numel() / median_ms(lambda y: y.clone(), itertools.repeat(x), device, 0.1)


# Trying ---------------------------------------------------------------------------------------------------------------


def try_forms(
    problem: ConvProblem,
    names: Iterable[str],
    why_not: dict[str, str],
    device: torch.device,
    *,
    configs: int = 12,
    seconds: float = 0.05,
) -> Trial:
    """Measure the forms `names`, of `taps` at most so many configs; those in `why_not` cannot be had.

    `seconds` is what timing one takes. A form that errs too much is dropped, with its error.
    """
    trial = Trial(problem, {})
    with torch.no_grad():
        bench = Bench(problem, device, seconds=seconds)
        for name in names:
            if name == "taps":
                trial.forms[name] = _tune_taps(bench, trial, configs)
            else:
                trial.forms[name] = _attempt(bench, trial, name, getattr(bench, name))
    trial.forms.update({name: Measured(None, reason) for name, reason in why_not.items()})
    return trial


def _attempt(bench: Bench, trial: Trial, what: str, prepare: Callable[[], tuple[Tensor, Run]]) -> Measured:
    """A form's time, or why it has none: what it raised, or that its result is wrong. Both are in `trial.dropped`."""
    try:
        x, run = prepare()
        error = bench.error(run(x))
        if error <= bench.allowed:
            return Measured(bench.time(x, run))
    except Exception as failure:  # a config that does not compile, or needs too much memory: said, and not chosen
        reason = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
    else:
        reason = f"wrong: error {error:.1e}, allowed {bench.allowed:.1e}"
    trial.dropped.append((what, reason))
    return Measured(None, reason)


def _tune_taps(bench: Bench, trial: Trial, most: int) -> Measured:
    """The fastest config: from the kernel's own choice by single changes, as long as one is faster and `most` are not tried."""
    p = bench.problem
    *_, height, width = p.out_sizes
    every = list(candidate_configs(p.channels, p.out_channels, height, width, bench.dtype))
    tried: dict[Config, Measured] = {}

    def attempt(config: Config) -> Measured:
        if config not in tried:
            numbers = config.numbers()
            found = _attempt(bench, trial, f"taps {numbers}", lambda: bench.taps(numbers))
            tried[config] = found if found.ms is None else replace(found, config=tuple(numbers))
        return tried[config]

    centre: Config | None = None
    while every:
        around = every[:1] if centre is None else [c for c in every if _steps(c, centre) == 1]
        for config in around:
            if len(tried) < most:
                attempt(config)
        best = min((c for c in tried if tried[c].ms is not None), key=lambda c: tried[c].ms or 0.0, default=None)
        if best is None and len(tried) < min(len(every), most):  # the kernel's own choice does not run: any that does
            attempt(next(c for c in every if c not in tried))
            continue
        if best is None or best == centre or len(tried) >= most:
            return tried[best] if best is not None else next(iter(tried.values()))
        centre = best
    return Measured(None, "no config fits")


def _steps(a: Config, b: Config) -> int:
    """In how many respects two configs differ: patch, columns, depth, warps, stages."""
    pairs = [((c.height, c.width), (c.columns0, c.columns1), c.depth, c.warps, c.stages) for c in (a, b)]
    return sum(x != y for x, y in zip(*pairs, strict=True))
