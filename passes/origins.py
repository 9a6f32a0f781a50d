"""Where the positions of every dimension begin: dimensions followed through a graph, for `token_sources.py`.

Linear layers, norms, pointwise ops, transposes, reshapes that keep a dimension, cat and slices carry a dimension from operand
to result. `Origins` goes through the graph once, forwards. Of every dimension of every value it knows the runs that it
consists of, in order, and at which dimension of which value each begins: after `cat([text, image], 1)` there are two. What
it cannot follow begins anew.

Not every value along a token dimension holds tokens. Of the operands of a pointwise op, those carry it that come out of a
layer (a linear, convolution, norm or attention), and without any the largest; so rotary tables, position embeddings, gates
and masks that are inputs are passed over. What depends on inputs by cosines, integers or booleans alone (rotary tables
and modulation made in the graph) and what depends on weights alone (learned queries) carries nothing.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.passes.ancestry import Ancestry
from pvae.passes.canonicalize import SPLITS
from pvae.passes.ir import CONVS, ConvNode, PadNode, aten, is_tensor, value
from pvae.passes.shard_index import einsum_labels
from pvae.passes.shard_sums import REDUCTIONS
from pvae.passes.shard_views import RESHAPES, pointwise
from pvae.passes.sharder import RULES, argument, is_pointwise, tensors

__all__ = ["SDPA", "SOFTMAX", "STAYS_SPLIT", "Origins", "Place", "is_elementwise", "named", "product_of"]

Place = tuple[Node, int]  # a dimension of a value


# --- runs of positions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """`size` neighbouring positions of a dimension, where they begin, and whether a layer has made them what they are."""

    size: int
    begins: frozenset[Place] = frozenset()
    layered: bool = False


Runs = tuple[Run, ...]


def extent(runs: Runs) -> int:
    return sum(run.size for run in runs)


def joined(runs: Iterable[Run]) -> Runs:
    """Neighbours that begin at the same places are one run."""
    result: list[Run] = []
    for run in runs:
        if result and replace(result[-1], size=run.size) == run:
            result[-1] = replace(run, size=result[-1].size + run.size)
        elif run.size:
            result.append(run)
    return tuple(result)


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """Positions `[start, stop)`."""
    ends = accumulate(run.size for run in runs)
    sizes = ((run, min(stop, end) - max(start, end - run.size)) for run, end in zip(runs, ends, strict=True))
    return joined(replace(run, size=size) for run, size in sizes if size > 0)


def merged(operands: Sequence[tuple[int, Runs]]) -> Runs:
    """Of values with so many elements that are read position by position: what comes out of a layer, else the largest."""
    if len({runs for _, runs in operands}) == 1:
        return operands[0][1]
    bounds = sorted({0, *(end for _, runs in operands for end in accumulate(run.size for run in runs))})
    result = []
    for start, stop in pairwise(bounds):
        here = [(n, run) for n, runs in operands for run in cut(runs, start, stop) if run.begins]
        most = max(((run.layered, n) for n, run in here), default=(False, 0))
        kept = (run.begins for n, run in here if run.layered or (False, n) == most)
        result.append(Run(stop - start, frozenset().union(*kept), most[0]))
    return joined(result)


def layered(runs: Runs) -> Runs:
    return tuple(replace(run, layered=bool(run.begins)) for run in runs)


def covering(dims: Sequence[Runs], start: int, size: int) -> list[Runs]:
    """Those of `dims` that together are a dimension of `size` with `start` positions of others before it; or none."""
    parts: list[Runs] = []
    position, covered = 1, 1
    for runs in dims:
        n = extent(runs)
        if n > 1 and position >= start and covered < size:
            if position != start * covered:
                return []
            parts.append(runs)
            covered *= n
        position *= n
    return parts if covered == size else []


# --- the walk ------------------------------------------------------------------------------------------------------------


class Origins:
    """The runs of every dimension of every value of a graph, and the FLOPs of linear layers by where their tokens begin."""

    def __init__(self, graph: Graph, weights: frozenset[str]) -> None:
        self.ancestry = Ancestry(weights)
        self.active: set[Node] = set()  # what carries activations
        self.runs: dict[Place, Runs] = {}
        self.parts: dict[Place, list[Runs]] = {}  # dimensions that a reshape has made of several, and these
        self.flops: dict[Place, float] = defaultdict(float)
        for node in graph.nodes:
            if self._carries(node):
                self.active.add(node)
                if is_tensor(node) and _is_static(node):
                    self._follow(node)

    def of(self, x: Node, dim: int) -> Runs:
        return self.runs.get((x, dim % value(x).dim())) or (Run(value(x).shape[dim]),)

    def together(self, operands: Iterable[Place]) -> Runs:
        return merged([(value(x).numel(), self.of(x, dim)) for x, dim in operands])

    def apart(self, runs: Runs) -> list[Runs]:
        """The dimensions, outermost first, that a reshape has merged to one of these runs; itself where there is none."""
        if len(runs) > 1 or len(runs[0].begins) != 1:
            return [runs]
        (place,) = runs[0].begins
        if place not in self.parts or value(place[0]).shape[place[1]] != runs[0].size:
            return [runs]
        return [layered(part) for part in self.parts[place]] if runs[0].layered else self.parts[place]

    def _carries(self, node: Node) -> bool:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
            return False
        if node.op == "placeholder":
            return isinstance(val, torch.Tensor) and node.name not in self.ancestry.weights
        if node.target is aten.embedding.default:
            return self.ancestry.from_input(node)
        return node.target not in EMPTY and any(n in self.active for n in node.all_input_nodes)

    def _follow(self, node: Node) -> None:
        rule = FOLLOW.get(node.target) or (_pointwise if is_elementwise(node) else None)
        rule = rule if all(map(_is_static, node.all_input_nodes)) else None
        for dim, size in enumerate(value(node).shape):
            if size > 1:
                place = node, dim
                runs = rule(self, node, dim) if rule else None
                if runs is None:
                    parts = [run for part in self.parts.get(place, ()) for run in part]
                    made = bool(parts) and all(run.layered for run in parts)
                    runs = (Run(size, frozenset({place}), made),)
                self.runs[place] = layered(runs) if node.target in LAYERS else runs
        flops = self._linear_flops(node)
        for dim in range(value(node).dim()) if flops else ():
            self._count(self.of(node, dim), flops)

    def _count(self, runs: Runs, flops: float) -> None:
        for run in runs:
            share = flops * run.size / extent(runs)
            for place in run.begins:
                self.flops[place] += share
                for part in self.parts.get(place, ()):
                    self._count(part, share)

    def _linear_flops(self, node: Node) -> int:
        conv = ConvNode.of(node)
        if conv is not None:
            return conv.flops or 0
        if node.target not in PRODUCTS:
            return 0
        a, b = node.args[PRODUCTS[node.target] :][:2]
        return 0 if b in self.active else 2 * value(node).numel() * value(a).shape[-1]


def is_elementwise(node: Node) -> bool:
    return is_pointwise(node) or RULES.get(node.target) is pointwise


def _is_static(node: Node) -> bool:
    return not is_tensor(node) or all(isinstance(n, int) for n in value(node).shape)


# --- what carries a dimension: op -> rule(origins, node, dim) gives its runs, or None where it begins here -----------------

Rule = Callable[[Origins, Node, int], Runs | None]
FOLLOW: dict[Any, Rule] = {}

LIKES = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
FILLED = (aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, *LIKES)
EMPTY = frozenset({aten.cos.default, aten.sin.default, aten.polar.default, *(op.default for op in FILLED)})  # no tokens
PRODUCTS = {  # and where their first factor stands; the second follows
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
NORMS = frozenset(
    {
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.instance_norm.default,
        aten.batch_norm.default,
    }
)
SUMS = {aten.mean.dim: 1, aten.sum.dim_IntList: 1, **REDUCTIONS}  # and where they name their dimensions
SDPA = aten.scaled_dot_product_attention.default
LAYERS = NORMS | set(SUMS) | set(PRODUCTS) | set(CONVS) | {aten.einsum.default, SDPA}
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
ELSEWHERE = {  # ops that leave all dimensions alone but those that they name, and where they do
    **dict.fromkeys(SOFTMAX, 1),
    aten.log_softmax.int: 1,
    aten.cumsum.default: 1,
    aten.flip.default: 1,
    aten.index_select.default: 1,
    aten.roll.default: 2,
    aten.repeat_interleave.self_int: 2,
}
# Ops that make a dimension of another one, and leave it split where that was (their sharding rules say so).
STAYS_SPLIT = frozenset(
    {*RESHAPES, *CONVS, aten.slice.Tensor, aten.flip.default, aten.roll.default, aten.repeat_interleave.self_int}
)


def _follows(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        FOLLOW.update(dict.fromkeys(targets, rule))
        return rule

    return register


def named(node: Node, position: int = 1, name: str = "dim", default: Any = 0) -> list[int]:
    """The dimensions of its first operand that an op names, all of them where it names none."""
    ndim, given = value(node.args[0]).dim(), argument(node, position, name, default)
    given = [given] if isinstance(given, int) else given
    return [d % ndim for d in given] if given else list(range(ndim))


@_follows(aten.expand.default)
def _pointwise(o: Origins, node: Node, dim: int) -> Runs | None:
    last, size = dim - value(node).dim(), value(node).shape[dim]
    operands = [(x, last) for x in node.all_input_nodes if is_tensor(x) and value(x).dim() >= -last]
    full = [(x, last) for x, last in operands if value(x).shape[last] == size]
    return o.together(full) if full else (Run(size),)  # copies of one position


@_follows(*NORMS, aten.view_as_complex.default, aten.view_as_real.default)
def _same(o: Origins, node: Node, dim: int) -> Runs | None:
    return o.of(node.args[0], dim) if dim < value(node.args[0]).dim() else None


@_follows(*ELSEWHERE)
def _elsewhere(o: Origins, node: Node, dim: int) -> Runs | None:
    x, own = node.args[0], named(node, ELSEWHERE[node.target], "dims", None)
    return None if dim in own and value(x).shape[dim] > 1 else _pointwise(o, node, dim)


@_follows(*SUMS, aten.select.int)
def _without(o: Origins, node: Node, dim: int) -> Runs | None:
    x, gone = node.args[0], named(node, SUMS.get(node.target, 1), "dim", None)
    if value(node).dim() == value(x).dim():
        return None if dim in gone else o.of(x, dim)
    return o.of(x, [d for d in range(value(x).dim()) if d not in gone][dim])


# --- products ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A product of tensors as einsum has it: a letter for each dimension of the factors and of the result."""

    factors: tuple[tuple[Node, str], ...]
    result: str


def product_of(node: Node) -> Product | None:
    """Of einsum, and of matmul and its like."""
    if node.target is aten.einsum.default:
        factors = tensors(node, 1)
        letters, result = einsum_labels(node.args[0], [value(x).dim() for x in factors])
        return Product(tuple(zip(factors, letters, strict=True)), result)
    if node.target not in PRODUCTS or node.target is aten.linear.default:
        return None
    x, y = node.args[PRODUCTS[node.target] :][:2]
    rows, columns = "i" * (value(x).dim() > 1), "j" * (value(y).dim() > 1)
    batch = "abcdefgh"[: value(node).dim() - len(rows + columns)]
    first, second = (batch[len(batch) - max(value(t).dim() - 2, 0) :] for t in (x, y))
    return Product(((x, first + rows + "k"), (y, second + "k" + columns)), batch + rows + columns)


@_follows(aten.linear.default)
def _linear(o: Origins, node: Node, dim: int) -> Runs | None:
    return o.of(node.args[0], dim) if dim < value(node).dim() - 1 else None


@_follows(*(set(PRODUCTS) - {aten.linear.default}), aten.einsum.default)
def _product(o: Origins, node: Node, dim: int) -> Runs | None:
    product = product_of(node)
    assert product is not None
    letter, size = product.result[dim], value(node).shape[dim]
    places = [(x, term.index(letter)) for x, term in product.factors if letter in term]
    return o.together([(x, d) for x, d in places if value(x).shape[d] == size])


@_follows(SDPA)
def _attention(o: Origins, node: Node, dim: int) -> Runs | None:
    q, _, v = node.args[:3]
    return o.of(v if dim == value(node).dim() - 1 else q, dim)


@_follows(*CONVS)
def _convolution(o: Origins, node: Node, dim: int) -> Runs | None:
    """Batch, and where the kernel is one position wide."""
    conv = ConvNode.of(node)
    assert conv is not None
    i = dim - value(node).dim() + conv.ndim
    alone = i >= 0 and conv.kernel[i] == conv.stride[i] == 1 and conv.padding[i] == (0, 0)
    return o.of(conv.x, dim) if alone or i == -2 else None


# --- views and pieces ----------------------------------------------------------------------------------------------------


@_follows(*RESHAPES, aten.unsqueeze.default)
def _reshape(o: Origins, node: Node, dim: int) -> Runs | None:
    """A dimension stays the same where it keeps its size and as many positions are before it; one that earlier reshapes
    have merged comes apart again."""
    x, shape = node.args[0], value(node).shape
    start, size = math.prod(shape[:dim]), shape[dim]
    dims = [o.of(x, d) for d in range(value(x).dim())]
    parts = covering(dims, start, size)
    while not parts and len(finer := [part for runs in dims for part in o.apart(runs)]) > len(dims):
        dims, parts = finer, covering(finer, start, size)
    if len(parts) > 1:
        o.parts[node, dim] = parts
    return parts[0] if len(parts) == 1 else None


@_follows(aten.permute.default)
def _permute(o: Origins, node: Node, dim: int) -> Runs | None:
    return o.of(node.args[0], argument(node, 1, "dims")[dim])


@_follows(aten.transpose.int, aten.t.default)
def _transpose(o: Origins, node: Node, dim: int) -> Runs | None:
    order = list(range(value(node).dim()))
    a, b = node.args[1:] if node.target is aten.transpose.int else (0, -1)
    order[a], order[b] = order[b], order[a]
    return o.of(node.args[0], order[dim])


@_follows(operator.getitem)
def _piece(o: Origins, node: Node, dim: int) -> Runs | None:
    """Of a split, chunk or unbind."""
    op, index = node.args
    x = op.args[0]
    if op.target is aten.unbind.int:
        return o.of(x, dim + (dim >= named(op)[0]))
    if op.target not in SPLITS:
        return None
    if dim not in named(op, 2):
        return o.of(x, dim)
    sizes = [piece.shape[dim] for piece in value(op)]
    return cut(o.of(x, dim), sum(sizes[:index]), sum(sizes[: index + 1]))


@_follows(aten.slice.Tensor)
def _slice(o: Origins, node: Node, dim: int) -> Runs | None:
    x = node.args[0]
    if dim not in named(node):
        return o.of(x, dim)
    bounds = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
    start, stop, step = bounds.indices(value(x).shape[dim])
    return cut(o.of(x, dim), start, stop) if step == 1 else None


@_follows(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _cat(o: Origins, node: Node, dim: int) -> Runs | None:
    parts = [x for x in tensors(node) if value(x).shape != (0,)]
    if dim != argument(node, 1, "dim", 0) % value(node).dim():
        return o.together((x, dim) for x in parts)
    return joined(run for x in parts for run in o.of(x, dim))


@_follows(aten.stack.default)
def _stack(o: Origins, node: Node, dim: int) -> Runs | None:
    new = argument(node, 1, "dim", 0) % value(node).dim()
    return None if dim == new else o.together((x, dim - (dim > new)) for x in tensors(node))


@_follows(aten.repeat.default)
def _repeat(o: Origins, node: Node, dim: int) -> Runs | None:
    x, times = node.args[:2]
    d = dim - value(node).dim() + value(x).dim()
    return joined(o.of(x, d) * times[dim]) if d >= 0 else (Run(times[dim]),)


@_follows(aten.pad.default, aten.constant_pad_nd.default)
def _pad(o: Origins, node: Node, dim: int) -> Runs | None:
    pad = PadNode.of(node)
    assert pad is not None
    front, back = pad.along(value(node).dim() - 1 - dim)
    return joined((Run(front), *o.of(pad.x, dim), Run(back))) if min(front, back) >= 0 else None


@_follows(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(o: Origins, node: Node, dim: int) -> Runs | None:
    """What is written in place of a part; elsewhere it has to be the like of what it is written to, if that is anything."""
    x, written = node.args[:2]
    (at,) = named(node, 2)
    selected = node.target is aten.select_scatter.default
    if dim == at and selected:
        return o.of(x, dim)
    if dim == at:
        bounds = slice(argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1))
        start, stop, step = bounds.indices(value(x).shape[dim])
        around = cut(o.of(x, dim), 0, start), cut(o.of(x, dim), stop, value(x).shape[dim])
        return joined((*around[0], *o.of(written, dim), *around[1])) if step == 1 else None
    both = [(x, dim), (written, dim - (selected and dim > at))]
    active = [place for place in both if place[0] in o.active]
    return o.together(active) if len({tuple(run.begins for run in o.of(*place)) for place in active}) == 1 else None
