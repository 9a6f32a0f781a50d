"""Runs of a compiled model, recorded unsharded and replayed by all ranks of a mesh in lockstep.

The model runs once, unsharded, and every graph that `pvae.compile` would run is recorded with what went in and came out.
Then all ranks run the same calls, each with its own graph: what one call leaves as pieces is given to the next as these
pieces. So errors add up over the calls as they would in a sharded run.

A model computes in float32 where it says so: those casts are lifted, in the unsharded run too (`lift_float32`).
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from pvae import module
from pvae.lockstep import all_meshes, lockstep
from pvae.options import Options
from pvae.passes.ir import placeholders
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report
from pvae.passes.sequence import NO_TOKENS
from pvae.passes.shard import collectives
from pvae.passes.shard_attention import SDPA
from pvae.runtime.sharded_tensor import Piece
from pvae.testing import lift_float32
from pvae.tools.zoo import Case


@dataclass(frozen=True)
class Call:
    """One call of a captured graph, rewritten up to where ranks differ: the tensors that went in and those that came out."""

    gm: GraphModule
    weights: frozenset[str]
    free_strides: frozenset[int]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    flops: int


@dataclass(frozen=True)
class Value:
    """A tensor as the ranks have it: each its piece, or each the whole (then `pieces` are empty)."""

    local: tuple[Any, ...]
    pieces: tuple[tuple[Piece, ...], ...] = ()


@dataclass(frozen=True)
class Program:
    """The graphs of all ranks for one kind of call, and which outputs stay pieces."""

    graphs: tuple[GraphModule, ...]
    left: tuple[Mapping[int, tuple[Piece, ...]], ...]
    report: Report


@dataclass
class Outcome:
    """What a sharded run came to: the worst relative error of any output, and what the ranks' graphs do."""

    error: float = 0.0
    fetches: Counter[str] = field(default_factory=Counter)
    computed_whole: Counter[str] = field(default_factory=Counter)  # bytes gathered for it, by op and reason
    cuts: int = 0
    pieces_kept: int = 0
    flops: int = 0  # of matrix products and convolutions, by all ranks
    flops_unsharded: int = 0

    def __str__(self) -> str:
        kinds = ("heads", "exchange", "partial sums", "gather")
        counts = ", ".join(f"{self.fetches[kind]} {kind}" for kind in kinds)
        whole = ", ".join(f"{op} ({size} bytes)" for op, size in sorted(self.computed_whole.items())) or "none"
        work = f"{self.repeated:4.0%} of the work repeated"
        return f"{self.error:.1e}  {work}  {counts}; {self.pieces_kept} outputs stay pieces; computed whole: {whole}"

    @property
    def repeated(self) -> float:
        """What all ranks compute together beyond what one rank has to alone."""
        return self.flops / max(self.flops_unsharded, 1) - 1


def before_sharding(options: Options) -> tuple[Pipeline, Pipeline]:
    """The passes in front of sharding, whose result all ranks share, and the others."""
    steps = options.pipeline.steps
    where = next(i for i, step in enumerate(steps) if step.pass_.name == "shard")
    return Pipeline(steps[:where]), Pipeline(steps[where:])


def record(case: Case, options: Options, **how: Any) -> tuple[Call, ...]:
    """The calls of compiled graphs that the unsharded model makes; `how` are options of `pvae.compile`."""
    calls: list[Call] = []
    compile_capture = module.compile_capture

    def recording(captured: Any, *args: Any, free_strides: frozenset[int] = frozenset(), **kwargs: Any) -> Any:
        lift_float32(captured.gm)
        assert not captured.mutated
        gm = copy.deepcopy(captured.gm)
        for step in before_sharding(options)[0].steps:
            step.pass_.run(gm.graph, Context(options, captured.weights, free_strides), step.settings)
        run = compile_capture(captured, *args, free_strides=free_strides, **kwargs)

        def call(inputs: list[Any]) -> Any:
            given = tuple(inputs)
            with FlopCounterMode(display=False) as counter:
                outputs = tuple(run(inputs))
            calls.append(Call(gm, captured.weights, free_strides, given, outputs, counter.get_total_flops()))
            return outputs

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_capture", recording)
        case.run(module.compile(case.model, engine="eager", passes="canonicalize", **how))
    return tuple(calls)


def sharded(
    call: Call, held: Mapping[str, tuple[tuple[Piece, ...], ...]], shape: tuple[int, ...], options: Options
) -> Program:
    """All ranks' graphs of a call. They are checked to meet at the same fetches, in the same order."""
    graphs, left, reports = [], [], []
    for rank, mesh in enumerate(all_meshes(shape)):
        mine = {name: pieces[rank] for name, pieces in held.items()}
        context = Context(options, call.weights, call.free_strides, mesh=mesh, held=mine)
        gm = copy.deepcopy(call.gm)
        found = run_pipeline(gm, before_sharding(options)[1], context, check=rank == 0)
        reports += [r for r in found if r.name == "shard"]
        graphs.append(gm)
        left.append(context.left)
    first, *others = [list(collectives(gm.graph)) for gm in graphs]
    assert all(other == first for other in others)
    return Program(tuple(graphs), tuple(left), reports[0])


def replay(calls: Sequence[Call], shape: tuple[int, ...], options: Options) -> Outcome:
    """The same calls by all ranks of a mesh of that shape, in lockstep."""
    outcome = Outcome()
    programs: dict[Any, Program] = {}
    values: dict[int, Value] = {}
    world = math.prod(shape)
    for call in calls:
        given = [values.get(id(x)) or Value((x,) * world) for x in call.inputs]
        names_of = [node.name for node in placeholders(call.gm.graph)]
        held = {name: value.pieces for name, value in zip(names_of, given, strict=True) if value.pieces}
        key = (id(call.gm), tuple(held.items()))
        if key not in programs:
            programs[key] = sharded(call, held, shape, options)
            _count(call, programs[key].report, outcome)
        program = programs[key]
        with FlopCounterMode(display=False) as counter:
            outputs = lockstep(program.graphs, [[value.local[rank] for value in given] for rank in range(world)])
        outcome.flops += counter.get_total_flops()
        outcome.flops_unsharded += call.flops
        for index, whole in enumerate(call.outputs):
            value = Value(
                tuple(output[index] for output in outputs), tuple(p[index] for p in program.left if index in p)
            )
            if isinstance(whole, Tensor):
                values[id(whole)] = value
                outcome.pieces_kept += bool(value.pieces)
                outcome.error = max(outcome.error, *errors(value, whole))
    return outcome


def _count(call: Call, report: Report, outcome: Outcome) -> None:
    outcome.fetches += report.counters
    outcome.cuts += sum(record.rule == "cut" for record in report.matches)
    for record in report.refusals:
        if record.note == NO_TOKENS and all(node.target is not SDPA for node in call.gm.graph.nodes):
            continue  # a block that mixes no tokens
        gathered = re.search(r"(\d+) bytes gathered: (.*)", record.note)
        size, reason = gathered.groups() if gathered else (0, record.note)
        outcome.computed_whole[f"{record.rule.removeprefix('aten.')}: {reason}"] += int(size)


def errors(value: Value, whole: Tensor) -> Iterator[float]:
    """Each rank's error relative to the whole's norm; infinite where it is not a number."""
    size = torch.linalg.vector_norm(whole).item() or 1.0
    for rank, got in enumerate(value.local):
        wanted = whole
        for piece in value.pieces[rank] if value.pieces else ():
            start, stop = piece.held[piece.rank]
            wanted = wanted.narrow(piece.dim, start, stop - start)
        assert got.shape == wanted.shape
        error = torch.linalg.vector_norm(got - wanted).item() / size
        yield math.inf if math.isnan(error) else error
