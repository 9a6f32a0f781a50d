"""A 3x3 convolution of a picture enlarged twice becomes four 2x2 convolutions of the picture itself.

    conv(upsample_nearest2x(x), w) -> pvae::conv_taps(x, pvae::phase_weight(w), upsample=True)

4/9 of the arithmetic, and the enlarged activation, the largest of a decoder's level, is never written. The formula is in
kernels/phase_weight.py. What stands between the enlargement and the convolution is done before it instead, where it treats
rows and columns alike: casts (`upsample(x.float()).type_as(x)` has none then), views between video and frames, `cat` of
enlarged frames, enlargement in time, pads, and a sharded graph's fetch of halo rows.

A pad or fetch of one row of the enlarged picture takes one row of the small one, and the convolution's result, which then
has two rows too many on that side, is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import conv_taps
from pvae.kernels.channels_last import FORMATS
from pvae.kernels.phase_weight import OP as PHASE_WEIGHT
from pvae.passes.conv_rules import no_gain
from pvae.passes.ir import Builder, ConvNode, PadNode, aten, known, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule
from pvae.runtime.fetch import fetch

CHANNELS = 64  # from so many the phases are chosen by themselves

UPSAMPLES = (  # by 2, `nearest` and `nearest-exact` read the same entries
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
)
CASTS = (aten.to.dtype, aten._to_copy.default)

Low = Callable[[Builder], Node]
Crop = tuple[tuple[int, int], tuple[int, int]]
NOTHING: Crop = (0, 0), (0, 0)


def pays(conv: ConvNode) -> str | None:
    """None if the phases are the faster form of `conv`, else why they are not chosen by themselves.

    On GPUs in half precision a convolution of 64 and more channels is bound by arithmetic, of which this saves 5/9.
    """
    x = value(conv.x)
    reason = no_gain(x)
    if reason is not None:
        return reason
    if conv.in_channels < CHANNELS:
        return f"{conv.in_channels} channels: no gain measured below {CHANNELS}"
    return conv_taps.supports(x, value(conv.weight), conv.groups)


@dataclass(frozen=True)
class Enlarged:
    """A value that is `low`, which a builder can add, enlarged twice along its last two dimensions, less `crop`: rows
    (front, back) and columns, each 0 or 1."""

    low: Low
    crop: Crop = NOTHING

    def after(self, step: Callable[[Builder, Node], Node], crop: Crop | None = None) -> Enlarged:
        """What a step makes of it that may as well be done before the enlargement."""
        return Enlarged(lambda build: step(build, self.low(build)), self.crop if crop is None else crop)


def enlarged(node: object) -> Enlarged | str | None:
    """How `node` is a value enlarged twice; a text if it is one that cannot be had smaller, and why; None if it is none."""
    if not isinstance(node, Node) or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    found = _upsampled(node) or _interleaved(node) or _passed_on(node)
    if isinstance(found, Enlarged) and len(node.users) > 1:
        return f"the enlarged activation has {len(node.users)} readers"
    return found


def _upsampled(node: Node) -> Enlarged | str | None:
    """`upsample_nearest(x)` by 2 in H and W, and by anything in time: that stays, on the small picture."""
    if node.target not in UPSAMPLES:
        return None
    x, sizes, scales = (*node.args, None, None)[:3]
    assert isinstance(x, Node)
    before, after = value(x).shape[2:], value(node).shape[2:]
    factors = list(scales) if isinstance(scales, Sequence) else [None] * len(before)
    factors = [f if f is not None else _factor(a, b) for f, a, b in zip(factors, before, after, strict=True)]
    if factors[-2:] == [1, 1]:
        return None
    if factors[-2:] != [2, 2]:
        return f"enlarges {_by(before)} to {_by(after)}, not rows and columns by 2"
    if len(before) == 2 or factors[0] == 1:
        return Enlarged(lambda build: x)

    def in_time(build: Builder) -> Node:
        assert callable(node.target)
        if isinstance(scales, Sequence):
            return build(node.target, x, None, [scales[0], 1.0, 1.0])
        assert isinstance(sizes, Sequence)
        return build(node.target, x, [sizes[0], *_rows_and_columns(build, x)], None)

    return Enlarged(in_time)


def _factor(before: Any, after: Any) -> int | None:
    return next((factor for factor in (1, 2) if known(factor * before == after)), None)


def _by(sizes: Sequence[Any]) -> str:
    return "x".join(map(str, sizes))


def _rows_and_columns(build: Builder, x: Node) -> list[Any]:
    ndim = value(x).dim()
    return [build.size(x, ndim - 2), build.size(x, ndim - 1)]


def _interleaved(node: Node) -> Enlarged | str | None:
    """`x.repeat_interleave(2, H).repeat_interleave(2, W)`, in either order."""
    outer = _repeats(node)
    inner = _repeats(node.args[0]) if outer else None
    if outer is None or inner is None or {outer[0], inner[0]} != {-2, -1}:
        return None
    between, x = node.args[0], node.args[0].args[0]
    assert isinstance(between, Node) and isinstance(x, Node)
    if (outer[1], inner[1]) != (2, 2):
        return f"repeats rows and columns {inner[1]} and {outer[1]} times, not twice"
    if len(between.users) > 1:
        return f"the enlarged activation has {len(between.users)} readers"
    return Enlarged(lambda build: x)


def _repeats(node: object) -> tuple[int, int] | None:
    """(dimension counted from the last, how often) of a `repeat_interleave` by a number."""
    if not isinstance(node, Node) or node.target is not aten.repeat_interleave.self_int:
        return None
    times, dim = (*node.args, None)[1:3]
    ndim = value(node).dim()
    return (dim % ndim - ndim, times) if isinstance(dim, int) and isinstance(times, int) else None


def _passed_on(node: Node) -> Enlarged | str | None:
    """What an op makes of its enlarged operand, if it is one that may treat rows and columns alike."""
    if node.target in JOINS:
        return _joined(node)
    step = STEPS.get(node.target)
    found = enlarged(node.args[0]) if step is not None else None
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


def _joined(node: Node) -> Enlarged | str | None:
    """`cat` of values all enlarged, along neither rows nor columns."""
    parts: Any = node.args[0]
    found = [enlarged(part) for part in parts]
    whole = [part for part in found if isinstance(part, Enlarged)]
    reasons = [part for part in found if isinstance(part, str)]
    if reasons or not whole:
        return reasons[0] if reasons else None
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim % value(node).dim() >= value(node).dim() - 2:
        return "joined along rows or columns of the enlarged activation"
    if len(whole) != len(found):
        return "joined with what is not enlarged"
    if any(part.crop != whole[0].crop for part in whole):
        return "the joined activations are padded differently"
    return Enlarged(lambda build: build(aten.cat.default, [part.low(build) for part in whole], dim), whole[0].crop)


def _halved(front: int, back: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows of the small picture that hold so many of the enlarged one at either end, and how many are too many."""
    return (-(-front // 2), -(-back // 2)), (front % 2, back % 2)


def _padded(node: Node, found: Enlarged) -> Enlarged | str:
    """Zeros around the enlarged picture are zeros around the small one, and its repeated border is that one's."""
    pad = PadNode.of(node)
    if pad is None:
        return "the widths of the pad are symbolic"
    (rows, cut_rows), (columns, cut_columns) = _halved(*pad.along(1)), _halved(*pad.along(0))
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
    if any(b % 2 for b in bounds) or any(a >= b for a, b in pairwise(bounds)):
        return f"the ranks hold rows {bounds} of the enlarged activation: an odd number, or none"
    if fill not in ("zeros", "replicate"):
        return f"fetches {fill} beyond the border of the enlarged activation"
    crops = {(start % 2, stop % 2) for start, stop in needs}
    if len(crops) > 1 or any(start >= stop for start, stop in needs):
        return f"the ranks fetch rows {needs} of the enlarged activation, not all alike"
    half = tuple(b // 2 for b in bounds), tuple((start // 2, -(-stop // 2)) for start, stop in needs)
    crop = (crops.pop(), found.crop[1]) if axis == -2 else (found.crop[0], crops.pop())
    return found.after(lambda build, low: build(fetch, low, dim, *half, *rest, **node.kwargs), crop)


Step = Callable[[Node, Enlarged], Enlarged | str]
JOINS = (aten.cat.default, aten.concat.default)
STEPS: Mapping[Any, Step] = {
    **dict.fromkeys(CASTS, _cast_step),
    **dict.fromkeys((aten.reshape.default, aten.view.default), _reshaped),
    **dict.fromkeys((aten.squeeze.dim, aten.unsqueeze.default, aten.select.int, aten.slice.Tensor), _along_one),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _padded),
    aten.permute.default: _permuted,
    fetch: _fetched,
}


def _conv_refusal(conv: ConvNode, crop: Crop) -> str | None:
    """Why this convolution has no four phases, or None."""
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.stride[-2:] != (1, 1) or conv.dilation[-2:] != (1, 1):
        return f"stride {conv.stride[-2:]} and dilation {conv.dilation[-2:]}, not 1"
    for own, cut in zip(conv.padding[-2:], crop, strict=True):
        if own != (0, 0) and (own != (1, 1) or cut != (0, 0)):
            return f"padding {own} of rows or columns" + (" that are padded already" if any(cut) else ", not 1 or none")
    if any(n.target is aten.as_strided.default for n in conv.node.graph.nodes):
        return "the graph reads strides (as_strided)"
    return None


@dataclass(frozen=True)
class FoldUpsample:
    """`conv(upsample_nearest2x(x), w, b)` -> `conv_taps(x, phase_weight(w), b, upsample=True)`."""

    forced: bool
    name: str = "fold_upsample"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        if conv is None or conv.ndim not in (2, 3) or not conv.batched or conv.kernel[-2:] != (3, 3):
            return None
        found = enlarged(conv.x)
        if found is None:
            return None
        if isinstance(found, str):
            return Refusal(node, found)
        reason = _conv_refusal(conv, found.crop) or (None if self.forced else pays(conv))
        if reason is not None:
            return Refusal(node, reason)
        return Match(node, (conv, found), f"{conv.in_channels} -> {conv.out_channels} channels")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, found = match.facts
        build = Builder(match.node)
        x = build(aten.contiguous.default, found.low(build), memory_format=FORMATS[conv.ndim + 2])
        weight = build(PHASE_WEIGHT, conv.weight)
        time = list(conv.padding[0]) if conv.ndim == 3 else []
        settings = list(conv.stride), [*time, 1, 1, 1, 1], list(conv.dilation)
        y = build(conv_taps.OP, x, None, weight, conv.bias, None, *settings, True, "none", [])
        for axis in (-2, -1):  # rows that a convolution without padding does not make, nor of a border
            if conv.padding[axis] == (0, 0):
                front, back = found.crop[axis]
                y = build(aten.slice.Tensor, y, conv.ndim + 2 + axis, front + 1, -(back + 1))
        build.replace(y)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    choice = settings.get("phases", context.options.upsample_conv)
    return [] if choice == "off" else [FoldUpsample(forced=choice == "on")]


FOLD_UPSAMPLE = Pass(
    name="fold_upsample",
    summary="3x3 convolutions of pictures enlarged twice, as four 2x2 convolutions of the pictures",
    rules=_rules,
    options={"phases": "auto|on|off"},
    exact="sums of two and four weights are rounded: in half precision about 1.4 times the error of the convolution alone",
)
