"""Attention under a mask that lets each query see a prefix of the keys runs block by block, without the mask.

Causal video VAEs attend over all frames at once, each token to its own frame and those before it. Their mask has (T*H*W)^2
values, which is what runs out of memory first (50 to 200 GiB asked for at 720p), and no fused kernel takes it. Queries that
see the same prefix are neighbours, so each such run (a frame) is one attention over a slice of the keys: the same sums, half
the arithmetic, no mask.

Two spellings are read: `where(meshgrid(frame, frame) compared, 0, -inf)` (HunyuanVideo) and a loop that writes zeros into
rows of `full(-inf)` (HunyuanVideo 1.5; one row a token, all of which goes with the mask).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.passes.ir import CASTS, Builder, aten, is_tensor, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

MASK_VIEWS = frozenset({aten.unsqueeze.default, aten.expand.default, aten.reshape.default}) | CASTS
MOST_BLOCKS = 1024  # one attention each


def prefixes(mask: Node) -> list[int] | None:
    """How many keys each query sees, if `mask` [*, n, n] adds 0 to a prefix of each row and -inf to the rest."""
    n = static(value(mask).shape[-1])
    while mask.target in MASK_VIEWS:
        source = mask.args[0]
        if not isinstance(source, Node) or not is_tensor(source) or value(source).shape[-1] != n:
            return None
        mask = source
    if n is None or tuple(value(mask).shape) != (n, n):
        return None
    return _compared(mask) or _written(mask, n)


def _compared(mask: Node) -> list[int] | None:
    """`where(x <= y, 0, -inf)` with x, y = meshgrid(frame, frame, indexing="xy"), frame the number of each token's frame."""
    if mask.target is not aten.where.Scalar or tuple(mask.args[1:]) != (0, -math.inf):
        return None
    compared = mask.args[0]
    if not isinstance(compared, Node) or compared.target is not aten.le.Tensor:
        return None
    grids = [g for g in compared.args if isinstance(g, Node) and g.target is operator.getitem]
    if [g.args[1] for g in grids] != [0, 1] or grids[0].args[0] is not grids[1].args[0]:
        return None
    mesh = grids[0].args[0]
    assert isinstance(mesh, Node)
    if mesh.target is not aten.meshgrid.indexing or mesh.kwargs.get("indexing") != "xy":
        return None
    rows, columns = mesh.args[0]
    if rows is not columns or not isinstance(rows, Node) or rows.target is not aten.repeat_interleave.self_int:
        return None
    frames, each = rows.args[:2]
    if not isinstance(frames, Node) or frames.target is not aten.arange.start or not isinstance(each, int):
        return None
    return [(frame + 1) * each for frame in range(value(frames).shape[0]) for _ in range(each)]


def _written(mask: Node, n: int) -> list[int] | None:
    """`full(-inf)` with `mask[i, :k] = 0` for every row i, in any order, each once."""
    found: dict[int, int] = {}
    while mask.target is aten.select_scatter.default:
        before, row, dim, index = mask.args
        stop = _zeroed(row, before, index, n) if dim == 0 and isinstance(index, int) else None
        if stop is None or index in found or not isinstance(before, Node):
            return None
        found[index] = stop
        mask = before
    if mask.target is not aten.full.default or mask.args[1] != -math.inf or len(found) != n:
        return None
    return [found[i] for i in range(n)]


def _zeroed(row: Any, mask: Any, index: Any, n: int) -> int | None:
    """k, if `row` is row `index` of `mask` with its first k values set to 0."""
    stop = n
    if row.target is aten.slice_scatter.default:
        kept, row, *where = row.args
        if not _is_row(kept, mask, index) or len(where) != 3 or where[:2] != [0, 0]:
            return None
        stop = where[2]
    if row.target not in (aten.fill.Tensor, aten.fill.Scalar) or not _is_zero(row.args[1]):
        return None
    filled = row.args[0]
    if stop != n:
        if filled.target is not aten.slice.Tensor or tuple(filled.args[1:]) != (0, 0, stop):
            return None
        filled = filled.args[0]
    return stop if _is_row(filled, mask, index) and 0 < stop <= n else None


def _is_row(node: Node, mask: Node, index: int) -> bool:
    return node.target is aten.select.int and tuple(node.args) == (mask, 0, index)


def _is_zero(number: Any) -> bool:
    if isinstance(number, Node) and number.op == "get_attr":
        module = number.graph.owning_module
        tensor = getattr(module, str(number.target))
        tensor = getattr(tensor, "constant", tensor)  # a fake tensor keeps the number that it was made from, or None
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor is not None and tensor.numel() == 1 and tensor.item() == 0
    return isinstance(number, (int, float)) and number == 0


class PrefixAttention:
    """`sdpa(q, k, v, mask)` -> one attention for each run of queries with the same prefix."""

    name = "prefix_attention"

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        dropout, causal = [*node.args[4:], *(0.0, False)[max(0, len(node.args) - 4) :]][:2]
        if (
            not isinstance(mask, Node)
            or dropout
            or causal
            or node.kwargs.get("dropout_p")
            or node.kwargs.get("is_causal")
        ):
            return None
        stops = prefixes(mask)
        if stops is None:
            return None
        runs = [(stop, len(list(run))) for stop, run in groupby(stops)]
        if len(runs) > MOST_BLOCKS:
            return Refusal(node, f"the queries see {len(runs)} different prefixes, at most {MOST_BLOCKS} are worth it")
        gib = len(stops) ** 2 * value(mask).itemsize / 2**30
        return Match(node, runs, f"{len(runs)} blocks instead of a mask of {gib:.2g} GiB")

    def rewrite(self, graph: Graph, match: Match) -> None:
        node, build = match.node, Builder(match.node)
        q, k, v = node.args[:3]
        kwargs = {name: given for name, given in node.kwargs.items() if name in ("scale", "enable_gqa")}
        pieces, start = [], 0
        for stop, length in match.facts:
            query = build(aten.slice.Tensor, q, -2, start, start + length)
            key, val = (build(aten.slice.Tensor, x, -2, 0, stop) for x in (k, v))
            pieces.append(build(aten.scaled_dot_product_attention.default, query, key, val, **kwargs))
            start += length
        build.replace(pieces[0] if len(pieces) == 1 else build(aten.cat.default, pieces, -2))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [PrefixAttention()]


PREFIX_ATTENTION = Pass(
    name="prefix_attention",
    summary="attention under a frame-causal mask, frame by frame without the mask",
    rules=_rules,
)

__all__ = ["PREFIX_ATTENTION", "prefixes"]
