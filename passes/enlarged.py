"""A value that is another one enlarged by nearest neighbours along rows and columns, however that is written.

    upsample_nearest(x)     repeat_interleave(x)     cat([upsample_nearest(a), upsample_nearest(b)], 2)

What stands behind the enlargement and treats rows and columns alike may as well be done before it: casts, sums with and
products by a number, views between video and frames, `cat` of enlarged frames, enlargement in time, pads, and a sharded
graph's fetch of halo rows. `Enlarged.low` is the small value, all that done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.ir import CATS, Builder, PadNode, aten, known, value
from pvae.runtime.fetch import fetch

LARGEST = 40  # so many times: ATen finds entry i // 41 by i * fp32(1 / 41), which is one too few at i = 41

UPSAMPLES = frozenset(  # by whole numbers, `nearest` and `nearest-exact` read the same entries
    {
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest3d.vec,
        aten._upsample_nearest_exact2d.vec,
        aten._upsample_nearest_exact3d.vec,
    }
)
CASTS = (aten.to.dtype, aten._to_copy.default)

Low = Callable[[Builder], Node]
Crop = tuple[tuple[int, int], tuple[int, int]]
NOTHING: Crop = (0, 0), (0, 0)


@dataclass(frozen=True)
class Enlarged:
    """A value that is `low`, which a builder can add, enlarged `factors` times along rows and columns, less `crop`: rows
    (front, back) and columns, each less than the factor."""

    low: Low
    factors: tuple[int, int]
    crop: Crop = NOTHING

    def after(self, step: Callable[[Builder, Node], Node], crop: Crop | None = None) -> Enlarged:
        """What a step makes of it that may as well be done before the enlargement."""
        return replace(self, low=lambda build: step(build, self.low(build)), crop=self.crop if crop is None else crop)


def enlarged(node: object, shared: bool = False) -> Enlarged | str | None:
    """How `node` is a value enlarged; a text if it is one that cannot be had smaller, and why; None if it is none.

    Where others read the enlarged value too it is made in any case: reason enough not to, unless `shared`.
    """
    if not isinstance(node, Node) or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    found = _upsampled(node) or _interleaved(node, shared) or _passed_on(node, shared)
    if isinstance(found, Enlarged) and len(node.users) > 1 and not shared:
        return f"the enlarged activation has {len(node.users)} readers"
    return found


def _upsampled(node: Node) -> Enlarged | str | None:
    """`upsample_nearest(x)` by whole numbers in H and W, and by anything in time: that stays, on the small picture."""
    if node.target not in UPSAMPLES:
        return None
    x, sizes, scales = (*node.args, None, None)[:3]
    assert isinstance(x, Node)
    before, after = value(x).shape[2:], value(node).shape[2:]
    given = scales if isinstance(scales, Sequence) else [None] * len(before)
    factors = [_factor(*along) for along in zip(given, before, after, strict=True)]
    rows, columns = factors[-2:]
    if rows is None or columns is None:
        return f"enlarges {_by(before)} to {_by(after)}, not rows and columns by whole numbers up to {LARGEST}"
    if (rows, columns) == (1, 1):
        return None
    if len(before) == 2 or factors[0] == 1:
        return Enlarged(lambda build: x, (rows, columns))

    def in_time(build: Builder) -> Node:
        assert callable(node.target)
        if isinstance(scales, Sequence):
            return build(node.target, x, None, [scales[0], 1.0, 1.0])
        assert isinstance(sizes, Sequence)
        return build(node.target, x, [sizes[0], *_rows_and_columns(build, x)], None)

    return Enlarged(in_time, (rows, columns))


def _factor(scale: Any, before: Any, after: Any) -> int | None:
    """How many times larger `after` is, by the `scale` that was given if one was: a whole number, or None."""
    if scale is not None:
        return int(scale) if isinstance(scale, (int, float)) and scale in range(1, LARGEST + 1) else None
    if isinstance(before, int) and isinstance(after, int):
        return after // before if before and not after % before and 0 < after // before <= LARGEST else None
    return next((factor for factor in range(1, LARGEST + 1) if known(factor * before == after)), None)


def _by(sizes: Sequence[Any]) -> str:
    return "x".join(map(str, sizes))


def _rows_and_columns(build: Builder, x: Node) -> list[Any]:
    ndim = value(x).dim()
    return [build.size(x, ndim - 2), build.size(x, ndim - 1)]


def _interleaved(node: Node, shared: bool) -> Enlarged | str | None:
    """`x.repeat_interleave(rows, H).repeat_interleave(columns, W)`, in either order."""
    outer = _repeats(node)
    inner = _repeats(node.args[0]) if outer else None
    if outer is None or inner is None or {outer[0], inner[0]} != {-2, -1}:
        return None
    between, x = node.args[0], node.args[0].args[0]
    assert isinstance(between, Node) and isinstance(x, Node)
    if len(between.users) > 1 and not shared:
        return f"the enlarged activation has {len(between.users)} readers"
    times = dict((outer, inner))
    return Enlarged(lambda build: x, (times[-2], times[-1]))


def _repeats(node: object) -> tuple[int, int] | None:
    """(dimension counted from the last, how often) of a `repeat_interleave` by a number."""
    if not isinstance(node, Node) or node.target is not aten.repeat_interleave.self_int:
        return None
    times, dim = (*node.args, None)[1:3]
    ndim = value(node).dim()
    return (dim % ndim - ndim, times) if isinstance(dim, int) and isinstance(times, int) and times > 0 else None


def _passed_on(node: Node, shared: bool) -> Enlarged | str | None:
    """What an op makes of its enlarged operand, if it is one that may treat rows and columns alike."""
    if node.target in CATS:
        return _joined(node, shared)
    step = STEPS.get(node.target)
    found = enlarged(node.args[0], shared) if step is not None else None
    return step(node, found) if step is not None and isinstance(found, Enlarged) else found


def _cast_step(node: Node, found: Enlarged) -> Enlarged | str:
    x: Any = node.args[0]
    if value(node).device != value(x).device:
        return "the enlarged activation goes to another device"
    return found.after(lambda build, low: _cast(build, low, value(node).dtype))


def _cast(build: Builder, x: Node, dtype: torch.dtype) -> Node:
    """x in `dtype`; the way to a wider type and back is not gone."""
    if value(x).dtype == dtype:
        return x
    source = x.args[0] if x.target in CASTS else None
    if isinstance(source, Node) and value(source).dtype == dtype and value(source).device == value(x).device:
        floats = dtype.is_floating_point and value(x).dtype.is_floating_point
        if floats and torch.promote_types(dtype, value(x).dtype) == value(x).dtype:
            return source
    return build(aten.to.dtype, x, dtype)


def _with_number(node: Node, found: Enlarged) -> Enlarged | str | None:
    """`x + 1` and `x * 2`."""
    target, others = node.target, node.args[1:]
    assert callable(target)
    if len(others) != 1 or not isinstance(others[0], (int, float)) or node.kwargs:
        return None
    return found.after(lambda build, low: build(target, low, *others))


def _permuted(node: Node, found: Enlarged) -> Enlarged | str:
    dims: Any = node.args[1]
    ndim = len(dims)
    if [d % ndim for d in dims[-2:]] != [ndim - 2, ndim - 1]:
        return "rows or columns of the enlarged activation change places"
    return found.after(lambda build, low: build(aten.permute.default, low, dims))


def _along_one(node: Node, found: Enlarged) -> Enlarged | str:
    """`squeeze`, `unsqueeze`, `select` or `slice` of a dimension before rows and columns."""
    target, rest = node.target, node.args[1:]
    assert callable(target)
    ndim = max(value(node).dim(), value(node.args[0]).dim())
    dim: Any = rest[0] if rest else node.kwargs.get("dim", 0)
    if dim % ndim >= ndim - 2:
        return "takes apart rows or columns of the enlarged activation"
    return found.after(lambda build, low: build(target, low, *rest, **node.kwargs))


def _reshaped(node: Node, found: Enlarged) -> Enlarged | str:
    x: Any = node.args[0]
    sizes: Any = node.args[1]
    before, after = value(x).shape, value(node).shape
    if len(after) < 2 or not all(known(a == b) for a, b in zip(before[-2:], after[-2:], strict=True)):
        return "rows and columns of the enlarged activation are reshaped"
    return found.after(
        lambda build, low: build(aten.reshape.default, low, [*sizes[:-2], *_rows_and_columns(build, low)])
    )


def _joined(node: Node, shared: bool) -> Enlarged | str | None:
    """`cat` of values all enlarged, along neither rows nor columns."""
    parts: Any = node.args[0]
    found = [enlarged(part, shared) for part in parts]
    whole = [part for part in found if isinstance(part, Enlarged)]
    reasons = [part for part in found if isinstance(part, str)]
    if reasons or not whole:
        return reasons[0] if reasons else None
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim % value(node).dim() >= value(node).dim() - 2:
        return "joined along rows or columns of the enlarged activation"
    if len(whole) != len(found):
        return "joined with what is not enlarged"
    if any(part.factors != whole[0].factors for part in whole):
        return "the joined activations are enlarged differently"
    if any(part.crop != whole[0].crop for part in whole):
        return "the joined activations are padded differently"
    return replace(whole[0], low=lambda build: build(aten.cat.default, [part.low(build) for part in whole], dim))


def _shrunk(front: int, back: int, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows of the small picture that hold so many of the enlarged one at either end, and how many are too many."""
    return (-(-front // factor), -(-back // factor)), (-front % factor, -back % factor)


def _padded(node: Node, found: Enlarged) -> Enlarged | str:
    """Zeros around the enlarged picture are zeros around the small one, and its repeated border is that one's."""
    pad = PadNode.of(node)
    if pad is None:
        return "the widths of the pad are symbolic"
    rows, cut_rows = _shrunk(*pad.along(1), found.factors[0])
    columns, cut_columns = _shrunk(*pad.along(0), found.factors[1])
    around = [any(pair) for pair in (rows, columns)]
    if any(wide and any(cut) for wide, cut in zip(around, found.crop, strict=True)):
        return "the enlarged activation is padded twice"
    if any(width < 0 for pair in pad.pads[:2] for width in pair):
        return "the pad crops (negative width)"
    if any(around) and pad.mode != "replicate" and (pad.mode != "constant" or pad.fill != 0.0):
        how = pad.mode if pad.mode != "constant" else f"by {pad.fill:g}"
        return f"pads the enlarged activation {how}"
    crop = (cut_rows if around[0] else found.crop[0]), (cut_columns if around[1] else found.crop[1])
    pairs = [columns, rows][: len(pad.pads)] + list(pad.pads[2:])
    widths = [width for pair in pairs for width in pair]
    fill = pad.fill if pad.mode == "constant" else None
    return found.after(lambda build, low: build(aten.pad.default, low, widths, pad.mode, fill), crop)


def _fetched(node: Node, found: Enlarged) -> Enlarged | str:
    """Rows of the enlarged picture come from the ranks that hold the small ones.

    All ranks must decide alike: they do so by the bounds and needs of all, never by their own piece.
    """
    x, dim, have, need, *rest = node.args
    given: Any = dim, have, need, node.kwargs.get("fill", rest[1] if len(rest) > 1 else "zeros")
    dim, bounds, needs, fill = given
    axis = dim % value(x).dim() - value(x).dim()
    if axis < -2:
        return found.after(lambda build, low: build(fetch, low, *node.args[1:], **node.kwargs))
    if found.crop[axis] != (0, 0):
        return "fetches rows of an enlarged activation that is padded"
    if len(needs) == 1:
        return "cuts the enlarged activation for this rank alone"
    factor = found.factors[axis]
    if any(b % factor for b in bounds) or any(a >= b for a, b in pairwise(bounds)):
        return f"the ranks hold rows {bounds} of the enlarged activation: not whole ones of the small one, or none"
    if fill not in ("zeros", "replicate"):
        return f"fetches {fill} beyond the border of the enlarged activation"
    crops = {(start % factor, -stop % factor) for start, stop in needs}
    if len(crops) > 1 or any(start >= stop for start, stop in needs):
        return f"the ranks fetch rows {needs} of the enlarged activation, not all alike"
    low = tuple(b // factor for b in bounds), tuple((start // factor, -(-stop // factor)) for start, stop in needs)
    crop = (crops.pop(), found.crop[1]) if axis == -2 else (found.crop[0], crops.pop())
    return found.after(lambda build, x: build(fetch, x, dim, *low, *rest, **node.kwargs), crop)


Step = Callable[[Node, Enlarged], Enlarged | str | None]
STEPS: Mapping[Any, Step] = {
    **dict.fromkeys(CASTS, _cast_step),
    **dict.fromkeys((aten.reshape.default, aten.view.default), _reshaped),
    **dict.fromkeys((aten.squeeze.dim, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor), _along_one),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _padded),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor), _with_number),
    aten.permute.default: _permuted,
    fetch: _fetched,
}
