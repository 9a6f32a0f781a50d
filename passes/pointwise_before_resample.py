"""A pointwise convolution of an enlarged activation is done before the enlargement.

    conv1x1(nearest(x))                           ->  nearest(conv1x1(x))
    conv1x1(cat([nearest(a), nearest(b)], 2))     ->  cat([nearest(conv1x1(a)), nearest(conv1x1(b))], 2)

Nearest neighbours, by whole numbers or not, copy positions and leave their channels alone, as `cat`, `slice` and
`repeat_interleave` of other dimensions do; a pointwise convolution mixes channels and leaves positions alone. Spatial norms
(MoVQ, CogVideoX) convolve latents enlarged to each activation's size, 64 times the positions in the last level. Where a and
b are the parts of one activation, that is convolved, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from pvae.passes.enlarged import UPSAMPLES
from pvae.passes.ir import CATS, Builder, ConvNode, aten, known, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

NEAREST = UPSAMPLES | {aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec}


def _dim(node: Node, position: int, otherwise: int | None = 0) -> int | None:
    """The dimension that `node` is told to work along, counted from the first; None if none or no number."""
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", otherwise)
    return dim % value(node).dim() if isinstance(dim, int) else None


def _is_repeat(node: Node) -> bool:
    """`repeat_interleave` by a number."""
    return node.target is aten.repeat_interleave.self_int and isinstance(node.args[1], int)


def _operands(node: Node) -> list[Node]:
    """The activations whose positions `node` copies; none if it does something else."""
    if node.op != "call_function":
        return []
    if node.target in NEAREST:
        found: Any = [node.args[0]]
    elif _is_repeat(node):
        found = [node.args[0]] if _dim(node, 2, None) not in (None, 1) else []
    elif node.target in CATS:
        found = list(node.args[0]) if _dim(node, 1) != 1 else []
    else:
        found = []
    return found


def _source(node: Node) -> tuple[Node, int | None]:
    """The activation that `node` is a slice of, and the dimension; `node` itself and None if it is none."""
    if node.target is aten.slice.Tensor and _dim(node, 1) != 1 and node.args[4:] in ((), (1,)) and not node.kwargs:
        return node.args[0], _dim(node, 1)
    return node, None


def _above(node: Node) -> Iterator[Node]:
    """`node` and what its positions are copies of, up to what is no copy."""
    yield node
    for operand in _operands(node):
        yield from _above(operand)


def _enlarges(node: Node) -> bool | None:
    """Whether a resampling or repetition makes more positions; None if it may make fewer."""
    before, after = value(node.args[0]).shape, value(node).shape
    pairs = list(zip(before, after, strict=True))
    if not all(known(a <= b) for a, b in pairs):
        return None
    return any(known(a < b) for a, b in pairs)


def _sources(x: Node) -> list[Node]:
    """What is convolved instead of x: the activations that its positions are copies of, and where slices make up the whole
    of one, that instead of them."""
    leaves = list(dict.fromkeys(n for n in _above(x) if not _operands(n)))
    groups: dict[tuple[Node, int | None], list[Node]] = {}
    for leaf in leaves:
        groups.setdefault(_source(leaf), []).append(leaf)
    found: list[Node] = []
    for (source, dim), slices in groups.items():
        whole = dim is not None and known(sum(value(s).shape[dim] for s in slices) >= value(source).shape[dim])
        found += [source] if whole else slices
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class PointwiseBeforeResample:
    """`conv1x1(nearest(x))` -> `nearest(conv1x1(x))`."""

    name: str = "pointwise_before_resample"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        if conv is None or any(k != 1 for k in conv.kernel) or not conv.batched:
            return None
        resampled = [n for n in _above(conv.x) if n.target in NEAREST or _is_repeat(n)]
        if not resampled:
            return None
        if any(s != 1 for s in conv.stride) or any(pair != (0, 0) for pair in conv.padding):
            return Refusal(node, f"stride {conv.stride} and padding {conv.padding}, not 1 and none")
        larger = [_enlarges(n) for n in resampled]
        if None in larger:
            return Refusal(node, "the resampling may make fewer positions")
        if not any(larger):
            return Refusal(node, "the resampling makes no more positions")
        return Match(node, conv, f"{conv.in_channels} -> {conv.out_channels} channels")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv: ConvNode = match.facts
        build = Builder(match.node)
        rest = match.node.args[1:]
        done = {x: build(match.node.target, x, *rest, **match.node.kwargs) for x in _sources(conv.x)}
        build.replace(_again(build, conv.x, done))


def _again(build: Builder, node: Node, done: dict[Node, Node]) -> Node:
    """`node` of the convolved sources; `done` grows by what is made."""
    if node not in done:
        assert callable(node.target)
        first: Any = node.args[0]
        made = [_again(build, n, done) for n in first] if node.target in CATS else _again(build, first, done)
        done[node] = build(node.target, made, *node.args[1:], **node.kwargs)
    return done[node]


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [PointwiseBeforeResample()]


POINTWISE_BEFORE_RESAMPLE = Pass(
    name="pointwise_before_resample",
    summary="1x1 convolutions of enlarged activations, as enlargements of convolved ones",
    rules=_rules,
)
