"""The walk that gives every op of a graph its local form, and what the rules of ops have in hand for that.

It goes in graph order. An op's rule (`shard_views.py`, `shard_windows.py`, `shard_sums.py`) reads where its operands lie,
moves what it needs with `Sharder.move`, and adds the local op. The rules decide by global sizes alone, so that every
rank's graph has the same fetches in the same order. An op without a rule is computed on the whole by every rank, and the
report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from pvae.passes.ir import Builder, aten, source_line, value
from pvae.passes.machine import Machine, machine_named
from pvae.passes.placement import Dim, Factor, Interval, Placement, clip
from pvae.passes.rule import Record, Report
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import Fill, fetch_plan
from pvae.runtime.mesh import Mesh

Rule = Callable[["Sharder", Node], Node]
RULES: dict[Any, Rule] = {}  # by op; filled by the modules that hold the rules


class ShardError(ValueError):
    """A graph that cannot be sharded as asked; the message says what would work."""


class ComputeWhole(Exception):
    """Raised by a rule: this op has to be computed on the whole, and why."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these ops. It returns the new node, which `Sharder.place` has placed."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@dataclass
class Sharder:
    """One graph on its way to one rank's local form. `placed` has the nodes that are split; all others are whole."""

    graph: Graph
    mesh: Mesh
    report: Report
    patch: bool = False
    sequence: bool = False
    machine: Machine = field(default_factory=lambda: machine_named("h200"))
    placed: dict[Node, Placement] = field(default_factory=dict)
    build: Builder = field(init=False)
    left_to: dict[Node, Any] = field(default_factory=dict)  # the pads that convolutions do themselves (`PadBefore`)
    _moved: dict[Any, Node] = field(default_factory=dict)

    def __getitem__(self, node: Node) -> Placement:
        return self.placed.get(node) or Placement.whole(value(node).shape)

    # --- adding nodes -----------------------------------------------------------------------------------------------

    def place(self, node: Node, placement: Placement) -> Node:
        """Say where `node` lies. Its local shape must be what the placement gives this rank."""
        local = placement.local(self.mesh.coordinates)
        if tuple(value(node).shape) != local:
            raise AssertionError(f"{node.format_node()} has {tuple(value(node).shape)}, its placement {local}")
        if not placement.is_whole:
            self.placed[node] = placement
        return node

    def emit(self, placement: Placement, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Add `target(*args)` and place it."""
        return self.place(self.build(target, *args, **kwargs), placement)

    def again(self, node: Node, placement: Placement, operands: Mapping[Node, Node] | None = None) -> Node:
        """Add `node`'s own op on other operands."""
        swap = operands or {}
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: swap.get(n, n))
        assert callable(node.target)
        return self.emit(placement, node.target, *args, **kwargs)

    def crop(self, x: Node, dim: int, rows: tuple[int, int]) -> Node:
        """`x` without so many rows of `dim` in front and behind. Not placed."""
        if not any(rows):
            return x
        return self.build(aten.slice.Tensor, x, dim, rows[0], value(x).shape[dim] - rows[1])

    def pick(self, x: Node, dim: int, rows: Sequence[Interval]) -> Node:
        """These stretches of local rows, one after the other. Not placed; never `x` itself, which lies elsewhere."""
        joined: list[Interval] = []
        for lo, hi in rows:
            if joined and joined[-1][1] == lo:
                joined[-1] = (joined[-1][0], hi)
            elif lo < hi:
                joined.append((lo, hi))
        found = [self.build(aten.slice.Tensor, x, dim, *interval) for interval in joined or [(0, 0)]]
        return found[0] if len(found) == 1 else self.build(aten.cat.default, found, dim)

    def reshape(self, x: Node, shape: Sequence[int]) -> Node:
        """To a local shape. Not placed."""
        return x if tuple(value(x).shape) == tuple(shape) else self.build(aten.reshape.default, x, list(shape))

    # --- moving data ------------------------------------------------------------------------------------------------

    def rank(self, factor: Factor) -> int:
        """This rank's number along the axis that splits `factor`."""
        assert factor.axis is not None
        return self.mesh.coordinates[factor.axis]

    def move(
        self,
        x: Node,
        dim: int,
        factor: Factor,
        need: Sequence[Interval],
        fill: Fill = "zeros",
        factors: Dim | None = None,
    ) -> Node:
        """Rows `need[r]` of a factor of dimension `dim`, the rest of `x` as it is. Not placed.

        `factor` is one of the dimension's, or a whole one that is to be cut for the ranks of `factor.axis`. `factors` are
        the dimension's, for an `x` that is not placed itself. A factor of several segments is fetched whole, or cut.
        """
        factors = self[x].dims[dim] if factors is None else factors
        at = next((i for i, f in enumerate(factors) if f.axis == factor.axis), None)
        if at is not None and tuple(need) == factors[at].spans:
            return x
        key = (x, dim, factor, tuple(need), fill)
        if key not in self._moved:
            self._moved[key] = self._move(x, dim, factor, tuple(need), fill, factors, at)
        return self._moved[key]

    def _move(
        self,
        x: Node,
        dim: int,
        factor: Factor,
        need: tuple[Interval, ...],
        fill: Fill,
        factors: Dim,
        at: int | None,
    ) -> Node:
        rank = self.rank(factor)
        everything = need == ((0, factor.size),) * len(need)
        if factor.parts and need != factor.spans and not everything:
            raise AssertionError(f"rows {need} of a dimension of several segments")
        if at is None and factor.parts:
            return self.pick(x, dim, factor.pieces(rank))
        if at is None:  # every rank has it all
            inside, around = clip(need[rank], factor.size)
            if not any(around):
                return self.build(aten.slice.Tensor, x, dim, *inside)
            return self.build(fetch, x, dim, (0, factor.size), (need[rank],), 0, fill)
        local = [f.held(self.mesh.coordinates) for f in factors]
        shape = list(value(x).shape)
        apart = self.reshape(x, [*shape[:dim], *local, *shape[dim + 1 :]]) if len(factors) > 1 else x
        front, back = (factor.context or ((0, 0),) * len(need))[rank]
        apart = self.crop(apart, dim + at, (front, back))
        plan = fetch_plan(factor.bounds, need, fill)
        where = (apart, dim + at, factor.bounds, need, rank, fill, self.mesh.groups[factor.axis or 0])
        got = self.build(fetch, *where)
        if plan.kind != "local":
            sent = sum(plan.ranks[rank].send_splits) if plan.kind == "exchange" else local[at]
            each = value(apart).numel() // max(local[at], 1) * value(apart).element_size()
            self.exchanged(plan.kind, got, f"{plan.kind} of dimension {dim}", sent * each)
        local[at] = need[rank][1] - need[rank][0]
        if factor.parts:
            got = self.pick(got, dim + at, factor.in_order)
        return self.reshape(got, [*shape[:dim], prod(local), *shape[dim + 1 :]]) if len(factors) > 1 else got

    def exchanged(self, kind: str, got: Node, what: str, size: int) -> None:
        """Report a fetch from other ranks."""
        record = Record(kind, got.name, source_line(got), f"{what}, {size} bytes from this rank")
        self.report.matches.append(record)
        self.report.counters[kind] += 1

    def whole(self, x: Node, dims: Sequence[int] | None = None, axes: Sequence[int] | None = None) -> Node:
        """`x` with these dimensions (default: all) whole on every rank, or what these mesh axes split."""
        for dim in range(self[x].ndim) if dims is None else dims:
            for f in self[x].dims[dim]:
                if f.axis is not None and (axes is None or f.axis in axes):
                    world = self.mesh.shape[f.axis]
                    moved = self.move(x, dim, f, ((0, f.size),) * world)
                    kept = (Factor(g.size) if g.axis == f.axis else g for g in self[x].dims[dim])
                    x = self.place(moved, self[x].with_dim(dim, kept))
        return x

    def rebound(self, x: Node, dim: int, factor: Factor) -> Node:
        """`x` with what `factor.axis` splits of dimension `dim` cut as `factor` says."""
        assert factor.axis is not None
        now = self._current(x, dim, factor)
        if now != factor and (now.parts or factor.parts):
            x = self.whole(x, [dim], [factor.axis])
            now = factor
        moved = self.move(x, dim, now, factor.spans)
        dims = [factor if f.axis == factor.axis else f for f in self[x].dims[dim]]
        if self[x].dims[dim] == (Factor(factor.size),):
            dims = [factor]
        return self.place(moved, self[x].with_dim(dim, dims))

    def _current(self, x: Node, dim: int, factor: Factor) -> Factor:
        return next((f for f in self[x].dims[dim] if f.axis == factor.axis), factor)

    def conform(self, x: Node, target: Placement) -> Node:
        """`x` placed as `target` says, the dimensions aligned from the last; those of size 1 are whole (they broadcast)."""
        offset = target.ndim - self[x].ndim
        for dim in range(self[x].ndim):
            if self[x].shape[dim] != 1 or target.shape[dim + offset] == 1:
                x = self.recut(x, dim, target.dims[dim + offset])
            else:
                x = self.whole(x, [dim])
        return x

    def recut(self, x: Node, dim: int, target: Dim) -> Node:
        """`x` with dimension `dim` as `target` says."""
        if self[x].dims[dim] == target:
            return x
        axes = {f.axis for f in target if f.axis is not None}
        elsewhere = [d for d in range(self[x].ndim) if d != dim and axes & {f.axis for f in self[x].dims[d]}]
        x = self.whole(x, elsewhere, list(axes))
        now = self[x].dims[dim]
        simple = len(now) == len(target) == 1 and target[0].axis is not None
        if simple and now[0].axis in (None, target[0].axis):
            return self.rebound(x, dim, target[0])
        x = self.whole(x, [dim])
        if all(f.axis is None for f in target):
            return x
        before = list(value(x).shape)
        apart = self.reshape(x, [*before[:dim], *(f.size for f in target), *before[dim + 1 :]])
        for i, f in enumerate(target):
            if f.axis is not None:
                apart = self.pick(apart, dim + i, f.pieces(self.rank(f)))
        held = prod([f.held(self.mesh.coordinates) for f in target])
        return self.place(self.reshape(apart, [*before[:dim], held, *before[dim + 1 :]]), self[x].with_dim(dim, target))

    # --- the walk ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Give every node that depends on a split value its local form."""
        cuts = set(self.placed)
        for node in list(self.graph.nodes):
            operands = [n for n in node.all_input_nodes if n in self.placed]
            if node.op != "call_function" or not operands:
                continue
            self.build = Builder(node)
            if node in cuts:  # of a value that every rank was to have whole
                for x in operands:
                    if x not in cuts:
                        node.replace_input_with(x, self.whole(x))
                continue
            found = RULES.get(node.target) or (RULES[POINTWISE] if is_pointwise(node) else None)
            try:
                if found is None:
                    own = not isinstance(node.target, torch._ops.OpOverload)
                    raise ComputeWhole("a main-rank region reads the whole" if own else "no rule for this op")
                new = found(self, node)
            except ComputeWhole as reason:
                new = self.on_the_whole(node, str(reason))
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def on_the_whole(self, node: Node, reason: str) -> Node:
        """Gather what `node` reads and compute it on every rank."""
        gathered = {n: self.whole(n) for n in node.all_input_nodes if n in self.placed}
        size = sum(value(n).numel() * value(n).element_size() for n in gathered.values())
        text = f"computed whole on every rank, {size} bytes gathered: {reason}"
        name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
        self.report.refusals.append(Record(name, node.name, source_line(node), text))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: gathered.get(n, n))
        assert callable(node.target)
        return self.build(node.target, *args, **kwargs)


# --- the arguments of a node --------------------------------------------------------------------------------------------


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def integer(node: Node, position: int, name: str, default: int | None = None) -> int:
    found = argument(node, position, name, default)
    if not isinstance(found, int):
        raise ComputeWhole(f"its {name} is {found}, not a number that is known")
    return found


def integers(node: Node, position: int, name: str, default: int | tuple[int, ...] = ()) -> list[int]:
    """A list of numbers; one number is a list of it."""
    found = argument(node, position, name, default)
    found = [found] if isinstance(found, int) else list(found)
    if not all(isinstance(n, int) for n in found):
        raise ComputeWhole(f"its {name} is {found}, not numbers that are known")
    return found


def tensor(node: Node, position: int = 0) -> Node:
    found = node.args[position]
    assert isinstance(found, Node)
    return found


def tensors(node: Node, position: int = 0) -> list[Node]:
    found = node.args[position]
    assert isinstance(found, (list, tuple))
    return [x for x in found if isinstance(x, Node)]


# --- pointwise ops -------------------------------------------------------------------------------------------------------

POINTWISE = "pointwise"
# Elementwise though torch does not tag them so; those that make a tensor like another one are among them.
_ELEMENTWISE = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten._to_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.dropout.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.copy.default,
        aten.where.self,
        aten.type_as.default,
        aten.silu.default,
        aten.gelu.default,
        aten.softplus.default,
    }
)


def is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target in _ELEMENTWISE or torch.Tag.pointwise in tags
