"""A convolution that a model makes in pieces, to save memory, becomes one convolution again.

    a, b = x.split(13, 2);  cat([conv(a), conv(cat([a[:, :, -2:], b], 2))], 2)  ->  conv(x)

CogVideoX and Mochi cut what is larger than 2 GB along time and let the pieces overlap by the kernel. The whole needs no
copies of pieces, no joining of results, and shows what stands before and behind the convolution to the passes that take it
in. Only what has 2**31 elements or more stays in pieces: cuDNN indexes with 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from pvae.passes.ir import CATS, Builder, ConvNode, aten, is_tensor, known, only_user, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

INDEXABLE = 2**31  # elements


class Window(NamedTuple):
    """Rows [start, stop) of `source` along one dimension."""

    source: Node
    start: int
    stop: int


def windows(node: Node, dim: int) -> list[Window] | None:
    """What `node` is joined of along `dim`, seen through `slice` and `cat`; None where a size is symbolic."""
    size = static(value(node).shape[dim])
    if size is None:
        return None
    if node.target is aten.slice.Tensor and not node.kwargs:
        given: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
        x, along, start, _, step = given
        if along % value(node).dim() != dim or step != 1 or not isinstance(start, int | None):
            return [Window(node, 0, size)]
        total = static(value(x).shape[dim])
        parts = windows(x, dim)
        if total is None or parts is None:
            return None
        first = min(max((start or 0) + (total if (start or 0) < 0 else 0), 0), total)
        return _cut(parts, first, first + size)
    if node.target in CATS:
        parts, along = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if along % value(node).dim() != dim:
            return [Window(node, 0, size)]
        pieces = [windows(part, dim) for part in parts]
        return None if None in pieces else _joined([w for piece in pieces for w in piece or ()])
    return [Window(node, 0, size)]


def _cut(parts: list[Window], start: int, stop: int) -> list[Window]:
    """Rows [start, stop) of all `parts` together."""
    found, position = [], 0
    for source, first, last in parts:
        low, high = max(start - position, 0), min(stop - position, last - first)
        if low < high:
            found.append(Window(source, first + low, first + high))
        position += last - first
    return found


def _joined(parts: list[Window]) -> list[Window]:
    found: list[Window] = []
    for part in parts:
        if found and found[-1].source is part.source and found[-1].stop == part.start:
            found[-1] = Window(part.source, found[-1].start, part.stop)
        elif part.start < part.stop:
            found.append(part)
    return found


@dataclass(frozen=True)
class Chunks:
    """The convolution of which the pieces are made, and the rows of its input, along `dim`, that all of them read."""

    conv: ConvNode
    dim: int
    window: Window


class JoinChunks:
    """`cat` of one convolution on consecutive windows of x -> the convolution of x."""

    name = "join_chunks"

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target not in CATS or not is_tensor(node):
            return None
        convs = _pieces(node)
        if convs is None:
            return None
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value(node).dim()
        found = _window(convs, dim)
        if found is None:
            return None
        if isinstance(found, str):
            return Refusal(node, found)
        largest = max(_elements(found, dim), math.prod(value(node).shape))
        if not known(largest < INDEXABLE):
            return Refusal(node, f"the whole has {largest} elements, 2**31 or more")
        return Match(node, Chunks(convs[0], dim, found), f"{len(convs)} pieces")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, dim, (x, start, stop) = match.facts.conv, match.facts.dim, match.facts.window
        build = Builder(match.node)
        if (start, stop) != (0, value(x).shape[dim]):
            x = build(aten.slice.Tensor, x, dim, start, stop)
        build.replace(build(conv.node.target, x, *conv.node.args[1:], **conv.node.kwargs))


def _pieces(node: Node) -> list[ConvNode] | None:
    """The convolutions that the `cat` `node` joins, if they are two or more and alike, and read by it alone."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or len(set(parts)) < len(parts):
        return None
    convs = [ConvNode.of(part) for part in parts]
    first = convs[0]
    if first is None or not first.batched or "input" in first.node.kwargs:
        return None
    for conv in convs:
        if conv is None or only_user(conv.node) is not node or conv.node.target is not first.node.target:
            return None
        if conv.node.args[1:] != first.node.args[1:] or conv.node.kwargs != first.node.kwargs:
            return None
    return [conv for conv in convs if conv is not None]


def _window(convs: list[ConvNode], dim: int) -> Window | str | None:
    """What the pieces read together, or why they are not one convolution; None if they read different tensors."""
    first, axis = convs[0], dim - 2
    if axis < 0:
        return None
    found = [windows(conv.x, dim) for conv in convs]
    whole = [parts[0] for parts in found if parts is not None and len(parts) == 1]
    if len(whole) < len(convs) or len({w.source for w in whole}) > 1:
        return None
    if first.padding[axis] != (0, 0):
        return "each piece is padded where it was cut"
    position = whole[0].start
    for conv, window in zip(convs, whole, strict=True):
        if window.start != position:
            return f"a piece begins at {window.start}, the one before it ends at {position}"
        position += value(conv.node).shape[dim] * conv.stride[axis]
    window = Window(whole[0].source, whole[0].start, whole[-1].stop)
    rows = first.out_size(axis, window.stop - window.start)
    made = sum(value(conv.node).shape[dim] for conv in convs)
    return window if rows == made else f"the pieces make {made} rows, the whole {rows}"


def _elements(window: Window, dim: int) -> int:
    shape = [*value(window.source).shape]
    shape[dim] = window.stop - window.start
    return math.prod(shape)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [JoinChunks()]


JOIN_CHUNKS = Pass(
    name="join_chunks",
    summary="a convolution made in pieces, joined again, as one",
    rules=_rules,
)

__all__ = ["JOIN_CHUNKS", "Window", "windows"]
