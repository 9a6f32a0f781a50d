"""Every autoencoder of the zoo, sharded over any mesh, equals itself unsharded in float64 to 1e-12; encode and decode.

The model runs once, unsharded, and every graph that `pvae.compile` would run is recorded with what went in and came out.
Then all ranks run the same calls in lockstep, each with its own graph: what one call leaves as pieces, such as the causal
caches, is given to the next as these pieces. So errors add up over the calls as they would in a sharded run.

A model computes in float32 where it says so: those casts are lifted, in the unsharded run too (`lift_float32`).

The default profile takes one mesh and size for each model and part, in turn; `--hypothesis-profile=deep` takes all. Run as
a script it prints the table of all, or of the models that are named: `python tests/pvae/test_shard_zoo.py [NAME...]`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.fx import GraphModule

pytest.importorskip("diffusers")

from pvae import module
from pvae.lockstep import all_meshes, lockstep
from pvae.options import parse_options
from pvae.passes.ir import output_node, placeholders
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report
from pvae.passes.shard import collectives
from pvae.runtime.sharded_tensor import Piece
from pvae.testing import FLOAT64_BOUND, capture, lift_float32
from pvae.tools.zoo import load, names
from pvae.tools.zoo.load import ENTRIES, parts

LATENTS = (5, 7)  # rows and columns that no world of 2, 3 or 4 divides; the tiny presets have 4 x 6, too few for five
MESHES = (
    *(((world,), dims) for dims in ("h", "w") for world in (2, 3, 4, 5)),
    *((shape, "hw") for shape in ((2, 1), (1, 3), (2, 2), (5, 1), (3, 2))),
)
COMPUTED_WHOLE: frozenset[str] = frozenset()  # ops that have no local form; docs/coverage.md says why
HALO = parse_options({"shard": "halo"}, {})
WHERE = next(i for i, step in enumerate(HALO.pipeline.steps) if step.pass_.name == "shard")
BEFORE, FROM_SHARD = Pipeline(HALO.pipeline.steps[:WHERE]), Pipeline(HALO.pipeline.steps[WHERE:])


@dataclass(frozen=True)
class Call:
    """One call of a captured graph, rewritten up to where ranks differ: the tensors that went in and those that came out."""

    gm: GraphModule
    weights: frozenset[str]
    free_strides: frozenset[int]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


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
    computed_whole: set[str] = field(default_factory=set)
    pieces_kept: int = 0

    def __str__(self) -> str:
        kinds = ("exchange", "partial sums", "gather")
        counts = ", ".join(f"{self.fetches[kind]} {kind}" for kind in kinds)
        whole = ", ".join(sorted(self.computed_whole)) or "none"
        return f"{self.error:.1e}  {counts}; {self.pieces_kept} outputs stay pieces; computed whole: {whole}"


@lru_cache(maxsize=1)
def recorded(name: str, part: str, own_size: bool) -> tuple[Call, ...]:
    """The calls that the unsharded model makes, at the preset's size or at LATENTS."""
    entry = ENTRIES[name]
    size = (*entry.tiny.size[:-2], *(n * entry.spatial for n in LATENTS))
    case = load(name, part=part, dtype=torch.float64, size=None if own_size else size)
    calls: list[Call] = []
    compile_capture = module.compile_capture

    def recording(captured: Any, *args: Any, free_strides: frozenset[int] = frozenset(), **kwargs: Any) -> Any:
        lift_float32(captured.gm)
        assert not captured.mutated
        gm = copy.deepcopy(captured.gm)
        for step in BEFORE.steps:
            step.pass_.run(gm.graph, Context(HALO, captured.weights, free_strides), step.settings)
        run = compile_capture(captured, *args, free_strides=free_strides, **kwargs)

        def call(inputs: list[Any]) -> Any:
            given = tuple(inputs)
            outputs = tuple(run(inputs))
            calls.append(Call(gm, captured.weights, free_strides, given, outputs))
            return outputs

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_capture", recording)
        case.run(module.compile(case.model, engine="eager", passes="canonicalize"))
    return tuple(calls)


def sharded(
    call: Call, held: Mapping[str, tuple[tuple[Piece, ...], ...]], shape: tuple[int, ...], dims: str
) -> Program:
    """All ranks' graphs of a call. They are checked to meet at the same fetches, in the same order."""
    options = replace(HALO, shard_dims=dims)
    graphs, left, reports = [], [], []
    for rank, mesh in enumerate(all_meshes(shape)):
        mine = {name: pieces[rank] for name, pieces in held.items()}
        context = Context(options, call.weights, call.free_strides, mesh=mesh, held=mine)
        gm = copy.deepcopy(call.gm)
        reports += [r for r in run_pipeline(gm, FROM_SHARD, context, check=rank == 0) if r.name == "shard"]
        graphs.append(gm)
        left.append(context.left)
    first, *others = [list(collectives(gm.graph)) for gm in graphs]
    assert first and all(other == first for other in others)
    return Program(tuple(graphs), tuple(left), reports[0])


def replay(calls: Sequence[Call], shape: tuple[int, ...], dims: str) -> Outcome:
    """The same calls by all ranks of a mesh of that shape, in lockstep."""
    outcome, programs, values = Outcome(), {}, {}
    world = len(all_meshes(shape))
    for call in calls:
        given = [values.get(id(x)) or Value((x,) * world) for x in call.inputs]
        names_of = [node.name for node in placeholders(call.gm.graph)]
        held = {name: value.pieces for name, value in zip(names_of, given, strict=True) if value.pieces}
        key = (id(call.gm), tuple(held.items()))
        if key not in programs:
            programs[key] = sharded(call, held, shape, dims)
            outcome.fetches += programs[key].report.counters
            outcome.computed_whole |= {record.rule for record in programs[key].report.refusals}
        program = programs[key]
        outputs = lockstep(program.graphs, [[value.local[rank] for value in given] for rank in range(world)])
        for index, whole in enumerate(call.outputs):
            value = Value(
                tuple(output[index] for output in outputs), tuple(p[index] for p in program.left if index in p)
            )
            if isinstance(whole, Tensor):
                values[id(whole)] = value
                outcome.pieces_kept += bool(value.pieces)
                outcome.error = max(outcome.error, *errors(value, whole))
    return outcome


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


def cases() -> Iterator[tuple[str, str, bool, tuple[int, ...], str]]:
    """(model, part, at the preset's own size, mesh, dims): all, or in turn one for each model and part."""
    every = [(own_size, *mesh) for own_size in (False, True) for mesh in MESHES]
    if settings.default.max_examples >= 1000:  # the profile `deep`
        yield from ((name, part, *how) for name in names() for part in parts(name) for how in every)
        return
    turn = cycle(every)
    yield from ((name, part, *next(turn)) for name in names() for part in parts(name))


@pytest.mark.parametrize(("name", "part", "own_size", "shape", "dims"), list(cases()), ids=str)
def test_sharded_equals_unsharded(name: str, part: str, own_size: bool, shape: tuple[int, ...], dims: str) -> None:
    outcome = replay(recorded(name, part, own_size), shape, dims)
    assert outcome.error <= FLOAT64_BOUND, str(outcome)
    assert outcome.computed_whole <= COMPUTED_WHOLE


def test_casts_to_float32_are_lifted_and_nothing_else() -> None:
    third = torch.tensor(1 / 3)

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        narrow = x.to(torch.float32) * third
        return narrow.sin().type_as(x) + mask.to(torch.float32), mask.to(torch.float32) * 2

    x, mask = torch.randn(5, dtype=torch.float64), torch.tensor([True, False] * 2 + [True])
    gm = capture(function, x, mask).gm
    assert lift_float32(gm) == 1
    out, other = torch.fx.Interpreter(gm).run(x, mask)
    assert torch.equal(out, (x * third).sin() + mask) and other.dtype is torch.float32
    metas = [node.meta["val"].dtype for node in output_node(gm.graph).args[0]]
    assert metas == [torch.float64, torch.float32]
    assert lift_float32(gm) == 0


def test_the_turn_covers_every_mesh_and_size() -> None:
    assert {tuple(case[2:]) for case in cases()} == {(o, *mesh) for o in (False, True) for mesh in MESHES}
    assert len(COMPUTED_WHOLE) <= 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    for own_size in (False, True):
        for name in sys.argv[1:] or names():
            for part in parts(name):
                for shape, dims in MESHES:
                    outcome = replay(recorded(name, part, own_size), shape, dims)
                    mesh = "x".join(map(str, shape))
                    print(f"{name:18} {part} {'own' if own_size else '5x7'} {dims:2} {mesh:4} {outcome}", flush=True)
