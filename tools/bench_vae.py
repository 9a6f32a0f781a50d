"""Decode or encode by eager, Inductor and pvae, side by side in one process: time, peak memory, error against float64.

    python -m pvae.tools.bench_vae wan2.1 qwen-image@2048x2048 [--rows eager,inductor,pvae,pvae:cudagraphs=on] [--profile]
    python -m pvae.tools.bench_vae all --preset tiny --device cpu --dtype fp32 --rows inductor,pvae --interleave --runs 40

A model is a name of the zoo or `diffusers:ClassName`, with `@SIZE` in pixels where it is not the preset's; `all` are the
zoo's autoencoders, `published` those and the sizes of docs/measurements.md. A row is one way to run it. `inductor` is the
best that a user gets from torch alone (channels-last weights, `dynamic=False`, a raised recompile limit), `inductor-as-is`
the same on weights as they come. A row of pvae's takes options after colons, `-o` gives some to all of them; they run under
`strict=on`, where a graph that would stay eager is an error, unless told otherwise. Each model is built for each row,
measured after two calls and freed; the ratio is the first row's time over this one's. A row that fails, or does not start
within `--limit` seconds, is reported, the others go on, and the exit code is 1.

`--interleave` holds all rows of a model at once and calls them in turn, in another order each round: what disturbs the
machine then disturbs all of them. Behind the ratio of medians stands its 95 % interval (bootstrap over rounds), then the
ratio of minima. `--clock process` counts the processor time of the calls instead, on a CPU that has other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters  # private: no public way to tell what was left eager

import pvae
from pvae.kernels.channels_last import FORMATS
from pvae.module import compile_with
from pvae.options import OptionError, parse_options
from pvae.passes.pipeline import PipelineError
from pvae.testing import relative_error
from pvae.tools.call_profile import profile_call
from pvae.tools.model_run import Request, RequestError, dtype_name, dtype_named, one_of, options_named, size_named
from pvae.tools.timing import seconds, synchronize
from pvae.tools.zoo import Case, Unsupported, names

PUBLISHED = (
    "wan2.1",
    "qwen-image",
    "qwen-image@2048x2048",
    "kl",
    "flux2",
    "dc",
    "hunyuan-video",
    "hunyuan-video-1.5",
    "ltx-video",
    "ltx2-video",
    "cogvideox",
    "mochi",
)

# Rows ------------------------------------------------------------------------------------------------------------------

Options = Mapping[str, Any]


def channels_last_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.data = module.weight.data.to(memory_format=FORMATS[module.weight.dim()])


def _regions(case: Case) -> list[nn.Module]:
    return [case.model.get_submodule(name) if name else case.model for name in case.regions]


def eager(case: Case) -> None:
    """As it comes."""


def eager_channels_last(case: Case) -> None:
    channels_last_weights(case.model)


def inductor_as_is(case: Case) -> None:
    for region in _regions(case):
        region.compile(dynamic=False)


def inductor(case: Case) -> None:
    channels_last_weights(case.model)
    inductor_as_is(case)


def pvae_compile(case: Case, options: Options) -> None:
    compile_with(case.model, parse_options(options))


def pvae_dynamo(case: Case, options: Options) -> None:
    for region in _regions(case):
        region.compile(backend="pvae", dynamic=False, options=dict(options))


TORCH: Mapping[str, Callable[[Case], None]] = {
    "eager": eager,
    "eager-channels-last": eager_channels_last,
    "inductor": inductor,
    "inductor-as-is": inductor_as_is,
}
PVAE: Mapping[str, tuple[Callable[[Case, Options], None], Options]] = {
    "pvae": (pvae_compile, {}),
    "pvae-cudagraphs": (pvae_compile, {"cudagraphs": "on"}),
    "pvae-frozen": (pvae_compile, {"weights": "frozen"}),
    "pvae-native": (pvae_compile, {"conv3d": "channels_last"}),
    "pvae-unfold": (pvae_compile, {"conv3d": "unfold2d"}),
    "pvae-dynamo": (pvae_dynamo, {}),
}
ROWS = (*TORCH, *PVAE)


@dataclass(frozen=True, eq=False)
class Row:
    """One way to run a model. `options` are what pvae compiles with, empty for torch's own rows."""

    text: str
    kind: str
    options: Options = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, given: Options) -> Row:
        """`pvae:conv3d=native:weights=frozen`; `given` are options of every row of pvae's. RequestError, OptionError or
        PipelineError for what does not exist."""
        kind, *pairs = text.split(":")
        one_of("--rows", kind, ROWS)
        if kind in TORCH:
            if pairs:
                raise RequestError(f"row {text!r}: {kind} is not pvae's and takes no options")
            return cls(text, kind)
        options = {"strict": "on", **given, **PVAE[kind][1], **options_named(pairs, {})}
        parse_options(options)
        return cls(text, kind, options)

    def install(self, case: Case) -> None:
        """Make `case.model` what the row measures."""
        if self.kind in TORCH:
            TORCH[self.kind](case)
        else:
            PVAE[self.kind][0](case, self.options)


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}

# Measuring -------------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What one row of one model came to, or why it did not.

    `times_ms` are the calls in the order of the rounds. `ratio` is the first row's median over this one's, `interval` where
    it lies with 95 % by resampling rounds, `ratio_minima` the same of minima. `peak_gib` is None on a CPU, `error` without
    `--error-size`. `note` says what Dynamo left eager.
    """

    model: str
    row: str
    first_s: float | None = None
    times_ms: list[float] = field(default_factory=list)
    ms: float | None = None
    peak_gib: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    ratio_minima: float | None = None
    error: float | None = None
    profile: list[str] = field(default_factory=list)
    note: str = ""
    failed: str = ""

    def __str__(self) -> str:
        head = f"{self.model:20s} {self.row:20s}"
        if self.failed:
            return f"{head} failed: {self.failed}"
        text = f"{head} {self.ms:9.2f} ms"
        if self.ratio is not None:
            text += f" {self.ratio:6.3f}x"
        if self.interval is not None:
            text += f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}] of minima {self.ratio_minima:.3f}x"
        if self.peak_gib is not None:
            text += f"  peak {self.peak_gib:6.2f} GiB"
        text += f"  first {self.first_s:6.1f} s"
        if self.error is not None:
            text += f"  error against float64 {self.error:.2e}"
        return "\n".join([text + (f"  ({self.note})" if self.note else ""), *(f"    {line}" for line in self.profile)])

    def compare(self, first: Figures, interleaved: bool) -> None:
        """Fill in the ratios to `first`'s times; the interval needs rounds in which both were called."""
        self.ratio = statistics.median(first.times_ms) / statistics.median(self.times_ms)
        if interleaved and self is not first:
            self.ratio_minima = min(first.times_ms) / min(self.times_ms)
            self.interval = ratio_interval(first.times_ms, self.times_ms)


def ratio_interval(over: Sequence[float], under: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(over) / median(under), two columns of the same rounds."""
    generator = random.Random(0)
    rounds = list(zip(over, under, strict=True))
    ratios = []
    for _ in range(draws):
        drawn = generator.choices(rounds, k=len(rounds))
        ratios.append(statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn))
    ratios.sort()
    return ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


class LimitError(RuntimeError):
    """A row did not start within the limit."""


@contextmanager
def time_limit(limit_s: int) -> Iterator[None]:
    """LimitError in the main thread after so many seconds (0: never); it cannot interrupt one long call into C++."""

    def stop(*_: Any) -> None:
        raise LimitError(f"its first two calls took longer than {limit_s} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def left_eager() -> str:
    """What Dynamo did not compile since its counters were cleared, in words; empty where it took everything."""
    breaks, frames = dynamo_counters["graph_break"], dynamo_counters["frames"]
    said = []
    if breaks:
        said.append(f"{sum(breaks.values())} graph breaks: {next(iter(breaks)).strip().splitlines()[0]}")
    if frames["total"] > frames["ok"]:
        said.append(f"{frames['total'] - frames['ok']} of {frames['total']} frames stayed eager")
    return "; ".join(said)


class Bench:
    """The rows of one model. `small` is the same model at `--error-size`."""

    def __init__(
        self, request: Request, small: Request | None, runs: int, limit_s: int, profile: bool, clock: str
    ) -> None:
        self.request, self.small, self.runs, self.limit_s, self.profile = request, small, runs, limit_s, profile
        self.clock = CLOCKS[clock]
        self.device = request.torch_device
        self.label = request.model + (f"@{'x'.join(map(str, request.size))}" if request.size else "")

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _attempt(self, figures: Figures, do: Callable[[], None]) -> bool:
        """Run a step; where it raises, the row has failed, which is said and printed and does not stop the others."""
        try:
            do()
        except Exception as error:
            figures.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            if not isinstance(error, LimitError | RequestError | Unsupported):
                traceback.print_exc(file=sys.stderr)
            return False
        return True

    def measure(self, rows: Sequence[Row]) -> list[Figures]:
        """The rows held at once and called in turn; one row: by itself. Frees what it made."""
        cases: dict[Row, Case] = {}
        held: dict[Row, int] = {}
        found = {row: Figures(self.label, row.text) for row in rows}
        for row in rows:

            def start(row: Row = row) -> None:
                before = self._allocated()
                case = self.request.load()
                row.install(case)
                dynamo_counters.clear()
                with time_limit(self.limit_s):
                    found[row].first_s = seconds(case.run, self.device)
                    seconds(case.run, self.device)
                found[row].note = left_eager()
                held[row] = self._allocated() - before
                cases[row] = case

            self._attempt(found[row], start)
        order = random.Random(self.request.seed)
        for _ in range(self.runs):
            for row in order.sample(list(cases), len(cases)):
                if not self._attempt(found[row], partial(self._call, cases[row], held[row], found[row])):
                    del cases[row]
        for row, case in cases.items():
            found[row].ms = statistics.median(found[row].times_ms)
            if self.profile:
                found[row].profile = profile_call(case.run, self.device).lines(14)
        cases.clear()
        for row in rows:
            if self.small is not None and not found[row].failed:
                self._attempt(found[row], partial(self._error, row, found[row]))
        self.free()
        return list(found.values())

    def _call(self, case: Case, held: int, figures: Figures) -> None:
        """One measured call; the peak leaves out what other rows hold."""
        on_gpu = self.device.type == "cuda"
        others = self._allocated() - held
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = self.clock()
        case.run()
        synchronize(self.device)
        figures.times_ms.append((self.clock() - start) * 1e3)
        if on_gpu:
            peak = (torch.cuda.max_memory_allocated(self.device) - others) / 2**30
            figures.peak_gib = max(peak, figures.peak_gib or 0.0)

    def _error(self, row: Row, figures: Figures) -> None:
        assert self.small is not None
        case = self.small.load()
        reference = case.cast(torch.float64).run()
        row.install(case)
        figures.error = relative_error(case.run(), reference)

    def free(self) -> None:
        """Forget every compiled model: one lies in a cycle, and its weights would count in the next row's peak."""
        torch._dynamo.reset()
        pvae.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# The command -----------------------------------------------------------------------------------------------------------


def models_named(texts: Sequence[str], size: str) -> list[tuple[str, tuple[int, ...] | None]]:
    """`kl@512x512 all` as (model, size) pairs; `size` is for those that name none."""
    groups = {"all": names(), "published": PUBLISHED}
    found = []
    for name in [name for text in texts for name in groups.get(text, (text,))]:
        model, _, own = name.partition("@")
        found.append((model, size_named(own or size) if own or size else None))
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME or NAME@SIZE; all; published")
    parser.add_argument("--part", default="decode", choices=("decode", "encode"))
    parser.add_argument("--preset", default="full", choices=("tiny", "full"))
    parser.add_argument("--size", default="", help="pixels, frames x height x width, instead of the preset's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="products and convolutions of fp32 may be computed in tf32")
    parser.add_argument("--device", default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--rows", default="eager,inductor,pvae", help=", ".join(ROWS) + "; ROW:KEY=VALUE:...")
    parser.add_argument("-o", "--option", action="append", default=[], help="KEY=VALUE of all rows of pvae's")
    parser.add_argument("--runs", type=int, default=5, help="measured calls of each row")
    parser.add_argument("--interleave", action="store_true", help="hold all rows of a model and call them in turn")
    parser.add_argument(
        "--limit", type=int, default=0, help="seconds for a row's first two calls, compilation included"
    )
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--profile", action="store_true", help="also where one call of each row spends its time")
    parser.add_argument("--error-size", default="", help="also compare with float64 at this size")
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 if a row failed; 2 for usage."""
    p = parser()
    args = p.parse_args(arguments)
    results: list[Figures] = []
    try:
        if args.runs < 1:
            raise RequestError(f"--runs {args.runs} measures nothing")
        given = options_named(args.option, {})
        rows = [Row.parse(text, given) for text in args.rows.split(",")]
        if len({row.text for row in rows}) < len(rows):
            raise RequestError(f"--rows {args.rows} names a row twice")
        dtype = dtype_named(args.dtype)
        requests = [
            Request(model, args.part, args.preset, dtype, args.device, size)
            for model, size in models_named(args.models, args.size)
        ]
        small_size = size_named(args.error_size) if args.error_size else None
        device = requests[0].torch_device
        if args.clock == "process" and device.type != "cpu":
            raise RequestError(f"--clock process counts the CPU's time, and the kernels run on {device}")
        about = _about(args, device)
    except (RequestError, OptionError, PipelineError) as error:
        p.error(str(error))
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)
    if args.tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for request in requests:
        small = replace(request, size=small_size) if small_size else None
        bench = Bench(request, small, args.runs, args.limit, args.profile, args.clock)
        first: Figures | None = None
        for group in [rows] if args.interleave else [[row] for row in rows]:
            for figures in bench.measure(group):
                first = first or figures
                if not (first.failed or figures.failed):
                    figures.compare(first, args.interleave)
                print(figures, flush=True)
                results.append(figures)
            if args.json:
                args.json.write_text(json.dumps({**about, "rows": [asdict(r) for r in results]}, indent=1))
    return int(any(r.failed for r in results))


def _about(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return {
        "preset": args.preset,
        "part": args.part,
        "dtype": dtype_name(dtype_named(args.dtype)),
        "tf32": args.tf32,
        "interleaved": args.interleave,
        "clock": args.clock,
        "error_size": args.error_size,
        "options": args.option,
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
