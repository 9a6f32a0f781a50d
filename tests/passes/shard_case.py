"""A function sharded for every rank of a small mesh, its graphs as text, and all ranks run together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pvae.lockstep import Traffic, all_meshes, lockstep
from pvae.options import parse_options
from pvae.passes.ir import placeholders
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report, RewriteCounter
from pvae.passes.shard import collectives
from pvae.runtime.sharded_tensor import Piece
from pvae.testing import capture, structure

N, C, H, W = 1, 2, 9, 4
HAVE = (0, 3, 6, 9)
GROUP = "lockstep:0,1,2"
ALL = ((0, 9),) * 3


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape or (N, C, H, W), dtype=torch.float64)


@dataclass(frozen=True)
class Sharded:
    """The graphs of all ranks, their reports and contexts."""

    graphs: list[GraphModule]
    reports: list[list[Report]]
    contexts: list[Context]

    @property
    def report(self) -> Report:
        return next(r for r in self.reports[0] if r.name == "shard")

    @property
    def whole(self) -> dict[str, str]:
        """What was computed whole: op, reason."""
        return {r.rule.removeprefix("aten."): r.note.rpartition(": ")[2] for r in self.report.refusals}

    @property
    def fetches(self) -> dict[str, int]:
        """How many of each kind."""
        return {kind: n for kind, n in self.report.counters.items() if kind in ("exchange", "partial sums", "gather")}

    def run(self, *args: Tensor, traffic: Sequence[Traffic] | None = None) -> list[Any]:
        return lockstep(self.graphs, [list(args)] * len(self.graphs), traffic)


def shard(
    function: Callable[..., Any],
    *args: Tensor,
    mesh: tuple[int, ...] = (3,),
    weights: int = 0,
    left: frozenset[int] = frozenset(),
    held: Mapping[int, Callable[[int], tuple[Piece, ...]]] | None = None,
    passes: str | None = "shard",
    **options: Any,
) -> Sharded:
    """`function(*args)` on every rank of a mesh. The last `weights` arguments are weights, `held` arrive as pieces.

    `passes` None is the default pipeline.

    All ranks' graphs are checked to ask for the same collectives.
    """
    parsed = parse_options({"shard": "halo", "mesh": mesh if len(mesh) > 1 else None, **options}, {})
    pipeline = parsed.pipeline if passes is None else Pipeline.parse(passes)
    found = Sharded([], [], [])
    for rank, place in enumerate(all_meshes(mesh)):
        captured = capture(function, *args)
        names = [n.name for n in placeholders(captured.gm.graph)]
        pieces = {names[i]: make(rank) for i, make in (held or {}).items()}
        own = frozenset(names[len(names) - weights :])
        context = Context(parsed, own, left, RewriteCounter(), mesh=place, held=pieces)
        found.reports.append(run_pipeline(captured.gm, pipeline, context))
        found.graphs.append(captured.gm)
        found.contexts.append(context)
    first, *others = [list(collectives(gm.graph)) for gm in found.graphs]
    assert all(other == first for other in others)
    return found


def assert_shards_to(
    before: Callable[..., Any], expected: Callable[..., Any], *args: Tensor, rank: int = 1, **options: Any
) -> Sharded:
    """Check that the graph of `rank` is that of `expected`, node by node, and that all ranks together compute `before`."""
    found = shard(before, *args, **options)
    got, want = structure(found.graphs[rank]), structure(torch.fx.symbolic_trace(expected))
    assert got == want, "sharded to:\n" + "\n".join(got) + "\nexpected:\n" + "\n".join(want)
    assert_same(found, before, *args)
    return found


def assert_same(found: Sharded, before: Callable[..., Any], *args: Tensor) -> None:
    whole = before(*args)
    for output in found.run(*args):
        torch.testing.assert_close(output[0], whole, rtol=1e-12, atol=1e-12)
