"""Sharding rule of attention: the tokens of queries, keys and values are split, and every query has to meet every key.

    all keys     queries stay where they are; keys and values are gathered, in one collective
    heads        heads are exchanged for tokens (DeepSpeed-Ulysses, arXiv 2309.14509): a rank gets some heads of all tokens
                 by one all-to-all of queries, keys and values, attends, and sends the result back by another
    both         heads over groups of ranks; in a group each rank takes its share of the queries and all keys of its heads
                 (USP, arXiv 2405.07719, with a gather in place of the ring)

All three are `heads` over 1, all, or some number of groups; `_groups` takes what costs least on the machine. Heads and
tokens need not divide: boxes of both are uneven where they must.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from torch.fx import Node

from pvae.passes.ir import aten, is_tensor, value
from pvae.passes.placement import Dim, Factor, Interval, Placement, even
from pvae.passes.sharder import ComputeWhole, Sharder, argument, rule, tensor
from pvae.runtime.exchange import Box, exchange

SDPA = aten.scaled_dot_product_attention.default
APART = 5  # an exchange that takes so many times the least is done beside the product of the next projection


@dataclass(frozen=True)
class Attention:
    """An attention as written, of `[..., heads, tokens, channels]`."""

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @classmethod
    def of(cls, node: Node) -> Attention:
        q, k, v = (tensor(node, i) for i in range(3))
        mask = argument(node, 3, "attn_mask")
        return cls(
            node,
            q,
            k,
            v,
            mask if isinstance(mask, Node) and is_tensor(mask) else None,
            argument(node, 4, "dropout_p", 0.0),
            bool(argument(node, 5, "is_causal", False)),
            node.kwargs.get("scale"),
            bool(node.kwargs.get("enable_gqa", False)),
        )

    def call(self, s: Sharder, q: Node, k: Node, v: Node, mask: Node | None, grouped: bool) -> Node:
        """The same attention of other operands. Not placed."""
        if not value(q).numel():  # no fused kernel takes that; keys and values are still read: collectives made them
            k, v = (s.pick(x, 1, [(0, min(1, value(x).shape[1]))]) if grouped else x for x in (k, v))
            scores = s.build(aten.matmul.default, q, s.build(aten.transpose.int, k, -1, -2))
            return s.build(aten.matmul.default, scores, v)
        asked = {"attn_mask": mask, "dropout_p": self.dropout, "is_causal": self.causal, "scale": self.scale}
        options = {name: given for name, given in {**asked, "enable_gqa": grouped}.items() if given}
        return s.build(SDPA, q, k, v, **options)


@rule(SDPA)
def attention(s: Sharder, node: Node) -> Node:
    found = Attention.of(node)
    if s.patch:
        return s.again(node, s[found.q].with_dim(s[found.q].ndim - 1, [Factor(s[found.v].shape[-1])]))
    groups = _groups(s, found)
    return _all_keys(s, found) if groups == 1 else _heads(s, found, groups)


# --- all keys ----------------------------------------------------------------------------------------------------------


def _all_keys(s: Sharder, found: Attention) -> Node:
    q, k, v, mask = found.q, found.k, found.v, found.mask
    ndim = s[q].ndim
    if found.causal and s[q].splits(ndim - 2):
        raise ComputeWhole("causal attention over a split token dimension")
    batch = next((s[x].dims[:-2] for x in (q, k, v) if Placement(s[x].dims[:-2]).axes), s[q].dims[:-2])
    axes = Placement(batch).axes
    if axes and len({s[x].shape[:-2] for x in (q, k, v)}) > 1:
        raise ComputeWhole("heads or batch are split and differ between queries and keys")
    tokens = s[q].dims[-2]
    if axes & {f.axis for f in tokens}:
        tokens = (Factor(s[q].shape[-2]),)

    def operand(x: Node, rows: Dim) -> Node:
        outer = batch if s[x].shape[:-2] == s[q].shape[:-2] else s[x].dims[:-2]
        return s.conform(x, Placement((*outer, rows, (Factor(s[x].shape[-1]),))))

    keys = s[k].dims[-2] if not axes & Placement((s[k].dims[-2],)).axes else (Factor(s[k].shape[-2]),)
    q = operand(q, tokens)
    k, v = _with_all_tokens(s, operand(k, keys), operand(v, keys))
    if mask is not None:
        mask = s.conform(mask, Placement((*batch, tokens, (Factor(s[k].shape[-2]),))))
    placement = Placement((*batch, tokens, (Factor(s[v].shape[-1]),)))
    return s.place(found.call(s, q, k, v, mask, found.grouped), placement)


def _with_all_tokens(s: Sharder, k: Node, v: Node) -> tuple[Node, Node]:
    """Both whole along the tokens, by one collective where they lie alike."""
    dim = s[k].ndim - 2
    if k is v or s[k] != s[v] or not s[k].splits(dim):
        return s.whole(k, [dim]), s.whole(v, [dim])
    both = s.emit(Placement(((Factor(2),), *s[k].dims)), aten.stack.default, [k, v])
    both = s.whole(both, [dim + 1])
    one = Placement(s[both].dims[1:])
    return s.emit(one, aten.select.int, both, 0, 0), s.emit(one, aten.select.int, both, 0, 1)


# --- heads for tokens ----------------------------------------------------------------------------------------------------


def _groups(s: Sharder, found: Attention) -> int:
    """Over how many groups of ranks the heads are spread: what costs least, 1 (all keys) where that is all there is."""
    q, k, v = (s[x] for x in (found.q, found.k, found.v))
    queries, keys = q.segments(q.ndim - 2), k.segments(k.ndim - 2)
    if q.ndim != 4 or queries is None or keys is None or queries.axis is None or queries.axis != keys.axis:
        return 1
    alike = k.shape[:-1] == v.shape[:-1] and q.shape[0] == k.shape[0]
    if not alike or any(x.splits(1) or x.splits(3) for x in (q, k, v)) or (found.causal and queries.parts):
        return 1
    if q.shape[1] != k.shape[1] and not (found.grouped and q.shape[1] % k.shape[1] == 0):
        return 1  # one head of keys for all, by broadcasting
    world, machine, dtype = s.mesh.shape[queries.axis], s.machine, value(found.q).dtype
    (_, heads, rows, width), (_, kv_heads, columns, out) = q.shape, (*k.shape[:3], v.shape[-1])
    each = dtype.itemsize * q.shape[0]

    def seconds(groups: int) -> float:
        h, n = ceil(heads / groups), ceil(rows / (world // groups))
        flops = 2 * q.shape[0] * h * n * columns * (width + out)
        compute = flops / (machine.product_rate(dtype) * machine.attention)
        of_keys = ceil(kv_heads / groups) * columns * (width + out) * each
        if groups == 1:
            return compute + machine.gather_seconds(of_keys * (world - 1) / world)
        there = (h * n * width * each + of_keys) * (world - 1) / world
        back = heads * ceil(rows / world) * out * each * (groups - 1) / groups
        return compute + machine.exchange_seconds(there) + machine.exchange_seconds(back)

    if found.causal:
        return world
    return min((g for g in range(1, world + 1) if world % g == 0), key=lambda g: (seconds(g), -g))


def _heads(s: Sharder, found: Attention, groups: int) -> Node:
    q, k, v = found.q, found.k, found.v
    placement, queries = s[q], s[q].segments(2)
    assert queries is not None and queries.axis is not None
    k, v = (s.recut(x, 0, placement.dims[0]) for x in (k, v))
    v = s.recut(v, 2, s[k].dims[2])
    keys = s[k].segments(2)
    assert keys is not None
    world, rank, group = s.mesh.shape[queries.axis], s.rank(queries), s.mesh.groups[queries.axis]
    heads, kv_heads = placement.shape[1], s[k].shape[1]
    ratio = heads // kv_heads
    of_heads, of_rows = even(heads, groups), even(queries.size, world // groups)
    need_q: list[Box] = []
    need_kv: list[Box] = []
    for r in range(world):
        (g, m), everything = (r % groups, r // groups), (0, keys.size)
        lo, hi = of_heads[g], of_heads[g + 1]
        need_q.append(((lo, hi), (of_rows[m], of_rows[m + 1])))
        need_kv.append(((lo // ratio, ceil(hi / ratio)), everything) if lo < hi else ((0, 0), (0, 0)))

    def held(of: int, factor: Factor) -> tuple[Box, ...]:
        return tuple(((0, of), span) for span in factor.spans)

    have = held(heads, queries), *[held(kv_heads, keys)] * 2
    need = tuple(need_q), *[tuple(need_kv)] * 2
    mine: list[Node] = []
    sent = prod(placement.shape) * value(q).element_size() / world
    apart = s.machine.exchange_seconds(sent) > APART * s.machine.exchange_seconds(0)
    for some in [slice(i, i + 1) for i in range(3)] if apart else [slice(3)]:
        xs = [q, k, v][some]
        got = s.build(exchange, xs, have[some], need[some], rank, group)
        s.exchanged("heads", got, "tokens for heads", _sent(xs))
        mine += [s.build(operator.getitem, got, i) for i in range(len(xs))]
    my_heads, my_rows = need_q[rank]
    grouped = found.grouped and not any(b % ratio for b in of_heads)
    if found.grouped and not grouped:  # a group of queries has been cut: each head gets keys of its own
        first = my_heads[0] - need_kv[rank][0][0] * ratio
        cut = (first, first + my_heads[1] - my_heads[0])
        mine[1:] = [s.pick(s.build(aten.repeat_interleave.self_int, x, ratio, 1), 1, [cut]) for x in mine[1:]]
    mask = None if found.mask is None else _mask_of(s, found.mask, placement, queries, keys, my_heads, my_rows)
    result = found.call(s, mine[0], mine[1], mine[2], mask, grouped)
    back = s.build(exchange, [result], (need[0],), (have[0],), rank, group)
    s.exchanged("heads", back, "heads for tokens", _sent([result]))
    own = s.build(operator.getitem, back, 0)
    return s.place(own, placement.with_dim(3, [Factor(s[v].shape[3])]))


def _sent(xs: Sequence[Node]) -> int:
    return sum(value(x).numel() * value(x).element_size() for x in xs)


def _mask_of(
    s: Sharder, mask: Node, q: Placement, queries: Factor, keys: Factor, heads: Interval, rows: Interval
) -> Node:
    """The mask of these heads and rows, its rows and columns in the order in which ranks hold tokens."""
    ndim = s[mask].ndim
    if ndim == 4 and s[mask].shape[0] > 1:
        mask = s.recut(mask, 0, q.dims[0])
    mask = s.whole(mask, range(max(ndim - 3, 0), ndim))
    wanted = {1: _as_held(keys, (0, keys.size)), 2: _as_held(queries, rows), 3: [heads]}
    for back, stretches in wanted.items():
        if ndim >= back and s[mask].shape[ndim - back] > 1:
            mask = s.pick(mask, ndim - back, stretches)
    return mask


def _as_held(factor: Factor, rows: Interval) -> list[Interval]:
    """The stretches of a dimension that stand at `rows` where what all ranks hold is laid end to end."""
    found, at = [], 0
    for rank in range(len(factor.bounds) - 1):
        for lo, hi in factor.pieces(rank):
            start, stop = max(rows[0] - at, 0), min(rows[1] - at, hi - lo)
            if start < stop:
                found.append((lo + start, lo + stop))
            at += hi - lo
    return found
