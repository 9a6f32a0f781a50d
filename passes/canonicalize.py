"""Removes spellings, not meaning, so that later rules match one form.

- nothing happens: `to` and `type_as` to the same dtype, `expand` to the same size, a product with 1, a quotient by 1,
  `dropout` in eval, `slice` of the whole, `pad` by nothing, `copy` of a tensor of the same dtype and size, export's metadata
  assertions
- memory only: `clone`, `contiguous` and `alias` (kept where the graph returns the copy)
- one spelling for several: `type_as` becomes `to`; `chunk`, `split` and `unbind` with `getitem` become `slice` and
  `select`; a convolution without a batch dimension gets one
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Graph, Node

from pvae.passes.ir import CASTS, Builder, ConvNode, PadNode, aten, is_tensor, known, reaches_output, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Report, Rule

COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})
NO_COPIES = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh.default})
DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default})


def same(a: Node, b: Node, *, strides: bool = False) -> bool:
    """Whether two nodes hold tensors of the same sizes, dtype and device (and strides) for every size that may come."""
    x, y = value(a), value(b)
    if x.dtype != y.dtype or x.device != y.device or x.dim() != y.dim():
        return False
    pairs = list(zip(x.shape, y.shape, strict=True))
    if strides:
        pairs += list(zip(x.stride(), y.stride(), strict=True))
    return all(known(p == q) for p, q in pairs)


def _source(node: Node) -> Node | None:
    """The node that `node` equals, if `node` does nothing to its first tensor."""
    x = node.args[0] if node.args else None
    if not isinstance(x, Node) or not is_tensor(x) or not is_tensor(node):
        return None
    target = node.target
    if target in COPIES or target in NO_COPIES:
        return x
    if target in DROPOUTS:
        return None if node.args[2] and node.args[1] else x
    if target is aten.copy.default:
        written = node.args[1]
        return written if isinstance(written, Node) and same(node, written) else None
    if target in CASTS or target in (aten.expand.default, aten.slice.Tensor):
        return x if same(node, x) else None
    if target in (aten.mul.Tensor, aten.div.Tensor):
        factor = node.args[1]
        return x if isinstance(factor, (int, float)) and factor == 1 and same(node, x) else None
    pad = PadNode.of(node)
    if pad is not None and all(front == 0 and back == 0 for front, back in pad.pads):
        return x
    return None


class RemoveNoOp:
    """`y = noop(x)` -> `x`."""

    name = "no_op"

    def match(self, node: Node) -> Match | Refusal | None:
        source = _source(node)
        if source is None:
            return None
        if node.target not in NO_COPIES and reaches_output(node):
            return None  # the caller is promised memory of its own
        return Match(node, source)

    def rewrite(self, graph: Graph, match: Match) -> None:
        Builder(match.node).replace(match.facts)


class OneSpelling:
    """`type_as` -> `to`."""

    name = "one_spelling"

    def match(self, node: Node) -> Match | Refusal | None:
        return Match(node) if node.target is aten.type_as.default else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        node, build = match.node, Builder(match.node)
        build.replace(build(aten.to.dtype, node.args[0], value(node).dtype))


class SplitToSlices:
    """`chunk|split|unbind` followed by `getitem` -> one `slice` or `select` a piece, at the piece's static offset."""

    name = "split_to_slices"

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target not in SPLITS and node.target is not aten.unbind.int:
            return None
        if any(user.target is not operator.getitem for user in node.users):
            return None
        x = node.args[0]
        assert isinstance(x, Node)
        dim = node.kwargs.get("dim", 0)
        position = 1 if node.target is aten.unbind.int else 2
        dim = node.args[position] if len(node.args) > position else dim
        assert isinstance(dim, int)
        dim %= value(x).dim()
        if node.target is aten.unbind.int:
            return Match(node, (x, dim, None))
        sizes = [piece.shape[dim] for piece in value(node)]
        if not all(isinstance(size, int) for size in sizes):
            return Refusal(node, "the pieces have symbolic sizes")
        return Match(node, (x, dim, sizes))

    def rewrite(self, graph: Graph, match: Match) -> None:
        x, dim, sizes = match.facts
        for user in list(match.node.users):
            build, index = Builder(user), user.args[1]
            assert isinstance(index, int)
            if sizes is None:
                build.replace(build(aten.select.int, x, dim, index))
            else:
                index %= len(sizes)
                start = sum(sizes[:index])
                build.replace(build(aten.slice.Tensor, x, dim, start, start + sizes[index]))


class BatchConv:
    """`conv(x[C, *spatial])` -> `conv(x[None])[0]`."""

    name = "batch_conv"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        return Match(node, conv) if conv is not None and not conv.batched else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        build = Builder(match.node)
        batched = build(aten.unsqueeze.default, match.facts.x, 0)
        assert callable(match.node.target)
        out = build(match.node.target, batched, *match.node.args[1:], **match.node.kwargs)
        build.replace(build(aten.select.int, out, 0, 0))


def _drop_assertions(graph: Graph, context: Context, report: Report) -> None:
    """Export-mode tracing asserts dtype and device after each cast; the meta says the same and the verifier checks it."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    rules: list[Callable[[], Any]] = [RemoveNoOp, OneSpelling, SplitToSlices, BatchConv]
    return [rule() for rule in rules]


CANONICALIZE = Pass(
    name="canonicalize",
    summary="remove no-ops and give each operation one spelling",
    rules=_rules,
    after=_drop_assertions,
    exact="bitwise",
)

__all__ = ["CANONICALIZE", "same"]
