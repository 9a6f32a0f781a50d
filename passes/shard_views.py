"""Sharding rules of what moves no value or only along one dimension: pointwise ops, views, slices, cat, repeat, flip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.index_map import Flip, IndexMap, cat_bounds, cat_needs, follow, locals_of, slicing
from pvae.passes.ir import aten, is_tensor, value
from pvae.passes.placement import Dim, Factor, Misfit, Placement, concatenated, even, rounded
from pvae.passes.sharder import POINTWISE, ComputeWhole, Sharder, argument, integer, integers, rule, tensor, tensors

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


# --- pointwise ---------------------------------------------------------------------------------------------------------


def broadcast(s: Sharder, operands: Sequence[Node]) -> Placement:
    """Where the result of an elementwise op lies: as its largest split operand does, and others where that is whole."""
    shape = torch.broadcast_shapes(*(s[x].shape for x in operands))
    dims = list(Placement.whole(shape).dims)
    used: set[int] = set()
    for x in sorted(operands, key=lambda x: -prod(s[x].shape) if x in s.placed else 1):
        offset = len(shape) - s[x].ndim
        for d in range(s[x].ndim):
            axes, is_whole = Placement((s[x].dims[d],)).axes, not Placement((dims[d + offset],)).axes
            if axes and is_whole and not axes & used and s[x].shape[d] == shape[d + offset]:
                dims[d + offset] = s[x].dims[d]
                used |= axes
    return Placement(tuple(dims))


@rule(POINTWISE)
def pointwise(s: Sharder, node: Node) -> Node:
    operands = [x for x in node.all_input_nodes if is_tensor(x)]
    placement = broadcast(s, operands)
    return s.again(node, placement, {x: s.conform(x, placement) for x in operands})


@rule(aten.expand.default)
def expand(s: Sharder, node: Node) -> Node:
    x, shape = tensor(node), value(node).shape
    offset = len(shape) - s[x].ndim
    dims = list(Placement.whole(shape).dims)
    for d in range(s[x].ndim):
        if s[x].shape[d] == shape[d + offset]:
            dims[d + offset] = s[x].dims[d]
        elif s[x].splits(d):
            x = s.whole(x, [d])
    placement = Placement(tuple(dims))
    return s.emit(placement, aten.expand.default, x, list(placement.local(s.mesh.coordinates)))


# --- views -------------------------------------------------------------------------------------------------------------


@rule(*RESHAPES)
def reshape(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    return reshaped(s, x, tuple(value(node).shape))


def reshaped(s: Sharder, x: Node, shape: Sequence[int]) -> Node:
    """`x` in another global shape. Where bounds fall between, they are moved; where no bounds would do, it is gathered."""
    while True:
        try:
            placement = s[x].reshaped(shape)
        except Misfit as misfit:
            dim, factor = next((d, f) for d, dim in enumerate(s[x].dims) for f in dim if f.axis == misfit.axis)
            if misfit.multiple is not None and not factor.context and not factor.parts:
                bounds = rounded(factor.bounds, misfit.multiple)
                x = s.rebound(x, dim, Factor(factor.size, factor.axis, bounds))
            else:
                x = s.whole(x, [dim], [misfit.axis])
        else:
            return s.emit(placement, aten.reshape.default, x, list(placement.local(s.mesh.coordinates)))


@rule(aten.unsqueeze.default)
def unsqueeze(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    dims = list(s[x].dims)
    dims.insert(integer(node, 1, "dim") % (len(dims) + 1), (Factor(1),))
    return s.again(node, Placement(tuple(dims)))


@rule(aten.permute.default)
def permute(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    return s.again(node, s[x].permuted([o % s[x].ndim for o in integers(node, 1, "dims")]))


@rule(aten.transpose.int, aten.t.default)
def transpose(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    order = list(range(s[x].ndim))
    a, b = (integer(node, 1, "dim0"), integer(node, 2, "dim1")) if node.target is aten.transpose.int else (0, -1)
    if order:
        order[a], order[b] = order[b], order[a]
    return s.again(node, s[x].permuted(order))


# --- along one dimension -----------------------------------------------------------------------------------------------


def without(placement: Placement, dim: int) -> Placement:
    return Placement(placement.dims[:dim] + placement.dims[dim + 1 :])


@rule(aten.select.int)
def select(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    dim = integer(node, 1, "dim") % s[x].ndim
    if not s[x].splits(dim):
        return s.again(node, without(s[x], dim))
    index = integer(node, 2, "index") % s[x].shape[dim]
    row = s.whole(sliced(s, x, dim, index, index + 1, 1), [dim])
    return s.emit(without(s[row], dim), aten.select.int, row, dim, 0)


@rule(aten.slice.Tensor)
def slice_rule(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    dim = integer(node, 1, "dim", 0) % s[x].ndim
    n, step = s[x].shape[dim], integer(node, 4, "step", 1)
    start, stop, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(n)
    if s[x].splits(dim):
        return sliced(s, x, dim, start, max(start, stop), step)
    return s.again(node, s[x].with_dim(dim, [Factor(value(node).shape[dim])]))


def sliced(s: Sharder, x: Node, dim: int, start: int, stop: int, step: int) -> Node:
    """`x[start:stop:step]` along a split dimension."""
    factor = s[x].one(dim)
    if factor is not None:
        return along(s, x, dim, slicing(factor.size, start, stop, step), step)
    segments = s[x].segments(dim)
    if segments is not None and step == 1:
        return _of_segments(s, x, dim, segments, start, stop)
    outer, *inner = s[x].dims[dim]
    each = prod(f.size for f in inner)
    if outer.axis is None and step == 1 and start % each == 0 and stop % each == 0:  # some of the whole outer rows
        held = prod(f.held(s.mesh.coordinates) for f in inner)
        rows = (stop - start) // each
        placement = s[x].with_dim(dim, [Factor(rows), *inner])
        return s.emit(placement, aten.slice.Tensor, x, dim, start // each * held, stop // each * held)
    x = s.whole(x, [dim])
    placement = s[x].with_dim(dim, [Factor(len(range(start, stop, step)))])
    return s.emit(placement, aten.slice.Tensor, x, dim, start, stop, step)


def _of_segments(s: Sharder, x: Node, dim: int, factor: Factor, start: int, stop: int) -> Node:
    """What every rank holds of `[start, stop)` of a dimension of several segments: nothing moves."""
    new, rows = _held_of(factor, s.rank(factor), start, stop)
    return s.place(s.pick(x, dim, rows), s[x].with_dim(dim, [new]))


def _held_of(factor: Factor, rank: int, start: int, stop: int) -> tuple[Factor, list[tuple[int, int]]]:
    """`[start, stop)` of a split dimension, cut as that is, and where a rank holds its pieces among its own rows."""
    at, held = 0, 0
    kept: list[Factor] = []
    rows: list[tuple[int, int]] = []
    for part in factor.parts or (factor.bounds,):
        lo, hi = (min(max(edge - at, 0), part[-1]) for edge in (start, stop))
        if lo < hi:
            bounds = tuple(min(max(b, lo), hi) - lo for b in part)
            kept.append(Factor(hi - lo, factor.axis, bounds))
            first = held + max(lo - part[rank], 0)
            rows.append((first, first + bounds[rank + 1] - bounds[rank]))
        at, held = at + part[-1], held + part[rank + 1] - part[rank]
    return (concatenated(kept) if kept else Factor(0)), rows


def along(s: Sharder, x: Node, dim: int, op: IndexMap, step: int = 1) -> Node:
    """Rows of a split dimension that `op` picks; the local op is `[::step]`."""
    factor = s[x].one(dim)
    assert factor is not None
    if s.patch:
        raise ComputeWhole("it picks rows of the split dimension, which pieces with context do not have in one place")
    bounds = follow(op, factor.bounds)
    locals_ = locals_of(op, factor.size, bounds)
    got = s.move(x, dim, factor, [one.need for one in locals_])
    if step > 1:
        got = s.build(aten.slice.Tensor, got, dim, 0, value(got).shape[dim], step)
    got = s.crop(got, dim, locals_[s.rank(factor)].crop)
    return s.place(got, s[x].with_dim(dim, [Factor(bounds[-1], factor.axis, bounds)]))


@rule(aten.flip.default)
def flip(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    dims = [dim % s[x].ndim for dim in integers(node, 1, "dims")]
    for dim in dims:
        if s[x].splits(dim):
            x = s.whole(x, [dim]) if s[x].one(dim) is None else along(s, x, dim, Flip())
    return s.emit(s[x], aten.flip.default, x, dims)


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(s: Sharder, node: Node) -> Node:
    parts = [x for x in tensors(node) if s[x].shape != (0,)]  # an old spelling of nothing
    ndim = s[parts[0]].ndim
    dim = integer(node, 1, "dim", 0) % ndim
    reference = max((x for x in parts if x in s.placed), key=lambda x: prod(s[x].shape))
    for d in range(ndim):
        if d != dim:
            parts = [s.recut(x, d, s[reference].dims[d]) for x in parts]
    split = [x for x in parts if s[x].splits(dim)]
    sizes = [s[x].shape[dim] for x in parts]
    if not split:
        placement = s[parts[0]].with_dim(dim, [Factor(sum(sizes))])
        return s.emit(placement, aten.cat.default, parts, dim)
    axes = {f.axis for x in split for f in s[x].dims[dim]}
    if s.sequence and len(axes) == 1 and all(s[x].segments(dim) for x in split):  # its own pieces of all: nothing moves
        parts = [x if x in split else _evenly(s, x, dim, *axes) for x in parts]
        joined = concatenated([s[x].dims[dim][0] for x in parts])
        return s.emit(s[parts[0]].with_dim(dim, [joined]), aten.cat.default, parts, dim)
    tail = _common_tail(s, parts, dim)
    if tail is not None:  # such as frames of tokens, each split alike
        outer = sum(sizes) // prod(f.size for f in tail)
        return s.emit(s[parts[0]].with_dim(dim, [Factor(outer), *tail]), aten.cat.default, parts, dim)
    factor = s[split[0]].one(dim)
    if factor is None or factor.axis is None or len(axes) > 1 or s.patch:
        parts = [s.whole(x, [dim]) for x in parts]
        return s.emit(s[parts[0]].with_dim(dim, [Factor(sum(sizes))]), aten.cat.default, parts, dim)
    axis, world = factor.axis, s.mesh.shape[factor.axis]
    operands = []
    for x in parts:
        one = s[x].one(dim)
        operands.append(one if one is not None else Factor(s[x].shape[dim], axis, (0,) * world + (s[x].shape[dim],)))
    bounds = cat_bounds([f.bounds for f in operands])
    needs = [cat_needs(sizes, lo, hi) for lo, hi in pairwise(bounds)]
    got = []
    for i, (x, f) in enumerate(zip(parts, operands, strict=True)):
        got.append(s.move(x, dim, f, [need[i] for need in needs]))
    placement = s[parts[0]].with_dim(dim, [Factor(bounds[-1], axis, bounds)])
    return s.emit(placement, aten.cat.default, got, dim)


def _evenly(s: Sharder, x: Node, dim: int, axis: int | None) -> Node:
    assert axis is not None
    size = s[x].shape[dim]
    return s.rebound(x, dim, Factor(size, axis, even(size, s.mesh.shape[axis])))


def _common_tail(s: Sharder, parts: Sequence[Node], dim: int) -> Dim | None:
    """The split factors of `dim` that all parts have alike, each after whole ones at most."""
    found = set()
    for x in parts:
        first, *rest = s[x].dims[dim]
        found.add((first, *rest) if first.axis is not None else tuple(rest))
    tail = found.pop()
    return tail if tail and not found else None


@rule(aten.stack.default)
def stack(s: Sharder, node: Node) -> Node:
    parts = tensors(node)
    dim = integer(node, 1, "dim", 0) % (s[parts[0]].ndim + 1)
    reference = max((x for x in parts if x in s.placed), key=lambda x: prod(s[x].shape))
    target = s[reference]
    parts = [s.conform(x, target) for x in parts]
    dims = list(target.dims)
    dims.insert(dim, (Factor(len(parts)),))
    return s.emit(Placement(tuple(dims)), aten.stack.default, parts, dim)


@rule(aten.repeat.default)
def repeat(s: Sharder, node: Node) -> Node:
    x, times = tensor(node), integers(node, 1, "repeats")
    new = len(times) - s[x].ndim
    placement = Placement(Placement.whole(times[:new]).dims + s[x].dims)
    for d, t in enumerate(times[new:], new):
        if t != 1:
            placement = placement.with_dim(d, [Factor(t), *placement.dims[d]])
    return s.again(node, placement)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(s: Sharder, node: Node) -> Node:
    x, times = tensor(node), integer(node, 1, "repeats")
    if argument(node, 2, "dim") is None:
        raise ComputeWhole("repeat_interleave without a dimension flattens")
    dim = integer(node, 2, "dim") % s[x].ndim
    placement = s[x].with_dim(dim, [*s[x].dims[dim], Factor(times)])
    return s.emit(placement, aten.repeat_interleave.self_int, x, times, dim)


@rule(aten.roll.default)
def roll(s: Sharder, node: Node) -> Node:
    x, dims = tensor(node), integers(node, 2, "dims")
    if not dims:
        raise ComputeWhole("roll without dimensions flattens")
    for dim, shift in zip(dims, integers(node, 1, "shifts"), strict=True):
        dim %= s[x].ndim
        factor = s[x].one(dim)
        if not s[x].splits(dim):
            x = s.emit(s[x], aten.roll.default, x, [shift], [dim])
        elif factor is None or s.patch:
            raise ComputeWhole("it rolls a dimension that is split within")
        else:
            need = [(lo - shift, hi - shift) for lo, hi in factor.spans]
            x = s.place(s.move(x, dim, factor, need, "circular"), s[x])
    return x


@rule(aten.slice_scatter.default)
def slice_scatter(s: Sharder, node: Node) -> Node:
    x, source = tensor(node), tensor(node, 1)
    dim = integer(node, 2, "dim", 0) % s[x].ndim
    factor = s[x].segments(dim)
    if factor is not None and not s.patch and integer(node, 5, "step", 1) == 1:
        return _scattered(s, x, source, dim, factor, argument(node, 3, "start"), argument(node, 4, "end"))
    if s[x].splits(dim) or s[source].splits(dim):
        x, source = s.whole(x, [dim]), s.whole(source, [dim])
    placement = broadcast_but(s, x, source, dim)
    x = s.conform(x, placement)
    source = s.conform(source, placement.with_dim(dim, s[source].dims[dim]))
    return s.again(node, placement, {tensor(node): x, tensor(node, 1): source})


def _scattered(s: Sharder, x: Node, source: Node, dim: int, factor: Factor, start: Any, stop: Any) -> Node:
    """`x` with `[start, stop)` of a split dimension written: each rank writes what it holds of that."""
    start, stop, _ = slice(start, stop).indices(factor.size)
    part, rows = _held_of(factor, s.rank(factor), start, stop)
    placement = broadcast_but(s, x, source, dim)
    x = s.conform(x, placement)
    source = s.conform(source, placement.with_dim(dim, [part]))
    at = 0
    for lo, hi in rows:  # empty ones too: on every rank the source is read, and so fetched
        piece = s.build(aten.slice.Tensor, source, dim, at, at + hi - lo)
        x = s.build(aten.slice_scatter.default, x, piece, dim, lo, hi)
        at += hi - lo
    return s.place(x, placement)


def broadcast_but(s: Sharder, x: Node, other: Node, dim: int) -> Placement:
    """Where `x` lies, or else `other`, in every dimension but one."""
    dims = [a if any(f.axis is not None for f in a) else b for a, b in zip(s[x].dims, s[other].dims, strict=True)]
    dims[dim] = s[x].dims[dim]
    return Placement(tuple(dims))


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_like(s: Sharder, node: Node) -> Node:
    """They take dtype and device of their operand, and no value: whole on every rank."""
    return s.again(node, Placement.whole(value(node).shape))
