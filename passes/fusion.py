"""Which nodes of a graph become kernels of their own once Inductor has fused the others into them, and what they read.

A node is one of five kinds:

    free       views, casts to the same type: nothing runs
    fusible    pointwise ops, casts, copies, pads, cats, resampling, norms. It is a kernel of its own only if something that
               is not fusible reads it (a convolution, the output), or if several nodes do and it reads more than one large
               value itself; else it is computed where it is read and costs nothing. A kernel reads each value that it
               and the nodes fused into it read once, no more of it than they use, and writes its result.
    reduction  a fusible one that has to read its rows to the end first. Rows of up to 4096 elements stay in one kernel; a
               longer one is a kernel of its own for its statistics.
    fetch      plain torch around a collective (also `exchange`): packs what it sends and writes its result, each from what it
               is made of
    alone      everything else (convolutions, products, attention, opaque ops): reads its inputs and writes its result
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import channels_last
from pvae.passes.ir import CASTS, VIEW_OPS, aten, value
from pvae.runtime.exchange import exchange, is_local
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import fetch_plan

__all__ = [
    "NORMS",
    "Fusion",
    "bytes_of",
    "elements",
    "exchange_arguments",
    "fetch_arguments",
    "kind_of",
    "row_length",
    "tensors_of",
]

LONG_ROW = 4096


# Kinds of node --------------------------------------------------------------------------------------------------------

_FREE = VIEW_OPS | {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.view_as.default,
    aten.expand_as.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
_SAME = CASTS | {aten.contiguous.default, channels_last.OP}  # free where the result is laid out as the argument is
_FUSIBLE = _SAME | {
    aten.cat.default,
    aten.stack.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.copy_.default,
    aten.copy.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.arange.default,
    aten.arange.start,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.type_as.default,
    aten.batch_norm.default,  # in inference, a scale and a shift
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
}
# Norms: the statistics are the reduction; applying them is pointwise.
NORMS = frozenset(
    {
        aten.group_norm.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.instance_norm.default,
        aten.softmax.int,
        aten._softmax.default,
    }
)
_REDUCTIONS = frozenset(
    {
        aten.linalg_vector_norm.default,
        aten.mean.default,
        aten.mean.dim,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.var.correction,
        aten.var_mean.correction,
        aten.std.correction,
        aten.norm.ScalarOpt_dim,
    }
)


def kind_of(node: Node) -> str:
    """free, fusible, reduction, fetch or alone, as the module docstring says; or input, or output."""
    target = node.target
    if node.op in ("placeholder", "get_attr"):
        return "input"
    if node.op == "output":
        return "output"
    if not tensors_of(node) or target in _FREE:
        return "free"
    if target in _SAME and _unchanged(node):
        return "free"
    if target in _REDUCTIONS:
        return "reduction"
    if target in _FUSIBLE or target in NORMS or torch.Tag.pointwise in getattr(target, "tags", ()):
        return "fusible"
    if target is fetch:
        return "free" if _local_view(node) else "fetch"
    if target is exchange:
        given = exchange_arguments(node)
        return "free" if is_local(given["have"], given["need"]) else "fetch"
    return "alone"


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors that a node stands for: one, or those of its tuple; none for a number."""
    val = node.meta.get("val")
    values = val if isinstance(val, (tuple, list)) else (val,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _unchanged(node: Node) -> bool:
    x, y = node.args[0], value(node)
    if not isinstance(x, Node) or not isinstance(value(x), torch.Tensor):
        return False
    x = value(x)
    return x.dtype == y.dtype and x.device == y.device and x.shape == y.shape and x.stride() == y.stride()


def elements(node: Node) -> int:
    return sum(t.numel() for t in tensors_of(node))


def bytes_of(node: Node) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(node))


def row_length(node: Node) -> float:
    """How many elements one result of a reduction, or one statistic of a norm, is made of."""
    x = value(node.args[0])
    match node.target:
        case aten.group_norm.default:
            return x.numel() / max(x.shape[0] * int(node.args[1]), 1)
        case aten.instance_norm.default:
            return x.numel() / max(x.shape[0] * x.shape[1], 1)
        case aten.layer_norm.default | aten.rms_norm.default:
            return math.prod(node.args[1])
        case aten.softmax.int | aten._softmax.default:
            return x.shape[node.args[1]]
    return x.numel() / max(elements(node), 1)


def fetch_arguments(node: Node) -> dict[str, Any]:
    names = ("x", "dim", "have", "need", "rank", "fill", "group", "channels_last")
    defaults = {"rank": 0, "fill": "zeros", "group": None, "channels_last": False}
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    given["have"], given["need"] = tuple(given["have"]), tuple(tuple(pair) for pair in given["need"])
    return given


def exchange_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an `exchange`, `xs` as a tuple of nodes."""
    names = ("xs", "have", "need", "rank", "group")
    given = {"rank": 0, "group": None, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("have", "need"):
        given[name] = tuple(tuple(((a, b), (c, d)) for (a, b), (c, d) in boxes) for boxes in given[name])
    return {**given, "xs": tuple(given["xs"])}


def _local_view(node: Node) -> bool:
    given = fetch_arguments(node)
    plan = fetch_plan(given["have"], given["need"], given["fill"])
    parts = plan.ranks[given["rank"]].parts
    return plan.kind == "local" and len(parts) == 1 and parts[0].origin == "own" and parts[0][3:] == (False, 1)


# Fusion ---------------------------------------------------------------------------------------------------------------


class Fusion:
    """Which nodes are kernels, and what each kernel reads: {value that is in memory: elements of it}."""

    def __init__(self, graph: Graph) -> None:
        self._kinds = {node: kind_of(node) for node in graph.nodes}
        self._reads: dict[Node, dict[Node, int]] = {}
        self.kernels: set[Node] = set()
        for node in graph.nodes:
            self._reads[node] = self._through(node)
            if self._kinds[node] in ("alone", "fetch") or self._is_kernel(node):
                self.kernels.add(node)

    def reads(self, node: Node) -> dict[Node, int]:
        """What the kernel `node`, or the output, reads from memory."""
        return self._reads[node]

    def held(self, node: Node) -> dict[Node, int]:
        """What a reader of `node` reads: itself where it is in memory, else what it is computed from."""
        if node in self.kernels or self._kinds[node] == "input":
            return {node: elements(node)}
        return self._reads[node]

    def _through(self, node: Node) -> dict[Node, int]:
        reads: dict[Node, int] = {}
        for before in node.all_input_nodes:
            for source, count in self.held(before).items():
                reads[source] = max(reads.get(source, 0), count)
        if self._kinds[node] in ("free", "fusible") and node.target not in NORMS:  # uses no more than it is made of
            own = elements(node)
            reads = {source: min(count, own) for source, count in reads.items()} if own else reads
        return reads

    def _is_kernel(self, node: Node) -> bool:
        kind = self._kinds[node]
        if kind not in ("fusible", "reduction"):
            return False
        if kind == "reduction" and row_length(node) > LONG_ROW:
            return True
        users = self._users(node)
        if any(self._kinds[user] in ("alone", "output") for user in users):
            return True
        large = [s for s, count in self._reads[node].items() if 8 * count >= elements(node)]
        return len(users) > 1 and len(large) > 1

    def _users(self, node: Node) -> list[Node]:
        """The nodes that read `node`, through views."""
        found, todo = [], list(node.users)
        while todo:
            user = todo.pop()
            if self._kinds[user] == "free":
                todo += user.users
            else:
                found.append(user)
        return found
