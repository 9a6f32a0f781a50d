"""Sharding rules of ops that read a window around each position: convolution, pooling, interpolation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch.fx import Node

from pvae.passes.index_map import IndexMap, Local, Pool, Resample, Transposed, Window, follow, locals_of, pad
from pvae.passes.ir import CONVS, ConvNode, PadNode, aten, value
from pvae.passes.placement import Factor, Interval, Placement, clip, spanning
from pvae.passes.sharder import ComputeWhole, Sharder, rule
from pvae.passes.shard_views import argument, reshaped, tensor
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
LINEAR = frozenset({aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec})


def per_dim(values: Any, ndim: int) -> tuple[int, ...]:
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * ndim if len(values) == 1 else values


def split_factor(s: Sharder, x: Node, dim: int) -> Factor | None:
    """The split factor that is dimension `dim`, None where it is whole."""
    if not s[x].splits(dim):
        return None
    factor = s[x].one(dim)
    if factor is None:
        raise ComputeWhole("it works along a dimension that is split within")
    return factor


def output_factor(s: Sharder, factor: Factor, op: IndexMap, rate: Fraction) -> tuple[Factor, tuple[Local, ...]]:
    """How the output is split, and what each rank does for its piece. `rate`: output rows an input row.

    In patch form nothing is fetched: the op runs on what a rank holds, as if that were the whole, and there are no locals.
    """
    assert factor.axis is not None
    bounds = follow(op, factor.bounds)
    if not s.patch:
        return Factor(bounds[-1], factor.axis, bounds), locals_of(op, factor.size, bounds)
    spans: list[Interval] = []
    for (lo, hi), own in zip(factor.spans, zip(bounds, bounds[1:], strict=False), strict=True):
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


def require_whole(s: Sharder, x: Node, dims: Sequence[int], what: str) -> None:
    if any(s[x].splits(d) for d in dims):
        raise ComputeWhole(f"{what} is split")


@rule(*CONVS)
def convolution(s: Sharder, node: Node) -> Node:
    conv = ConvNode.of(node)
    assert conv is not None
    x, first = conv.x, s[conv.x].ndim - conv.ndim
    require_whole(s, x, [1], "its channel dimension")
    placement = s[x].with_dim(1, [Factor(conv.out_channels)])
    padding, crops = list(conv.padding), [(0, 0)] * conv.ndim
    for i in range(conv.ndim):
        factor = split_factor(s, x, first + i)
        if factor is None:
            placement = placement.with_dim(first + i, [Factor(value(node).shape[first + i])])
            continue
        op = Window(conv.kernel[i], conv.stride[i], conv.dilation[i], conv.padding[i])
        out, locals_ = output_factor(s, factor, op, Fraction(1, conv.stride[i]))
        placement = placement.with_dim(first + i, [out])
        if locals_:
            x = fetched(s, x, first + i, factor, [one.need for one in locals_])
            padding[i], crops[i] = (0, 0), locals_[s.coordinate(factor.axis)].crop  # type: ignore[index]
    uneven = [p if p[0] != p[1] else (0, 0) for p in padding]
    if any(map(any, uneven)):
        x = s.build(aten.pad.default, x, [n for p in reversed(uneven) for n in p])
    symmetric = [p[0] if p[0] == p[1] else 0 for p in padding]
    settings = list(conv.stride), symmetric, list(conv.dilation), conv.groups
    out_node = s.build(CONV_OF[conv.ndim], x, conv.weight, conv.bias, *settings)
    for i, rows in enumerate(crops):
        out_node = s.crop(out_node, first + i, rows)
    return s.place(out_node, placement)


def fetched(
    s: Sharder, x: Node, dim: int, factor: Factor, need: Sequence[Interval], fill: Fill = "zeros"
) -> Node:
    """`x` with the rows `need` of a split dimension, as a node that may be fetched along another one next.

    Its placement states what is held, rows beyond the edges included, so it is for the op at hand only.
    """
    got = s.move(x, dim, factor, need, fill)
    if got is not x:
        others = [d for d in range(s[x].ndim) if d != dim and s[x].splits(d)]
        held = Placement.whole([n if d not in others else s[x].shape[d] for d, n in enumerate(value(got).shape)])
        for d in others:
            held = held.with_dim(d, s[x].dims[d])
        s.place(got, held)
    return got


@rule(*TRANSPOSED)
def transposed_convolution(s: Sharder, node: Node) -> Node:
    ndim = TRANSPOSED[node.target]
    x, weight = tensor(node), tensor(node, 1)
    names = (("bias", None), ("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
    bias, stride, padding, extra, groups, dilation = (argument(node, i, n, v) for i, (n, v) in enumerate(names, 2))
    stride, padding, extra, dilation = (list(per_dim(v, ndim)) for v in (stride, padding, extra, dilation))
    first = s[x].ndim - ndim
    require_whole(s, x, [1], "its channel dimension")
    placement, crops = s[x].with_dim(1, [Factor(value(node).shape[1])]), [(0, 0)] * ndim
    for i in range(ndim):
        factor = split_factor(s, x, first + i)
        if factor is None:
            placement = placement.with_dim(first + i, [Factor(value(node).shape[first + i])])
            continue
        op = Transposed(value(weight).shape[2 + i], stride[i], dilation[i], padding[i], extra[i])
        out, locals_ = output_factor(s, factor, op, Fraction(stride[i]))
        placement = placement.with_dim(first + i, [out])
        if locals_:
            x = fetched(s, x, first + i, factor, [one.need for one in locals_])
            padding[i], extra[i], crops[i] = 0, 0, locals_[s.coordinate(factor.axis)].crop  # type: ignore[index]
    assert callable(node.target)
    out_node = s.build(node.target, x, weight, bias, stride, padding, extra, groups, dilation)
    for i, rows in enumerate(crops):
        out_node = s.crop(out_node, first + i, rows)
    return s.place(out_node, placement)


@rule(*AVERAGES, *MAXIMA)
def pooling(s: Sharder, node: Node) -> Node:
    average = node.target in AVERAGES
    ndim = AVERAGES[node.target] if average else MAXIMA[node.target]
    x = tensor(node)
    kernel = per_dim(node.args[1], ndim)
    stride = per_dim(argument(node, 2, "stride", ()) or kernel, ndim)
    padding = per_dim(argument(node, 3, "padding", 0), ndim)
    dilation = (1,) * ndim if average else per_dim(argument(node, 4, "dilation", 1), ndim)
    ceil_mode = bool(argument(node, 4 if average else 5, "ceil_mode", False))
    first = s[x].ndim - ndim
    placement, crops = s[x], [(0, 0)] * ndim
    for i in range(ndim):
        factor = split_factor(s, x, first + i)
        if factor is None:
            placement = placement.with_dim(first + i, [Factor(value(node).shape[first + i])])
            continue
        op = Pool(kernel[i], stride[i], dilation[i], (padding[i], padding[i]), ceil_mode)
        out, locals_ = output_factor(s, factor, op, Fraction(1, stride[i]))
        placement = placement.with_dim(first + i, [out])
        if locals_:
            x = fetched(s, x, first + i, factor, [one.need for one in locals_])
            crops[i] = locals_[s.coordinate(factor.axis)].crop  # type: ignore[index]
    assert callable(node.target)
    out_node = s.build(node.target, x, *node.args[1:], **node.kwargs)
    for i, rows in enumerate(crops):
        out_node = s.crop(out_node, first + i, rows)
    return s.place(out_node, placement)


@rule(*NEAREST, *LINEAR)
def interpolation(s: Sharder, node: Node) -> Node:
    linear = node.target in LINEAR
    mode: Any = "linear" if linear else NEAREST[node.target]
    x = tensor(node)
    align = bool(argument(node, 2, "align_corners", False)) if linear else False
    scales = argument(node, 3 if linear else 2, "scale_factors")
    ndim = s[x].ndim - 2
    size = [value(node).shape[2 + i] for i in range(ndim)]
    scales = None if scales is None else list(per_dim(scales, ndim)) if not isinstance(scales, float) else [scales] * ndim
    placement, crops, taps = s[x], [(0, 0)] * ndim, {}
    for i in range(ndim):
        dim = 2 + i
        factor = split_factor(s, x, dim)
        if factor is None:
            placement = placement.with_dim(dim, [Factor(size[i])])
            continue
        op = Resample(mode, size[i], None if scales is None else scales[i], align)
        out, locals_ = output_factor(s, factor, op, Fraction(size[i], factor.size))
        placement = placement.with_dim(dim, [out])
        if not locals_:
            size[i] = out.held(s.mesh.coordinates)
            continue
        x = fetched(s, x, dim, factor, [one.need for one in locals_])
        mine = locals_[s.coordinate(factor.axis)]  # type: ignore[index]
        crops[i] = mine.crop
        rows = mine.need[1] - mine.need[0]
        if mine.taps:
            taps[dim] = mine.taps
            size[i] = rows
            if scales is not None:
                scales[i] = 1.0
        elif mine.need != (0, factor.size):
            size[i] = rows * size[i] // factor.size
    tail = [align] if linear else []
    assert callable(node.target)
    out_node = x
    if len(taps) < ndim:
        where = [None, *tail, scales] if scales is not None else [size, *tail, None]
        out_node = s.build(node.target, x, *where)
    for dim, rows_of in taps.items():
        out_node = s.build(weighted_rows, out_node, dim, tuple((tap.index, tap.weight) for tap in rows_of))
    for i, rows_cut in enumerate(crops):
        out_node = s.crop(out_node, 2 + i, rows_cut)
    return s.place(out_node, placement)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def padding_rule(s: Sharder, node: Node) -> Node:
    padded = PadNode.of(node)
    if padded is None:
        raise ComputeWhole("its widths are symbolic")
    x, ndim = padded.x, s[padded.x].ndim
    widths, crops = list(padded.pads), {}
    constant = padded.mode == "constant" and padded.fill != 0.0
    fill: Any = "zeros" if padded.mode == "constant" else padded.mode
    placement = s[x]
    for i, (front, back) in enumerate(padded.pads):
        dim = ndim - 1 - i
        factor = split_factor(s, x, dim) if front or back else None
        if factor is None:
            placement = placement.with_dim(dim, s[x].dims[dim] if s[x].splits(dim) else [Factor(value(node).shape[dim])])
            continue
        out, locals_ = output_factor(s, factor, pad(front, back), Fraction(1))
        placement = placement.with_dim(dim, [out])
        if not locals_:
            continue
        mine, need = locals_[s.coordinate(factor.axis)], [one.need for one in locals_]  # type: ignore[arg-type]
        widths[i] = clip(mine.need, factor.size)[1] if constant else (0, 0)
        x = fetched(s, x, dim, factor, [clip(n, factor.size)[0] for n in need] if constant else need, fill)
        crops[dim] = mine.crop
    if padded.mode != "constant" and not value(x).numel():  # torch pads no empty tensor so
        for i, (front, back) in enumerate(widths):
            if front or back:
                rows = value(x).shape[ndim - 1 - i]
                x = s.build(fetch, x, ndim - 1 - i, (0, rows), ((-front, rows + back),), 0, fill)
    elif any(map(any, widths)):
        flat = [n for pair in widths for n in pair]
        x = s.build(aten.pad.default, x, flat, padded.mode, padded.fill if padded.mode == "constant" else None)
    for dim, rows in crops.items():
        x = s.crop(x, dim, rows)
    return s.place(x, placement)


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(s: Sharder, node: Node) -> Node:
    x, r = tensor(node), int(node.args[1])  # type: ignore[arg-type]
    require_whole(s, x, [s[x].ndim - 3], "its channel dimension")
    *batch, c, h, w = s[x].shape
    k = len(batch)
    y = reshaped(s, x, (*batch, c // r**2, r, r, h, w))
    order = [*range(k), k, k + 3, k + 1, k + 4, k + 2]
    y = s.emit(s[y].permuted(order), aten.permute.default, y, order)
    return reshaped(s, y, (*batch, c // r**2, h * r, w * r))


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(s: Sharder, node: Node) -> Node:
    x, r = tensor(node), int(node.args[1])  # type: ignore[arg-type]
    require_whole(s, x, [s[x].ndim - 3], "its channel dimension")
    *batch, c, h, w = s[x].shape
    k = len(batch)
    y = reshaped(s, x, (*batch, c, h // r, r, w // r, r))
    order = [*range(k), k, k + 2, k + 4, k + 1, k + 3]
    y = s.emit(s[y].permuted(order), aten.permute.default, y, order)
    return reshaped(s, y, (*batch, c * r**2, h // r, w // r))
