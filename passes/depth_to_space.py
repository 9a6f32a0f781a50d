"""A pixel shuffle writes its activation channels-last, where the convolutions and norms behind it work so.

    conv(x, w)  [N, C*2*2, H, W] -> reshape [N, C, 2, 2, H, W] -> permute [N, C, H, 2, W, 2] -> reshape [N, C, 2H, 2W]

The last step copies whatever its layout, and by itself to contiguous memory: the norm behind it is none of our kernels'
then, the pad behind that neither, and the convolution copies once more. Here the copy is made in the order [N, H, 2, W, 2, C].
What makes the activation, convolution or linear, is given the rows of its weight in the order [2, 2, C], so that the copy
reads C consecutive elements and not every fourth. The weight is small, and with `weights="frozen"` reordered once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Graph, Node

from pvae.kernels import channels_last
from pvae.kernels.compact import OP as COMPACT
from pvae.passes.channel_norm import is_innermost, norm_of
from pvae.passes.channels_last import conv_weight, laid_last, works_channels_last
from pvae.passes.ir import Builder, ConvNode, aten, is_tensor, known, only_user, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule, refresh_strides

RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
    }
)
# What an activation goes through on its way to a norm or convolution.
THROUGH = RESHAPES | {
    aten.add.Tensor,
    aten.cat.default,
    aten.pad.default,
    aten.permute.default,
    aten.silu.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.unflatten.int,
}
Parts = list[list[int]]


def merged(before: Sequence[Any], after: Sequence[Any]) -> Parts | None:
    """Which consecutive dimensions of `before` each one of `after` is made of, or None if it takes any apart."""
    parts: Parts = []
    at = 0
    for size in after:
        part: list[int] = []
        product: Any = 1
        while at < len(before) and not (part and known(product == size)):
            product = product * before[at]
            part.append(at)
            at += 1
        if not part or not known(product == size):
            return None
        parts.append(part)
    return parts if at == len(before) else None


def _one_dimension(tensor: Any, dims: list[int]) -> bool:
    """Whether consecutive `dims` of `tensor` can be one without a copy."""
    wide = [d for d in dims if not known(tensor.shape[d] == 1)]
    return all(known(tensor.stride(a) == tensor.stride(b) * tensor.shape[b]) for a, b in pairwise(wide))


@dataclass(frozen=True)
class Shuffle:
    """`end` [N, C, *spatial] merges dimensions of `moved`, a permuted activation; `parts` are those of each of its own."""

    end: Node
    moved: Node
    parts: Parts

    @classmethod
    def of(cls, node: Node) -> Shuffle | None:
        """The pixel shuffle that ends with the reshape `node`, if it copies."""
        if node.target not in RESHAPES or not is_tensor(node) or value(node).dim() not in (4, 5):
            return None
        moved = node.args[0]
        while isinstance(moved, Node) and moved.target in RESHAPES and only_user(moved) is not None:
            moved = moved.args[0]
        if not isinstance(moved, Node) or moved.target is not aten.permute.default:
            return None
        parts = merged(value(moved).shape, value(node).shape)
        if parts is None or not any(len(part) > 1 for part in parts[2:]):
            return None
        copies = not all(_one_dimension(value(moved), part) for part in parts)
        return cls(node, moved, parts) if copies else None


@dataclass(frozen=True)
class Producer:
    """What made the channels that `split` takes apart: `dims` of split, which are to be written in the order `order`."""

    node: Node
    weight: Node
    bias: Node | None
    back: list[int] | None  # how the result of a linear is permuted, channels second
    split: Node
    dims: list[int]
    order: list[int]

    @classmethod
    def of(cls, shuffle: Shuffle) -> Producer | None:
        """The convolution or linear in front of `shuffle`, if nothing else reads it and its rows can be reordered."""
        split: Any = shuffle.moved.args[0]
        if not isinstance(split, Node) or split.target not in RESHAPES or list(split.users) != [shuffle.moved]:
            return None
        made = split.args[0]
        if not isinstance(made, Node) or only_user(made) is not split:
            return None
        rank = value(split).dim()
        parts = merged(value(split).shape, value(made).shape)
        if parts is None or any((len(part) > 1) != (i == 1) for i, part in enumerate(parts)):
            return None
        sources: Any = shuffle.moved.args[1]
        channels = {sources[d] % rank for d in shuffle.parts[1]}
        dims = parts[1]
        order = sorted(dims, key=lambda d: d in channels)
        if order == dims or not channels <= set(dims) or not all(isinstance(value(split).shape[d], int) for d in dims):
            return None
        node, weight, bias, back = _made_by(made)
        return None if weight is None else cls(node, weight, bias, back, split, dims, order)

    def reordered(self, build: Builder) -> Node:
        """`split` with the same elements, of which those of `order` lie so in memory."""
        shape, rank = value(self.split).shape, value(self.split).dim()
        weight, bias = (_rows(build, p, [shape[d] for d in self.dims], self._local()) for p in (self.weight, self.bias))
        result = build(self.node.target, self.node.args[0], weight, bias, *self.node.args[3:])
        if self.back is not None:
            result = build(aten.permute.default, result, self.back)
        order = [*range(self.dims[0]), *self.order, *range(self.dims[-1] + 1, rank)]
        split = build(aten.reshape.default, result, [build.size(self.split, d) for d in order])
        moved: Node = build(aten.permute.default, split, [order.index(d) for d in range(rank)])
        return moved

    def _local(self) -> list[int]:
        return [self.dims.index(d) for d in self.order]


def _made_by(made: Node) -> tuple[Node, Node | None, Node | None, list[int] | None]:
    """(node, weight, bias, permutation behind it) of a convolution or linear whose result, channels second, is `made`."""
    conv = ConvNode.of(made)
    if conv is not None:
        plain = conv.groups == 1 and not made.kwargs and conv.batched and conv.ndim > 1
        plain = plain and channels_last.is_channels_last(value(conv.weight))
        return made, conv.weight if plain else None, conv.bias, None
    rank = value(made).dim()
    source: Any = made.args[0] if made.target is aten.permute.default else None
    if not isinstance(source, Node) or source.target is not aten.linear.default or list(source.users) != [made]:
        return made, None, None, None
    dims: Any = made.args[1]
    back = [d % rank for d in dims]
    if back != [0, rank - 1, *range(1, rank - 1)] or source.kwargs:
        return made, None, None, None
    _, weight, bias = (*source.args, None)[:3]
    return source, weight, bias, back


def _rows(build: Builder, weight: Node | None, sizes: list[int], order: list[int]) -> Node | None:
    """`weight` [prod(sizes), ...] with its rows, counted as `sizes`, in another order, and in the layout that it had."""
    if weight is None:
        return None
    plain: Any = weight.args[0] if weight.target is channels_last.OP else weight
    rest = list(value(plain).shape[1:])
    apart = build(aten.reshape.default, plain, [*sizes, *rest])
    moved = build(aten.permute.default, apart, [*order, *range(len(sizes), len(sizes) + len(rest))])
    # Inductor does not realize a bias that is a view.
    moved = build(COMPACT, moved, list(range(len(sizes) + len(rest))))
    rows: Node = build(aten.reshape.default, moved, [math.prod(sizes), *rest])
    laid: Node = build(channels_last.OP, rows) if laid_last(weight) else rows
    return laid


def _read_channels_last(node: Node) -> bool:
    """Whether a norm, or a convolution whose weight is channels-last, reads what is made of `node`."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user in seen or not is_tensor(user):
                continue
            seen.add(user)
            weight = conv_weight(user)
            if norm_of(user) is not None or (weight is not None and laid_last(weight)):
                return True
            if user.target in THROUGH:
                todo.append(user)
    return False


class DepthToSpace:
    """`reshape(permute(reshape(conv(x, w))))` -> the same elements, channels-last in memory, of a w with its rows reordered."""

    name = "channels_last"

    def __init__(self) -> None:
        self.works_channels_last: bool | None = None  # the graph, of which a pass has rules of its own

    def match(self, node: Node) -> Match | Refusal | None:
        shuffle = Shuffle.of(node)
        user = only_user(node)
        if shuffle is None or is_innermost(value(node)) or (user is not None and Shuffle.of(user) is not None):
            return None
        if self.works_channels_last is None:
            self.works_channels_last = works_channels_last(node.graph)
        if not self.works_channels_last or not _read_channels_last(node):
            return Refusal(node, "no norm or convolution reads it channels-last")
        producer = Producer.of(shuffle)
        return Match(node, (shuffle, producer), "" if producer is None else f"rows of {producer.weight} reordered")

    def rewrite(self, graph: Graph, match: Match) -> None:
        shuffle, producer = match.facts
        build = Builder(match.node)
        moved, (batch, channels, *spatial) = shuffle.moved, shuffle.parts
        if producer is not None:
            moved = build(aten.permute.default, producer.reordered(build), moved.args[1])
        parts = (batch, *spatial, channels)
        outer = build(aten.permute.default, moved, [d for part in parts for d in part])
        sizes = [build.product(*[build.size(moved, d) for d in part]) for part in parts]
        copied = build(aten.reshape.default, outer, sizes)
        rank = len(parts)
        build.replace(build(aten.permute.default, copied, [0, rank - 1, *range(1, rank - 1)]))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [DepthToSpace()]


DEPTH_TO_SPACE = Pass(
    name="depth_to_space",
    summary="pixel shuffles write their activations channels-last",
    rules=_rules,
    after=refresh_strides,
)

__all__ = ["DEPTH_TO_SPACE"]
