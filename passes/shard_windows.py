"""Sharding rules of ops that read a window around each position: convolution, pooling, interpolation, padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch.fx import Node

from pvae.passes.index_map import IndexMap, Local, Pool, Resample, Transposed, Window, follow, locals_of, pad
from pvae.passes.ir import CONVS, ConvNode, PadNode, aten, per_dim, value
from pvae.passes.placement import Factor, Interval, Placement, clip, spanning
from pvae.passes.shard_views import reshaped
from pvae.passes.sharder import ComputeWhole, Sharder, argument, integer, integers, rule, tensor
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import Fill
from pvae.runtime.resample import weighted_rows

CONV_OF = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}
AVERAGES = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
MAXIMA = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
NEAREST = {
    aten.upsample_nearest1d.vec: "nearest",
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_nearest3d.vec: "nearest",
    aten._upsample_nearest_exact1d.vec: "nearest-exact",
    aten._upsample_nearest_exact2d.vec: "nearest-exact",
    aten._upsample_nearest_exact3d.vec: "nearest-exact",
}
FILLS: Mapping[str, Fill] = {
    "constant": "zeros",
    "replicate": "replicate",
    "reflect": "reflect",
    "circular": "circular",
}
LINEAR = frozenset({aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec})


Ops = Mapping[int, tuple[IndexMap, Fraction]]
NO_FILLS: Mapping[int, Fill] = {}


@dataclass(frozen=True)
class Reach:
    """The operand of an op with all that its windows reach, where the result lies, and what remains to be done.

    `local` has what this rank does along a dimension of `x`: along the split ones, in patch form along none.
    """

    x: Node
    placement: Placement
    local: Mapping[int, Local]

    def finish(self, s: Sharder, result: Node, channels: int | None = None) -> Node:
        """The op's result, cut to this rank's piece of it; `channels` where the op changes them."""
        for dim, mine in self.local.items():
            result = s.crop(result, dim, mine.crop)
        return s.place(result, self.placement if channels is None else self.placement.with_dim(1, [Factor(channels)]))


def reach(
    s: Sharder, node: Node, x: Node, ops: Ops, fills: Mapping[int, Fill] = NO_FILLS, inside: bool = False
) -> Reach:
    """Fetch what a piece of `node`'s result reads of `x` along the dimensions of `ops`, where they are split.

    Args:
        ops: by dimension, what `node` does along it and how many output rows it makes of an input row.
        fills: by dimension, what stands outside of `x`; zeros where nothing is said.
        inside: rows of `x` alone are fetched; whoever calls fills what lies outside.
    """
    held, placement, local = s[x], s[x], {}
    for dim, (op, rate) in ops.items():
        factor = held.one(dim)
        if factor is None:
            require_whole(s, x, dim, "a dimension that it works along")
            placement = placement.with_dim(dim, [Factor(value(node).shape[dim])])
            continue
        out, locals_ = output_factor(s, factor, op, rate)
        placement = placement.with_dim(dim, [out])
        if locals_:
            need = [clip(one.need, factor.size)[0] if inside else one.need for one in locals_]
            x = s.move(x, dim, factor, need, fills.get(dim, "zeros"), held.dims[dim])
            local[dim] = locals_[s.rank(factor)]
    return Reach(x, placement, local)


def output_factor(s: Sharder, factor: Factor, op: IndexMap, rate: Fraction) -> tuple[Factor, tuple[Local, ...]]:
    """How the output is split, and what each rank does for its piece. `rate`: output rows an input row.

    In patch form nothing is fetched: the op runs on what a rank holds, as if that were the whole, and there are no locals.
    """
    assert factor.axis is not None
    bounds = follow(op, factor.bounds)
    if not s.patch:
        return Factor(bounds[-1], factor.axis, bounds), locals_of(op, factor.size, bounds)
    spans: list[Interval] = []
    for (lo, hi), own in zip(factor.spans, pairwise(bounds), strict=True):
        if lo == hi:
            spans.append(own)
            continue
        start = lo * rate
        if start.denominator > 1:
            raise ComputeWhole(f"a patch that starts at row {lo} does not start at a row of its output")
        rows = (hi - lo) * rate if isinstance(op, Resample) else op.size(hi - lo)
        if rows != int(rows):
            raise ComputeWhole("a patch does not scale to a whole number of rows")
        spans.append((int(start), int(start) + int(rows)))
    try:
        return spanning(bounds[-1], factor.axis, bounds, spans), ()
    except ValueError as error:
        raise ComputeWhole(f"patches lose more rows than they have context for ({error})") from None


def require_whole(s: Sharder, x: Node, dim: int, what: str) -> None:
    if s[x].splits(dim):
        raise ComputeWhole(f"{what} is split")


@rule(*CONVS)
def convolution(s: Sharder, node: Node) -> Node:
    conv = ConvNode.of(node)
    assert conv is not None
    require_whole(s, conv.x, 1, "its channel dimension")
    before = s.left_to.pop(node, None) or PadBefore(conv.x)
    windows: dict[int, tuple[IndexMap, Fraction]] = {}
    for i, (kernel, stride, dilation, own) in enumerate(
        zip(conv.kernel, conv.stride, conv.dilation, conv.padding, strict=True), 2
    ):
        windows[i] = Window(kernel, stride, dilation, before.widths.get(i, own)), Fraction(1, stride)
    found = reach(s, node, before.x, windows, dict.fromkeys(before.widths, before.fill))
    rest = {i: pair for i, pair in before.widths.items() if i not in found.local}
    x = padded(s, found.x, rest, before.named, before.mode)
    padding = {i: p for i, p in enumerate(conv.padding, 2) if i not in found.local and i not in before.widths}
    x = padded(s, x, {i: p for i, p in padding.items() if p[0] != p[1]}, conv.ndim, "constant")
    symmetric = [padding[i][0] if i in padding and padding[i][0] == padding[i][1] else 0 for i in windows]
    settings = list(conv.stride), symmetric, list(conv.dilation), conv.groups
    result = s.build(CONV_OF[conv.ndim], x, conv.weight, conv.bias, *settings)
    return found.finish(s, result, channels=conv.out_channels)


@dataclass(frozen=True)
class PadBefore:
    """A pad that a convolution does itself: of `x`, by dimension (front, back). One fetch then brings rows and fill."""

    x: Node
    widths: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    mode: str = "constant"
    named: int = 0  # how many dimensions the pad names, counted from the last

    @property
    def fill(self) -> Fill:
        return FILLS[self.mode]


def _leaves_to_convolution(s: Sharder, found: PadNode) -> PadBefore | None:
    """`found` as a part of the one convolution that reads it, where that pads nothing itself along these dimensions."""
    users = list(found.node.users)
    conv = ConvNode.of(users[0]) if len(users) == 1 else None
    widths = _widths(s, found)
    exact = found.mode in FILLS and (found.mode != "constant" or found.fill == 0.0) and not s.patch
    if conv is None or conv.x is not found.node or conv.weight is found.node or not exact:
        return None
    if any(dim < 2 or any(conv.padding[dim - 2]) for dim in widths):
        return None
    placement = s[found.x]
    if placement.splits(1) or any(placement.splits(d) and not placement.one(d) for d in range(2, placement.ndim)):
        return None  # the convolution will be computed whole, and must find its operand padded
    return PadBefore(found.x, widths, found.mode, len(found.pads))


def _widths(s: Sharder, found: PadNode) -> dict[int, tuple[int, int]]:
    ndim = s[found.x].ndim
    return {ndim - 1 - i: pair for i, pair in enumerate(found.pads) if any(pair)}


def padded(
    s: Sharder, x: Node, widths: Mapping[int, tuple[int, int]], named: int, mode: str, constant: float = 0.0
) -> Node:
    """`x` padded along dimensions that a rank has whole, by a pad that names so many. Not placed."""
    widths = {dim: pair for dim, pair in widths.items() if any(pair)}
    if not widths:
        return x
    if mode != "constant" and not value(x).numel():  # torch pads no empty tensor so
        for dim, (front, back) in widths.items():
            rows = value(x).shape[dim]
            x = s.build(fetch, x, dim, (0, rows), ((-front, rows + back),), 0, FILLS[mode])
        return x
    ndim = value(x).dim()
    flat = [n for dim in reversed(range(ndim - named, ndim)) for n in widths.get(dim, (0, 0))]
    return s.build(aten.pad.default, x, flat, mode, constant if mode == "constant" else None)


@rule(*TRANSPOSED)
def transposed_convolution(s: Sharder, node: Node) -> Node:
    ndim, x, weight = TRANSPOSED[node.target], tensor(node), tensor(node, 1)
    require_whole(s, x, 1, "its channel dimension")
    names = ("stride", 1), ("padding", 0), ("output_padding", 0)
    stride, padding, extra = (list(per_dim(integers(node, i, *n), ndim)) for i, n in enumerate(names, 3))
    groups, dilation = integer(node, 6, "groups", 1), list(per_dim(integers(node, 7, "dilation", 1), ndim))
    windows = zip(value(weight).shape[2:], stride, dilation, padding, extra, strict=True)
    found = reach(s, node, x, {i: (Transposed(*w), Fraction(w[1])) for i, w in enumerate(windows, 2)})
    for dim in found.local:
        padding[dim - 2] = extra[dim - 2] = 0
    assert callable(node.target)
    settings = stride, padding, extra, groups, dilation
    result = s.build(node.target, found.x, weight, argument(node, 2, "bias"), *settings)
    return found.finish(s, result, channels=value(node).shape[1])


@rule(*AVERAGES, *MAXIMA)
def pooling(s: Sharder, node: Node) -> Node:
    average, x = node.target in AVERAGES, tensor(node)
    ndim = AVERAGES[node.target] if average else MAXIMA[node.target]
    kernel = per_dim(integers(node, 1, "kernel_size"), ndim)
    stride = per_dim(integers(node, 2, "stride") or kernel, ndim)
    padding = per_dim(integers(node, 3, "padding", 0), ndim)
    dilation = per_dim([1] if average else integers(node, 4, "dilation", 1), ndim)
    ceil_mode = bool(argument(node, 4 if average else 5, "ceil_mode", False))
    windows = zip(kernel, stride, dilation, [(p, p) for p in padding], strict=True)
    first = s[x].ndim - ndim  # there may be no batch
    require_whole(s, x, first - 1, "its channel dimension")  # else a rank may have none, which torch does not pool
    found = reach(s, node, x, {i: (Pool(*w, ceil_mode), Fraction(1, w[1])) for i, w in enumerate(windows, first)})
    assert callable(node.target)
    return found.finish(s, s.build(node.target, found.x, *node.args[1:], **node.kwargs))


@rule(*NEAREST, *LINEAR)
def interpolation(s: Sharder, node: Node) -> Node:
    x, linear = tensor(node), node.target in LINEAR
    require_whole(s, x, 1, "its channel dimension")  # else a rank may have none, which torch does not resize
    mode: Any = "linear" if linear else NEAREST[node.target]
    align = bool(argument(node, 2, "align_corners", False)) if linear else False
    given = argument(node, 3 if linear else 2, "scale_factors")
    scales = list(given or ())
    ops = {}
    for i, out in enumerate(value(node).shape[2:]):
        op = Resample(mode, out, scales[i] if scales else None, align)
        ops[2 + i] = op, Fraction(out, s[x].shape[2 + i])
    found = reach(s, node, x, ops)
    size = list(found.placement.local(s.mesh.coordinates)[2:])
    taps = {}
    for dim, mine in found.local.items():
        if mine.taps:  # the op, if it has other dimensions to do, leaves this one alone
            taps[dim] = tuple((tap.index, tap.weight) for tap in mine.taps)
            size[dim - 2] = value(found.x).shape[dim]
            if scales:
                scales[dim - 2] = 1.0
        else:
            size[dim - 2] += sum(mine.crop)
    result = found.x
    if len(taps) < len(size):
        flags = [align] if linear else []
        assert callable(node.target)
        where = [None, *flags, scales] if scales else [size, *flags, None]
        result = s.build(node.target, result, *where)
    for dim, rows in taps.items():
        result = s.build(weighted_rows, result, dim, rows)
    return found.finish(s, result)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def padding_rule(s: Sharder, node: Node) -> Node:
    found = PadNode.of(node)
    if found is None:
        raise ComputeWhole("its widths are symbolic")
    left = _leaves_to_convolution(s, found)
    if left is not None:
        s.left_to[next(iter(node.users))] = left
        return found.x
    widths = _widths(s, found)
    constant = found.mode == "constant" and found.fill != 0.0
    ops = {dim: (pad(*pair), Fraction(1)) for dim, pair in widths.items()}
    reached = reach(s, node, found.x, ops, dict.fromkeys(widths, FILLS[found.mode]), inside=constant)
    for dim, mine in reached.local.items():
        widths[dim] = clip(mine.need, s[found.x].shape[dim])[1] if constant else (0, 0)
    return reached.finish(s, padded(s, reached.x, widths, len(found.pads), found.mode, found.fill))


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    r = integer(node, 1, "factor")
    require_whole(s, x, s[x].ndim - 3, "its channel dimension")
    *batch, c, h, w = s[x].shape
    k = len(batch)
    y = reshaped(s, x, (*batch, c // r**2, r, r, h, w))
    order = [*range(k), k, k + 3, k + 1, k + 4, k + 2]
    y = s.emit(s[y].permuted(order), aten.permute.default, y, order)
    return reshaped(s, y, (*batch, c // r**2, h * r, w * r))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    r = integer(node, 1, "factor")
    require_whole(s, x, s[x].ndim - 3, "its channel dimension")
    *batch, c, h, w = s[x].shape
    k = len(batch)
    y = reshaped(s, x, (*batch, c, h // r, r, w // r, r))
    order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
    y = s.emit(s[y].permuted(order), aten.permute.default, y, order)
    return reshaped(s, y, (*batch, c * r**2, h // r, w // r))
