"""A causal cache is not copied out of an activation: its frames are made as a tensor of their own.

    z = norm(x);  y = conv_taps(z, cache);  return y, z[:, :, -2:].clone()

    a, b = norm(x[:, :, :-2]), norm(x[:, :, -2:]);  y = conv_taps(a, cache, after=b);  return y, b

A norm over channels is made position by position, so it can be made in two parts, and the convolution reads frames in front
of x and behind it wherever they are. The copy would read and write what the cache holds: 15 ms of a Wan 2.1 decode of 500.
A clone of the whole activation, where the cache is all of it, goes as well: nobody else owns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from pvae.kernels.channel_norm_act import OP as NORM
from pvae.kernels.conv_taps import OP as TAPS
from pvae.passes.ir import Builder, aten, known, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

CONFIG = 10  # the last of conv_taps' arguments before `after`


@dataclass(frozen=True)
class Cache:
    """The convolution that reads the norm, and what the graph returns of its last `frames` (all, if `slices` is empty)."""

    conv: Node
    slices: list[Node]
    clones: list[Node]
    frames: int


def _is_result(node: Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _last_frames(node: Node, z: Node, total: int) -> int | None:
    """How many of the last of `total` frames of z `node` is a slice of, or None."""
    if node.target is not aten.slice.Tensor or node.args[0] is not z:
        return None
    defaults = (None, 0, None, None, 1)
    dim, start, end, step = (*node.args, *defaults[len(node.args) :])[1:]
    frames = static(value(node).shape[2])
    if dim not in (2, -3) or step != 1 or not isinstance(start, int) or frames is None:
        return None
    first = start + total if start < 0 else start
    reaches_end = end is None or (isinstance(end, int) and end >= total)
    return frames if reaches_end and first == total - frames and 0 < frames < total else None


class SplitCache:
    """`conv_taps(norm(x))` whose last frames are returned -> the norm in two parts, and none copied."""

    name = "split_cache"

    def match(self, node: Node) -> Match | Refusal | None:
        x = value(node) if node.target is NORM else None
        total = None if x is None or x.dim() != 5 else static(x.shape[2])
        if total is None:
            return None
        convs = [u for u in node.users if u.target is TAPS and u.args[0] is node and len(u.args) <= CONFIG + 1]
        others = [u for u in node.users if u not in convs]
        clones = [u for u in others if u.target is aten.clone.default and _is_result(u)]
        slices = [u for u in others if _last_frames(u, node, total) is not None and _ends_as_result(u)]
        if len(convs) != 1 or not others or len(clones) + len(slices) != len(others) or (clones and slices):
            return None
        if convs[0].kwargs or node in convs[0].args[1:]:
            return None
        if slices and (len(node.args) > 7 or node.kwargs):
            return Refusal(node, "the norm has a border, scale or shift")
        frames = {_last_frames(s, node, total) for s in slices} or {total}
        if len(frames) != 1 or not known(x.shape[0] == 1):  # type: ignore[union-attr]
            return Refusal(node, "caches of several lengths" if len(frames) != 1 else "more than one video")
        count = frames.pop()
        assert count is not None
        return Match(node, Cache(convs[0], slices, clones, count), f"the last {count} of {total} frames")

    def rewrite(self, graph: Graph, match: Match) -> None:
        node, cache = match.node, match.facts
        if not cache.slices:
            for clone in cache.clones:
                Builder(clone).replace(node)
            return
        build, (x, *rest) = Builder(node), node.args
        total = value(node).shape[2]
        first = build(NORM, build(aten.slice.Tensor, x, 2, 0, total - cache.frames), *rest)
        last = build(NORM, build(aten.slice.Tensor, x, 2, total - cache.frames, total), *rest)
        conv = Builder(cache.conv)
        conv.replace(conv(TAPS, first, *cache.conv.args[1:], last))
        for piece in cache.slices:
            for user in [*piece.users]:
                if user.target is aten.clone.default:
                    Builder(user).replace(last)
            piece.replace_all_uses_with(last)


def _ends_as_result(piece: Node) -> bool:
    """Whether a slice is returned, as it is or as a copy, and not used otherwise."""
    return all(user.op == "output" or (user.target is aten.clone.default and _is_result(user)) for user in piece.users)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [SplitCache()]


SPLIT_CACHE = Pass(
    name="split_cache",
    summary="causal caches as tensors of their own from the start, instead of copies",
    rules=_rules,
    exact="bitwise",
)
