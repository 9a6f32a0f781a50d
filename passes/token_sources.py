"""Where the tokens of a transformer begin: the values that are cut when a graph is split over ranks by its tokens.

An attention names a token dimension: -2 of its queries, keys and values. Followed back (`origins.py`), it begins at an input
of the graph or at the first op that makes it, such as the flatten behind a patch embedding. There a rank takes its piece of
what every rank has whole: all that is before is computed by every rank, all that follows is split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from torch.fx import Graph, Node

from pvae.passes.ir import aten, is_tensor, value
from pvae.passes.origins import SDPA, SOFTMAX, STAYS_SPLIT, Origins, Place, is_elementwise, named, product_of
from pvae.passes.shard_views import RESHAPES

__all__ = ["Attention", "TokenSource", "attention_of", "token_sources"]


@dataclass(frozen=True)
class TokenSource:
    """Dimension `dim` of `node`, of `size` tokens that attentions read: as "query", as "key" (keys and values), or both.

    `linear_flops`: of the linear layers that these tokens go through, multiply-adds times two.
    `attended_bytes`: of the keys and values made of them, over all attentions, where they are never queries; else 0.
    """

    node: Node
    dim: int
    size: int
    feeds: frozenset[str]
    linear_flops: int
    attended_bytes: int


def token_sources(graph: Graph, weights: frozenset[str]) -> list[TokenSource]:
    """The places where the tokens of attentions begin, in graph order; `weights` names the placeholders that are weights.

    Behind another place and an attention, tokens begin anew only where an op leaves them whole on every rank, such as one
    without a sharding rule; its node is then computed of split values. Of two places of which one is computed from the
    other with no attention in between, the larger counts: tokens of a frame before frames. Keys and values of queries
    that are no tokens themselves (learned, pooled) do not count.
    """
    origins = Origins(graph, weights)
    attentions = {node: attention for node in graph.nodes if (attention := attention_of(node))}
    order = _Order(graph, origins, attentions)
    queries = order.kept(place for a in attentions.values() for place, _ in order.shares(*a.query))
    feeds: dict[Place, set[str]] = defaultdict(set)
    attended: dict[Place, float] = defaultdict(float)
    for attention in attentions.values():
        split = {place for place, _ in order.shares(*attention.query)} & queries
        for place in split:
            feeds[place].add("query")
        for x, dim in attention.keys if split else ():
            for place, share in order.shares(x, dim):
                feeds[place].add("key")
                attended[place] += share * value(x).numel() * value(x).element_size()
    found: list[TokenSource] = []
    for node, dim in sorted(order.kept(feeds)):
        place, size = (node, dim), value(node).shape[dim]
        read = 0 if "query" in feeds[place] else round(attended[place])
        found.append(TokenSource(node, dim, size, frozenset(feeds[place]), round(origins.flops[place]), read))
    return found


class _Order:
    """Which of the places where attentions' tokens begin are computed from which."""

    def __init__(self, graph: Graph, origins: Origins, attentions: Mapping[Node, Attention]) -> None:
        self.origins = origins
        ends = [end for a in attentions.values() for end in (a.query, *a.keys)]
        own = {node for end in ends for run in origins.of(*end) for node, _ in run.begins}
        self.before: dict[Node, frozenset[Node]] = {}  # those nodes of `own` that a node depends on, itself included
        self.through: dict[Node, frozenset[Node]] = {}  # those of which it depends through an attention
        for node in graph.nodes:
            operands = node.all_input_nodes
            self.before[node] = frozenset().union(*(self.before[n] for n in operands), (node,) if node in own else ())
            behind = (self.before[n] if n in attentions else self.through[n] for n in operands)
            self.through[node] = frozenset().union(*behind)

    def shares(self, x: Node, dim: int) -> Iterator[tuple[Place, float]]:
        """Where the tokens of an attention's operand begin, each place with its share of them."""
        for run in self.origins.of(x, dim):
            first = {place for place in run.begins if not self.through[place[0]]}
            anew = {place for place in run.begins if place[0].target not in STAYS_SPLIT}
            for place in first or anew:
                yield place, run.size / value(x).shape[dim]

    def kept(self, places: Iterable[Place]) -> set[Place]:
        """Of places of which one is computed from the other, without an attention in between, the largest."""
        kept: set[Place] = set()
        for node, dim in sorted(set(places), key=lambda p: (-value(p[0]).shape[p[1]], p)):
            if not any(self._directly(node, other) or self._directly(other, node) for other, _ in kept):
                kept.add((node, dim))
        return kept

    def _directly(self, node: Node, on: Node) -> bool:
        return on in self.before[node] and on not in self.through[node]


# --- attentions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """The token dimension of its queries, and those of its keys and of its values."""

    query: Place
    keys: tuple[Place, Place]


def attention_of(node: Node) -> Attention | None:
    """`scaled_dot_product_attention(q, k, v)`, or a product `softmax(q @ k^T) @ v` that is written out."""
    if node.target is SDPA:
        q, k, v = node.args[:3]
        return Attention((q, -2), ((k, -2), (v, -2)))
    outer = product_of(node)
    for (p, rows), (v, columns) in permutations(outer.factors, 2) if outer else ():
        softmax = _before(p, lambda n: n.target in SOFTMAX)
        scores = softmax and _before(softmax.args[0], lambda n: product_of(n) is not None)
        inner = scores and product_of(scores)
        if not (outer and softmax and inner) or named(softmax) != [value(softmax).dim() - 1]:
            continue
        if rows[-1] in columns and rows[-1] not in outer.result and len(inner.result) > 1:
            query, key = (next((x, t.index(i)) for x, t in inner.factors if i in t) for i in inner.result[-2:])
            return Attention(query, (key, (v, columns.index(rows[-1]))))
    return None


def _before(x: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest such node at or before `x`, through pointwise ops and reshapes that keep the last dimension's size."""
    todo, seen = [x], {x}
    for at in todo:
        if wanted(at):
            return at
        if is_elementwise(at) or at.target in (*RESHAPES, aten.expand.default):
            for n in at.all_input_nodes:
                if n not in seen and is_tensor(n) and value(n).shape[-1:] == value(x).shape[-1:]:
                    seen.add(n)
                    todo.append(n)
    return None
