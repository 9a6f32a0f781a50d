"""A step of a diffusion transformer on several ranks, by pvae and by diffusers' context parallelism, side by side.

    torchrun --nproc_per_node 4 -m pvae.tools.bench_sequence wan2.1-dit --layers 6 \\
        --rows diffusers-cp,diffusers-cp-compile,inductor,pvae,pvae-blocks

`eager`, `inductor`, `inductor-blocks` and `pvae-one` are one GPU's work, which every rank does for itself. `pvae` (one graph)
and `pvae-blocks` (one for each kind of block) are `pvae.compile(model, shard="sequence")`; `pvae-torch-compile` and
`pvae-torch-compile-blocks` the same by `torch.compile`. `diffusers-cp` is `enable_parallelism` with Ulysses over all ranks,
`diffusers-cp-compile` with compiled blocks too. A row that cannot run fails alone (exit code 1).

Models are the zoo's transformers at published widths and sizes, with `--layers` blocks of each kind, and the same weights on
every rank; qwen-image-dit is 1024 x 1024 here, with 512 text tokens and a mask of them. All rows are compiled first and then
measured in turn, `--rounds` times in another order, each after a warm-up call: what runs at the power limit inherits the
clock of what ran before it. Every call starts with all ranks; a time is the slowest rank's, the median over all rounds,
memory the fullest rank's peak without the other rows' models, the ratio the first row's time over this one's. With
`--error-size` every row also runs at that size, on the same ranks, and is compared with float64, as is eager. pvae's rows run
under `strict=on` unless `-o strict=off`. `--profile` prints the kernels of one call of a row on rank 0.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist

import pvae
from pvae.module import compile_with
from pvae.options import OptionError, Options, parse_options
from pvae.passes.pipeline import PipelineError
from pvae.report import GraphReport
from pvae.tools.bench_ranks import Comparison, Figures, RowError, World, add_arguments, joined, started, write_json
from pvae.tools.call_profile import CallProfile, profile_call
from pvae.tools.model_run import RequestError, dtype_named, one_of, options_named, size_named
from pvae.tools.timing import seconds
from pvae.tools.zoo import Case, names
from pvae.tools.zoo.load import TRANSFORMERS, transformer_case
from pvae.tools.zoo.transformer import Sizes, TransformerEntry

# Models ----------------------------------------------------------------------------------------------------------------


def _masked(model: Any, sizes: Sizes) -> Mapping[str, object]:
    """What the zoo gives Qwen-Image, and a mask of the text, `[B, text tokens]` of bool, none of it padding."""
    mask = torch.ones(sizes.batch, sizes.text, dtype=torch.bool)
    return {**TRANSFORMERS["qwen-image-dit"].inputs(model, sizes), "encoder_hidden_states_mask": mask}


ENTRIES: Mapping[str, TransformerEntry] = {
    **TRANSFORMERS,
    "qwen-image-dit": replace(
        TRANSFORMERS["qwen-image-dit"], inputs=_masked, full_size=Sizes((128, 128), text=512)
    ),  # as in comparisons elsewhere: 4096 tokens
}


@dataclass(frozen=True)
class Subject:
    """A transformer of the zoo and how to build it: `layers` blocks of each kind instead of the preset's, `size` in latents."""

    model: str
    preset: str
    layers: int | None
    dtype: torch.dtype
    device: torch.device
    size: tuple[int, ...] | None

    def entry(self) -> TransformerEntry:
        """RequestError where the zoo does not have it, or the preset does not say how many blocks."""
        entry = ENTRIES[one_of("transformer", self.model, names("transformer"))]
        if self.layers is None:
            return entry
        config = entry.config(one_of("--preset", self.preset, ("tiny", "full")))
        counts = {
            key: self.layers for key, value in config.items() if key.endswith("layers") and isinstance(value, int)
        }
        if not counts:
            raise RequestError(
                f"--layers: the {self.preset} preset of {self.model} sets no number of layers: {dict(config)}"
            )
        preset: dict[str, Any] = {self.preset: {**config, **counts}}
        return replace(entry, **preset)

    def load(self) -> Case:
        """With values that depend on the model, its size and the device's kind alone; `full` ones are drawn on the device."""
        try:
            case = transformer_case(self.model, self.entry(), self.preset, self.dtype, self.device, 0, self.size)
        except ValueError as error:
            raise RequestError(str(error)) from error
        if "return_dict" not in signature(case.model.forward).parameters:
            return case
        return replace(case, kwargs={**case.kwargs, "return_dict": False})  # diffusers' plans gather tuples alone


# Rows ------------------------------------------------------------------------------------------------------------------


def _compile_blocks(case: Case, **settings: Any) -> None:
    model: Any = case.model
    if not getattr(model, "_repeated_blocks", None):
        raise RowError(f"diffusers names no repeated blocks of {type(model).__name__} to compile")
    model.compile_repeated_blocks(dynamic=False, **settings)


def _context_parallel(case: Case, world: World) -> None:
    """diffusers' own sequence parallelism. RowError where it does not take the model or the machine."""
    from diffusers import ContextParallelConfig

    model: Any = case.model
    if world.device.type == "cpu":
        raise RowError("diffusers' context parallelism needs accelerators")
    if world.size == 1:
        raise RowError("diffusers' context parallelism needs more than one rank")
    if getattr(model, "_cp_plan", None) is None:
        raise RowError(f"diffusers has no context parallel plan for {type(model).__name__}")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world.size))


def _context_parallel_compiled(case: Case, world: World) -> None:
    _context_parallel(case, world)
    _compile_blocks(case, fullgraph=False)


OTHERS: Mapping[str, Callable[[Case, World], object]] = {
    "eager": lambda case, world: None,
    "inductor": lambda case, world: case.model.compile(dynamic=False),
    "inductor-blocks": lambda case, world: _compile_blocks(case),
    "diffusers-cp": _context_parallel,
    "diffusers-cp-compile": _context_parallel_compiled,
}
OURS: Mapping[str, Mapping[str, str]] = {
    "pvae-one": {"shard": "none"},
    "pvae": {"shard": "sequence", "regions": "whole"},
    "pvae-blocks": {"shard": "sequence", "regions": "blocks"},
    "pvae-torch-compile": {"shard": "sequence"},
    "pvae-torch-compile-blocks": {"shard": "sequence", "gather": "off"},
}
ROWS = (*OTHERS, *OURS)
COLLECTIVES = ("heads", "gather", "exchange", "partial sums")  # as the pass `shard` counts them


def row_options(row: str, given: Mapping[str, Any]) -> Options | None:
    """What a row of pvae's compiles with, None for the others. Raises OptionError, also where the command or a PVAE_*
    variable would make it another row."""
    if row not in OURS:
        return None
    if both := set(given) & set(OURS[row]):
        raise OptionError(f"row {row!r} says itself what {', '.join(sorted(both))} is; leave -o {min(both)} away")
    options = parse_options({"strict": "on", **given, **OURS[row]})
    for name, value in OURS[row].items():
        if getattr(options, name) != value:
            variable = f"PVAE_{name.upper()}"
            raise OptionError(f"{variable}={getattr(options, name)} in the environment overrides row {row!r}; unset it")
    return options


def install(row: str, case: Case, world: World, given: Mapping[str, Any]) -> None:
    """Make `case.model` what the row measures."""
    options = row_options(row, given)
    if options is None:
        OTHERS[row](case, world)
    elif "torch-compile" not in row:
        compile_with(case.model, options)
    else:
        asked = {"strict": "on", **given, **OURS[row]}
        if row.endswith("blocks"):
            _compile_blocks(case, backend="pvae", options=asked)
        else:
            case.model.compile(backend="pvae", dynamic=False, options=asked)


# Measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """What one rank measured of a row: seconds of the first call, bytes, and seconds of each call of each round; and how
    many graphs pvae compiled for it, with what collectives in them."""

    first_s: float
    peak_bytes: int | None
    rounds: list[list[float]]
    form: Mapping[str, int]


def _collectives(graphs: Sequence[GraphReport]) -> dict[str, int]:
    """The number of graphs, and of each kind of collective in all of them; empty for rows that are not pvae's."""
    counts = Counter(graphs=len(graphs))
    for graph in graphs:
        for done in graph.passes:
            counts.update({kind: n for kind, n in done.counters.items() if kind in COLLECTIVES})
    return dict(counts) if graphs else {}


class Bench:
    """The rows of one model on one world."""

    def __init__(self, world: World, subject: Subject, given: Mapping[str, Any]) -> None:
        self.world, self.subject, self.given = world, subject, given
        self.ready: dict[str, tuple[Case, Timed]] = {}
        self.failed: dict[str, str] = {}

    def say(self, text: str) -> None:
        """How far it is, on standard error."""
        if self.world.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _fail(self, row: str, error: RowError) -> None:
        self.failed[row] = str(error)
        self.ready.pop(row, None)
        self.say(str(Figures(row, failed=str(error))))

    def prepare(self, row: str) -> None:
        """Load and compile a row. Its model stays, beside those of the rows before it."""
        gc.collect()  # a compiled model lies in a cycle: a failed row's weights would count in this one's peak
        device = self.world.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        compiled = len(pvae.report().graphs)
        case = self.subject.load()
        try:
            self.world.attempt(lambda: install(row, case, self.world, self.given))
            first = self.world.attempt(lambda: self._call(case))
            self.world.attempt(lambda: self._call(case))
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            self.world.attempt(lambda: self._call(case))
        except RowError as error:
            self._fail(row, error)
            return
        peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
        form = _collectives(pvae.report().graphs[compiled:])
        self.ready[row] = case, Timed(first, peak, [], form)
        told = ", ".join(f"{n} {kind}" for kind, n in form.items())
        self.say(f"{row}: first call {first:.1f} s{told and '; '}{told}")

    def _call(self, case: Case) -> float:
        """Seconds until this rank has its result, from when all ranks are there."""
        dist.barrier()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        return seconds(case.run, self.world.device)

    def rounds(self, rounds: int, runs: int) -> None:
        """Measure the rows in turn, in the same random order on all ranks."""
        order = random.Random(0)
        for _ in range(rounds):
            for row in order.sample(list(self.ready), len(self.ready)):
                case, timed = self.ready[row]
                try:
                    times = self.world.attempt(lambda case=case: [self._call(case) for _ in range(1 + runs)])  # type: ignore[misc]
                    timed.rounds.append(times[1:])
                except RowError as error:
                    self._fail(row, error)

    def figures(self, rows: list[str]) -> list[Figures]:
        """Of all rows, in their order."""
        found: list[Figures] = []
        for row in rows:
            if row in self.failed:
                found.append(Figures(row, failed=self.failed[row]))
                continue
            ours = self.ready[row][1]
            everyone = self.world.gather(ours)
            slowest = [
                [max(call) for call in zip(*each, strict=True)]
                for each in zip(*(r.rounds for r in everyone), strict=True)
            ]
            ms = 1e3 * statistics.median(call for one in slowest for call in one)
            first = found[0].ms if found else ms
            medians = [1e3 * statistics.median(one) for one in slowest]
            peaks = [r.peak_bytes for r in everyone if r.peak_bytes is not None]
            found.append(
                Figures(
                    row,
                    ms,
                    ratio=None if first is None else first / ms,
                    first_s=max(r.first_s for r in everyone),
                    peak_gib=max(peaks) / 2**30 if peaks else None,
                    form=ours.form or None,
                    spread=(max(medians) - min(medians)) / ms,
                )
            )
        return found

    def compared(self, figures: list[Figures], size: tuple[int, ...]) -> Iterator[Figures]:
        """The figures one by one with their errors at another size. What was compiled before is forgotten."""
        self.ready.clear()
        comparison = Comparison(self.world, replace(self.subject, size=size).load)
        for found in figures:
            torch._dynamo.reset()
            pvae.reset()
            if found.failed:
                yield found
                continue
            try:
                error = comparison.error(lambda case, row=found.row: install(row, case, self.world, self.given))  # type: ignore[misc]
                yield replace(found, error=error, eager_error=comparison.eager_error)
            except RowError as failure:
                yield replace(found, failed=f"at the error size: {failure}")

    def profile(self, row: str) -> CallProfile | None:
        """Where rank 0 spends a call of a row; None on the other ranks, which take part in it unprofiled."""
        case, device = self.ready[row][0], self.world.device
        dist.barrier()
        if self.world.rank == 0:
            return profile_call(case.run, device)
        for _ in range(3):  # as often as profile_call
            seconds(case.run, device)
        return None


# The command -----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a transformer of the zoo")
    parser.add_argument(
        "--rows", default="diffusers-cp,diffusers-cp-compile,inductor,pvae,pvae-blocks", help=", ".join(ROWS)
    )
    parser.add_argument("--layers", type=int, help="blocks of each kind, instead of the preset's one or two")
    add_arguments(parser, "latents", runs=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", default="", help="rows whose kernels to print")
    parser.add_argument("--top", type=int, default=25, help="how many of the kernels")
    return parser


def main() -> int:
    """Exit code 0, or 1 if a row failed; 2 for usage."""
    p = parser()
    args = p.parse_args()
    try:
        rows = started(args, ROWS, "bench_sequence")
        profiled = [one_of("--profile", row, tuple(rows)) for row in args.profile.split(",") if row]
        if len(set(rows)) < len(rows):
            raise RequestError(f"--rows {args.rows} has a row twice")
        if args.rounds < 1:
            raise RequestError(f"--rounds {args.rounds} measures nothing")
        given = options_named(args.option, {})
        for row in rows:
            row_options(row, given)
        on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        with joined(on_gpu, timedelta(seconds=parse_options(given).timeout)) as world:
            size = size_named(args.size) if args.size else None
            dtype = dtype_named(args.dtype)
            subject = Subject(args.model, args.preset, args.layers, dtype, world.device, size)
            subject.entry()
            bench = Bench(world, subject, given)
            for row in rows:
                bench.prepare(row)
            bench.rounds(args.rounds, args.runs)
            results = bench.figures(rows)
            if world.rank == 0:
                print("\n".join(map(str, results)), flush=True)
            profiles: dict[str, CallProfile] = {}
            for row in profiled:
                found = bench.profile(row) if row in bench.ready else None
                if found is not None:
                    profiles[row] = found
                    print(f"{row}, one call on rank 0:", *found.lines(args.top), sep="\n    ", flush=True)
            if args.error_size:
                done: list[Figures] = []
                for figures in bench.compared(results, size_named(args.error_size)):
                    done.append(figures)
                    if world.rank == 0:
                        print(figures, flush=True)
                results = done
            if args.json and world.rank == 0:
                profiled_rows = {row: asdict(profile) for row, profile in profiles.items()}
                measured = [asdict(r) for r in results]
                write_json(args, world, given, layers=args.layers, profiles=profiled_rows, rows=measured)
    except (RequestError, OptionError, PipelineError) as error:
        p.error(str(error))
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
