"""What sharding a model over so many ranks would do and cost, without a rank or a GPU: `pvae plan`.

The model runs on fake tensors as one rank of an imagined mesh; its graphs, sharded by the pass that a real rank runs, are
costed (`passes/cost.py`). Only what pvae compiles counts: encoder or decoder of an autoencoder, and of any other model the
whole, so that what is outside of its repeated blocks is a part of the prediction (with `regions=blocks` it is not).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from pvae.auto_shard import of_tokens
from pvae.backend import PvaeError
from pvae.block_pieces import Pieces
from pvae.lockstep import simulated_mesh
from pvae.module import CompiledForward, Program
from pvae.passes.cost import Cost, Exchange, graph_cost
from pvae.passes.ir import is_tensor, placeholders, source_line, value
from pvae.passes.machine import Machine, MachineError, machine_named
from pvae.passes.rule import RewriteCounter
from pvae.passes.shard import ShardError, spatial_inputs
from pvae.passes.shard_choice import NONE, Candidate, Choice, candidates, choose
from pvae.ranks import Ranks
from pvae.regions import regions, repeated_blocks
from pvae.report import GraphReport
from pvae.runtime.mesh import Mesh
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.tools.model_run import Request, RequestError, shapes_only

FORMS = ("auto", "halo", "patch", "sequence", "none")
LINES = {"h": "rows", "w": "columns"}
_CUT = re.compile(r"dimension (\d+) at \(([\d, ]+)\)")  # as the shard pass reports where it cuts


# One rank's graphs ----------------------------------------------------------------------------------------------------


@dataclass
class RankGraph:
    """One captured graph of a rank, what the passes said about it, and how often the model calls it.

    `of_tokens`: by what was captured, it works on tokens. `held`: inputs that came as pieces, in its first call.
    """

    graph: Graph
    weights: frozenset[str]
    report: GraphReport
    of_tokens: bool
    calls: int = 0
    held: dict[str, Pieces] = field(default_factory=dict)


class _Counted:
    """A compiled graph that counts its calls. Run on fake tensors once: the shapes of later calls' outputs are the same."""

    def __init__(self, run: Callable[..., Any], entry: RankGraph) -> None:
        self._run, self._entry, self._outputs = run, entry, None

    def __call__(self, inputs: list[Any]) -> Any:
        self._entry.calls += 1
        if self._outputs is None:
            given = zip(placeholders(self._entry.graph), inputs, strict=True)
            self._entry.held.update({node.name: x.pieces for node, x in given if isinstance(x, ShardedTensor)})
            self._outputs = self._run(inputs)
        return self._outputs


class _Traced(CompiledForward):
    """`CompiledForward` that keeps each graph as the pipeline left it."""

    def trace_into(self, entries: list[RankGraph], mesh: Mesh | None) -> None:
        self._entries, self.observe = entries, self._see
        self.ranks = None if mesh is None else Ranks(mesh)

        named = (*self.module.named_parameters(), *self.module.named_buffers())
        self._weights = frozenset(re.sub(r"\W", "_", name) for name, _ in named)  # as capture calls them

    def _see(self, stage: str, gm: GraphModule) -> None:
        if stage == "captured":
            self._of_tokens = of_tokens(gm.graph, self._weights)
        self._last = gm.graph

    def _capture(self, *args: Any, **kwargs: Any) -> Program | dict[int, Pieces] | str | None:
        program = super()._capture(*args, **kwargs)
        if not isinstance(program, Program):
            return program
        entry = RankGraph(self._last, self._weights, program.report, self._of_tokens)
        self._entries.append(entry)
        return replace(program, compiled=_Counted(program.compiled, entry))


def rank_graphs(request: Request, mesh_shape: tuple[int, ...], rank: int) -> list[RankGraph]:
    """The graphs that this rank of such a mesh would run, in the order of capture; by shapes alone, no process group.

    An empty mesh shape stands for a world of one. Sharding is as `request.options` say.
    """
    options = replace(request.options, engine="eager", strict="on", verify="off")
    mesh = simulated_mesh(mesh_shape, rank) if mesh_shape else None
    entries: list[RankGraph] = []
    with shapes_only(request):
        case, mode = request.shapes()
        counter = RewriteCounter(options.rewrite_limit)
        found = regions(case.model, options.regions)
        blocks = found == repeated_blocks(case.model)
        if blocks and options.regions == "auto":
            found, blocks = regions(case.model, "whole"), False
        if blocks:  # tokens stay split from one to the next
            options = replace(options, gather="off")
        for name, module in found.items():
            forward = _Traced(module, name or type(module).__name__, options, counter, takes_pieces=blocks)
            forward.trace_into(entries, mesh)
            module.forward = forward
        try:
            with mode:
                case.run()
        except PvaeError as error:
            if "" not in found or not repeated_blocks(case.model):
                raise
            raise RequestError(f"{error}; -o regions=blocks plans its repeated blocks, each by itself") from error
    if not any(entry.calls for entry in entries):
        raise RequestError(f"{request.model}: nothing that pvae compiles was called, so there is nothing to plan")
    return entries


# A plan ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How one direction of the picture plane is split. `bounds` are in rows (or columns) of the region's input.

    `halo` is the widest reach of a rank beyond its own piece, or a patch's context: (rows, of so many rows there).
    """

    direction: str
    size: int
    bounds: tuple[int, ...]
    halo: tuple[int, int]


@dataclass(frozen=True)
class TokenCut:
    """A node of a graph that every rank computes (or is given) whole, and of which it then takes its piece: `bounds` of the
    `size` positions of one dimension, which are tokens, or the calls in a batch."""

    node: str
    source: str
    dimension: int
    size: int
    bounds: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """Exchanges of one purpose and direction over a dimension of one size: how many, and what this rank sends and
    receives by them in all; the largest message sum of one, bytes."""

    purpose: str
    direction: str
    kind: str
    size: int
    count: int
    sent: int
    received: int
    largest: int
    messages: int
    seconds: float

    @classmethod
    def of(cls, what: str, direction: str, kind: str, size: int, same: Sequence[Exchange]) -> Traffic:
        def in_all(per_call: Callable[[Exchange], float]) -> Any:
            return sum(e.times * per_call(e) for e in same)

        return cls(
            what,
            direction,
            kind,
            size,
            in_all(lambda e: 1),
            in_all(lambda e: e.sent),
            in_all(lambda e: e.received),
            max(max(e.sent, e.received) for e in same),
            in_all(lambda e: e.messages),
            in_all(lambda e: e.seconds),
        )


@dataclass(frozen=True)
class RankPlan:
    """What one rank does in a whole run of the model."""

    rank: int
    coordinates: tuple[int, ...]
    cost: Cost
    input: tuple[int, ...]
    graphs: tuple[tuple[str, int], ...]  # name, calls
    cuts: tuple[Cut, ...]
    token_cuts: tuple[TokenCut, ...]
    of_tokens: bool  # more is computed on tokens than by convolutions
    directions: dict[str | None, str]  # process group -> rows or columns, batch or tokens
    refused: Counter[tuple[str, str, str]]  # (op, model's line, why it is computed whole) -> how often

    def exchanges(self) -> list[Traffic]:
        """The exchanges, alike ones together, those that take longest first."""
        found: dict[tuple[str, str, str, int], list[Exchange]] = {}
        for e in self.cost.exchanges:
            found.setdefault((purpose(e), self.directions.get(e.group, ""), e.kind, e.have[-1]), []).append(e)
        return sorted((Traffic.of(*key, same) for key, same in found.items()), key=lambda t: -t.seconds)

    def gathered(self) -> Counter[tuple[str, int, int]]:
        """What is made whole within the model: (model's line, bytes received, rows) -> how often."""
        found: Counter[tuple[str, int, int]] = Counter()
        for e in self.cost.exchanges:
            if purpose(e) == "gather":
                found[e.source or e.node, e.received, e.have[-1]] += e.times
        return found


@dataclass(frozen=True)
class Plan:
    """The plan for a world: the choice, and the ranks that were traced (the others lie between them)."""

    world: int
    choice: Choice
    ranks: tuple[RankPlan, ...]
    alone: float  # seconds of the unsharded model on one rank

    @property
    def candidate(self) -> Candidate:
        return self.choice.candidate

    @property
    def slowest(self) -> RankPlan:
        return max(self.ranks, key=lambda rank: rank.cost.seconds)

    @property
    def seconds(self) -> float:
        """The slowest rank's, for the others wait for it."""
        return self.slowest.cost.seconds

    @property
    def input_text(self) -> str:
        """What the region is given in its first call, and how often each of its graphs runs."""
        rank = self.slowest
        calls = ", ".join(f"{name} x {count}" for name, count in rank.graphs)
        return f"input {'x'.join(map(str, rank.input)) or 'without a tensor'}; calls: {calls}"

    @property
    def memory(self) -> int:
        return max(rank.cost.memory for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        def shown(candidate: Candidate) -> dict[str, Any]:
            return {"form": candidate.form, "dims": candidate.dims, "mesh": list(candidate.mesh)}

        considered = [
            {
                **shown(c.candidate),
                "seconds": None if c.cost is None else c.cost.seconds,
                "memory": None if c.cost is None else c.cost.memory,
                "verdict": c.verdict,
            }
            for c in self.choice.considered
        ]
        head = {"world": self.world, **shown(self.candidate), "reason": self.choice.reason, "considered": considered}
        figures = {"seconds": self.seconds, "speedup": self.alone / self.seconds, "memory": self.memory}
        cuts = [*map(asdict, self.slowest.cuts), *map(asdict, self.slowest.token_cuts)]
        return {**head, **figures, "partition": cuts, "ranks": [_rank_dict(rank) for rank in self.ranks]}


def _rank_dict(rank: RankPlan) -> dict[str, Any]:
    cost = asdict(replace(rank.cost, exchanges=()))
    del cost["exchanges"]
    return {
        "rank": rank.rank,
        "coordinates": list(rank.coordinates),
        **cost,
        "seconds": rank.cost.seconds,
        "memory": rank.cost.memory,
        "graphs": [{"name": name, "calls": calls} for name, calls in rank.graphs],
        "exchanges": [asdict(traffic) for traffic in rank.exchanges()],
        "gathers": [
            {"source": source, "received": size, "size": rows, "count": n}
            for (source, size, rows), n in rank.gathered().items()
        ],
        "computed_whole": [
            {"op": op, "source": source, "reason": reason, "count": n}
            for (op, source, reason), n in rank.refused.items()
        ],
    }


def purpose(e: Exchange) -> str:
    """result, gather (made whole within the model), heads (exchanged for tokens), sums (partial sums and moments of the
    ranks), bounds (from pieces to other pieces), or halo."""
    if e.kind == "boxes":
        return "heads"
    if e.whole and e.result:
        return "result"
    if e.have == tuple(range(len(e.need) + 1)) and e.dim == 0:
        return "sums"
    if e.whole:
        return "gather"
    stops = (0, *(stop for _, stop in e.need))
    return "bounds" if tuple(pairwise(stops)) == e.need and stops[-1] == e.have[-1] else "halo"


def traced_ranks(mesh: tuple[int, ...]) -> list[int]:
    """First, second and last along every axis: the larger pieces come first, so no other rank has more to do."""
    if not mesh:
        return [0]
    chosen = [sorted({0, min(1, n - 1), n - 1}) for n in mesh]
    places = list(product(*map(range, mesh)))
    return [rank for rank, place in enumerate(places) if all(c in axis for c, axis in zip(place, chosen, strict=True))]


def _busiest(candidate: Candidate) -> int:
    """A rank with neighbours on every side where there is one, and a largest piece; of tokens, which have no neighbours,
    the first one's is."""
    mesh = candidate.mesh
    middle = tuple(1 if n > 2 else 0 for n in mesh)
    return list(product(*map(range, mesh))).index(middle) if mesh and candidate.form != "sequence" else 0


@dataclass
class Planner:
    """Plans one model on one machine; every rank of every candidate is traced once."""

    request: Request
    machine: Machine
    on_trace: Callable[[str], None] = lambda text: None
    _known: dict[tuple[Candidate, int], RankPlan] = field(default_factory=dict)

    def rank(self, candidate: Candidate, rank: int) -> RankPlan:
        key = (candidate, rank)
        if key not in self._known:
            self.on_trace(f"{candidate}, rank {rank}")
            self._known[key] = self._trace(candidate, rank)
        return self._known[key]

    def _trace(self, candidate: Candidate, rank: int) -> RankPlan:
        options = replace(
            self.request.options,
            shard=candidate.form,
            shard_dims=candidate.dims or "auto",
            mesh=candidate.mesh or None,
        )
        entries = rank_graphs(replace(self.request, options=options), candidate.mesh, rank)
        called = [entry for entry in entries if entry.calls]
        cost = Cost.total(graph_cost(e.graph, self.machine, e.weights).times(e.calls) for e in called)
        mesh = simulated_mesh(candidate.mesh, rank) if candidate.mesh else None
        planes = spatial_inputs(called[0].graph, called[0].weights)
        given = [n for n in placeholders(called[0].graph) if n.name not in called[0].weights and is_tensor(n)]
        shape = tuple(value(planes[0]).shape) if planes else ()
        found = tuple(cuts(cost.exchanges, mesh, candidate.dims, shape)) if mesh else ()
        sequence = candidate.form == "sequence"
        directions = ("batch", "tokens")[-len(candidate.mesh) :] if sequence else [LINES[d] for d in candidate.dims]
        if candidate.form == "patch":  # its context is cut from the input, where nothing moves
            found = tuple(replace(cut, halo=(options.patch_context, cut.size)) for cut in found)
        refused: Counter[tuple[str, str, str]] = Counter()
        for entry in called:
            for step in entry.report.passes:
                for record in step.refusals if step.name == "shard" else ():
                    refused[record.rule, record.source or record.node, record.note] += entry.calls
        return RankPlan(
            rank,
            mesh.coordinates if mesh else (),
            cost,
            shape or tuple(next((value(n).shape for n in given), ())),
            tuple((entry.report.name, entry.calls) for entry in called),
            found,
            tuple(dict.fromkeys(c for entry in called for c in token_cuts(entry))) if sequence else (),
            any(entry.of_tokens for entry in called),
            dict(zip(mesh.groups, directions, strict=True)) if mesh else {},
            refused,
        )

    def plan(self, world: int, form: str, dims: str) -> Plan:
        """The plan for `world` ranks; `form` and `dims` may be auto. RequestError where nothing fits the words."""
        options = self.request.options
        mesh = options.mesh if world == prod(options.mesh or (world,)) else None
        tokens = form == "auto" and world > 1 and (options.shard_inputs is not None or self.rank(NONE, 0).of_tokens)
        if tokens and dims != "auto":
            raise RequestError(f"--shard-dims {dims} is of pictures; {self.request.model} works on tokens")
        approximate = options.approximate == "on"
        try:
            found = candidates(world, form=form, dims=dims, approximate=approximate, mesh=mesh, tokens=tokens)
            if form != "auto":
                found = [c for c in found if c.ranks in (1, world)]
            choice = choose(found, self._cost, self.machine)
        except ValueError as error:
            raise RequestError(str(error)) from error
        chosen = choice.candidate
        ranks = tuple(self.rank(chosen, rank) for rank in traced_ranks(chosen.mesh))
        return Plan(world, choice, ranks, self.rank(NONE, 0).cost.seconds)

    def _cost(self, candidate: Candidate) -> Cost | str:
        try:
            return self.rank(candidate, _busiest(candidate)).cost
        except ShardError as error:
            return str(error)


def cuts(exchanges: Sequence[Exchange], mesh: Mesh, dims: str, shape: Sequence[int]) -> Iterator[Cut]:
    """How the region's input, of that shape, is split, read off the exchanges of one rank: every exchange of a mesh axis
    splits the same picture at some scale."""
    for axis, direction in enumerate(dims):
        own = [e for e in exchanges if e.group == mesh.groups[axis] and purpose(e) not in ("sums", "heads")]
        if not own or not shape:
            continue
        size = shape[-2 if direction == "h" else -1]
        at_input = [e for e in own if e.have[-1] == size]
        e = (at_input or own[-1:])[0]
        bounds = tuple(b * size // e.have[-1] for b in e.have)
        reaches = [(_reach(e), e.have[-1]) for e in own if purpose(e) == "halo"]
        yield Cut(direction, size, bounds, max(reaches, key=lambda r: r[0] / r[1], default=(0, size)))


def token_cuts(entry: RankGraph) -> Iterator[TokenCut]:
    """Where the tokens of one graph are cut: inside it, as the shard pass reports, or before it, where they came as pieces."""
    nodes = {node.name: node for node in entry.graph.nodes}
    for name, pieces in entry.held.items():
        for piece in pieces:
            yield TokenCut(name, "", piece.dim, piece.bounds[-1], piece.bounds)
    for step in entry.report.passes:
        for record in step.matches if step.name == "shard" else ():
            if record.rule == "cut":
                source = source_line(nodes[record.node]) if record.node in nodes else ""
                for dim, text in _CUT.findall(record.note):
                    bounds = tuple(map(int, text.split(",")))
                    yield TokenCut(record.node, source, int(dim), bounds[-1], bounds)


def _reach(e: Exchange) -> int:
    """How far the ranks that hold something reach beyond it."""
    pairs = zip(pairwise(e.have), e.need, strict=True)
    return max(
        (max(lo - start, stop - hi, 0) for (lo, hi), (start, stop) in pairs if lo < hi and start < stop), default=0
    )


def world_named(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--world {text!r} is not a number of ranks; it takes numbers of 1 or more, such as 1,2,4,8")
    return int(text)


def plan_worlds(
    request: Request,
    worlds: Sequence[int],
    form: str | None,
    dims: str | None,
    machine: str | None,
    on_trace: Callable[[str], None] = lambda text: None,
) -> tuple[Machine, Request, list[Plan]]:
    """A plan for each world. What is None comes from the request's options; with `shard=none` there, it is auto.

    The device `auto` is cuda wherever torch was built for it: no GPU is needed. Raises RequestError.
    """
    options = request.options
    form = form if form is not None else options.shard if options.shard != "none" else "auto"
    dims = dims if dims is not None else options.shard_dims
    if form not in FORMS:
        why = "tiles are the autoencoder's, not a graph's; " if form == "tile" else ""
        raise RequestError(f"--shard {form!r} cannot be planned: {why}valid: {', '.join(FORMS)}")
    if dims not in ("auto", "h", "w", "hw"):
        raise RequestError(f"--shard-dims {dims!r} does not exist; valid: auto, h, w, hw")
    if form == "sequence" and dims != "auto":
        raise RequestError(f"--shard-dims {dims} is of pictures; the form sequence splits tokens")
    if not worlds:
        raise RequestError("--world names no number of ranks, such as 1,2,4,8")
    ranks = prod(options.mesh or ())
    if options.mesh is not None and ranks not in worlds:
        raise RequestError(f"a mesh of shape {options.mesh} has {ranks} ranks: plan it with --world {ranks}")
    if request.device == "auto":
        request = replace(request, device="cuda" if torch.backends.cuda.is_built() else "cpu")
    try:
        chosen = machine_named(options.machine if machine is None else machine)
    except MachineError as error:
        raise RequestError(str(error)) from error
    if machine is not None:  # the pass too decides by what exchanges cost
        request = replace(request, options=replace(options, machine=machine))
    planner = Planner(request, chosen, on_trace)
    return chosen, request, [planner.plan(world, form, dims) for world in worlds]
