"""Sharding rules of ops that pick or write rows by index, of einsum, and of complex numbers.

Dimensions are labelled: those of one label are cut alike in all operands (`joint`). Rows that an index may point to have to
be whole on every rank; the index itself, and the other dimensions, may be split.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.ir import aten, value
from pvae.passes.placement import Dim, Factor, Placement
from pvae.passes.shard_sums import HALF, total
from pvae.passes.shard_views import cat, pointwise
from pvae.passes.sharder import ComputeWhole, Sharder, argument, integer, rule, tensor, tensors

Labels = Sequence[Hashable]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Elementwise though torch does not tag them so.
rule(
    aten.polar.default,
    aten.complex.default,
    aten.real.default,
    aten.imag.default,
    aten.conj.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.fill.Tensor,
    aten.fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.floor_divide.default,
)(pointwise)


# --- labelled dimensions -----------------------------------------------------------------------------------------------


def joint(s: Sharder, operands: Sequence[tuple[Node, Labels]], whole: Collection[Hashable] = ()) -> dict[Hashable, Dim]:
    """Where the dimensions of each label lie: as the largest operand that splits one has it, a mesh axis only once.

    Those in `whole` are on every rank. Dimensions of one label have one size, or size 1 and broadcast.
    """
    sizes: dict[Hashable, int] = {}
    for x, labels in operands:
        for label, n in zip(labels, s[x].shape, strict=True):
            sizes[label] = n if sizes.get(label, 1) == 1 else sizes[label]
    dims: dict[Hashable, Dim] = {label: (Factor(n),) for label, n in sizes.items()}
    used: set[int] = set()
    for x, labels in sorted(operands, key=lambda operand: -prod(s[operand[0]].shape)):
        for dim, label in zip(s[x].dims, labels, strict=True):
            axes, taken = Placement((dim,)).axes, Placement((dims[label],)).axes
            if axes and not taken and not axes & used and label not in whole:
                dims[label] = dim
                used |= axes
    return dims


def cut_as(s: Sharder, x: Node, labels: Labels, dims: Mapping[Hashable, Dim]) -> Node:
    """`x` with its dimensions as `joint` has placed them."""
    return s.conform(x, by(labels, dims))


def by(labels: Labels, dims: Mapping[Hashable, Dim]) -> Placement:
    return Placement(tuple(dims[label] for label in labels))


# --- picking rows --------------------------------------------------------------------------------------------------------


@rule(aten.embedding.default)
def embedding(s: Sharder, node: Node) -> Node:
    """A row of the table for each index, wherever the index is."""
    table, index = s.whole(tensor(node)), tensor(node, 1)
    placement = Placement((*s[index].dims, (Factor(s[table].shape[1]),)))
    return s.emit(placement, aten.embedding.default, table, index)


@rule(aten.index_select.default)
def index_select(s: Sharder, node: Node) -> Node:
    x, index = tensor(node), tensor(node, 2)
    dim = integer(node, 1, "dim") % s[x].ndim
    labels = [*range(s[x].ndim)]
    picked: list[Hashable] = [*labels[:dim], "index", *labels[dim + 1 :]]
    of_index = ["index"] * s[index].ndim
    dims = joint(s, [(x, labels), (index, of_index)], whole=[dim]) | ({} if of_index else {"index": (Factor(1),)})
    x, index = cut_as(s, x, labels, dims), cut_as(s, index, of_index, dims)
    return s.emit(by(picked, dims), aten.index_select.default, x, dim, index)


def _indexed(s: Sharder, x: Node, indices: Sequence[Any]) -> tuple[Labels, list[tuple[Node, Labels]], Labels]:
    """Labels of `x`, of the indices, and of `x[indices]`; what the indices point to is `("row", dim)`."""
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if any(value(index).dtype in (torch.bool, torch.uint8) for _, index in given):
        raise ComputeWhole("it indexes by a mask, whose values say how many rows there are")
    where = [d for d, _ in given]
    of_x: list[Hashable] = [("row", d) if d in where else d for d in range(s[x].ndim)]
    rank = max(s[index].ndim for _, index in given)
    of_index: list[Hashable] = [("index", k) for k in range(rank)]
    operands: list[tuple[Node, Labels]] = [(index, of_index[rank - s[index].ndim :]) for _, index in given]
    adjacent = where == [*range(where[0], where[-1] + 1)]
    front = where[0] if adjacent else 0
    kept = [label for label in of_x if not isinstance(label, tuple)]
    return of_x, operands, [*kept[:front], *of_index, *kept[front:]]


@rule(aten.index.Tensor)
def index_rule(s: Sharder, node: Node) -> Node:
    """`x[:, i, j]`: the rows that the indices pick, in place of the dimensions that they index."""
    x, indices = tensor(node), list(node.args[1])
    of_x, of_indices, picked = _indexed(s, x, indices)
    dims = joint(s, [(x, of_x), *of_indices], whole=[label for label in of_x if isinstance(label, tuple)])
    x = cut_as(s, x, of_x, dims)
    mine = iter([cut_as(s, index, labels, dims) for index, labels in of_indices])
    return s.emit(by(picked, dims), aten.index.Tensor, x, [None if i is None else next(mine) for i in indices])


@rule(aten.gather.default)
def gather(s: Sharder, node: Node) -> Node:
    """`out[i, j] = x[index[i, j], j]`: the size of the result is the index's."""
    x, index = tensor(node), tensor(node, 2)
    dim = integer(node, 1, "dim") % max(s[x].ndim, 1)
    labels = [*range(s[index].ndim)]
    of_x = _rows_apart(s, x, index, dim)
    dims = joint(s, [(index, labels), (x, of_x)], whole=[label for label in of_x if label not in labels])
    x, index = cut_as(s, x, of_x, dims), cut_as(s, index, labels, dims)
    return s.emit(by(labels, dims), aten.gather.default, x, dim, index)


def _rows_apart(s: Sharder, x: Node, index: Node, dim: int) -> Labels:
    """Labels of `x`: those of `index` but along `dim`, and where it has more rows than `index`."""
    same = [d != dim and m == n for d, (m, n) in enumerate(zip(s[x].shape, s[index].shape, strict=True))]
    return [d if alike else ("row", d) for d, alike in enumerate(same)]


@rule(aten.one_hot.default)
def one_hot(s: Sharder, node: Node) -> Node:
    x, classes = tensor(node), integer(node, 1, "num_classes", -1)
    if classes < 0:
        raise ComputeWhole("how many classes there are is known by value only")
    return s.again(node, Placement((*s[x].dims, (Factor(classes),))))


@rule(aten.argsort.default, aten.argsort.stable)
def argsort(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    whole = s.whole(x, [integer(node, 1, "dim", -1) % s[x].ndim])
    return s.again(node, s[whole], {x: whole})


@rule(aten.topk.default)
def topk(s: Sharder, node: Node) -> Node:
    """The values and where they are, of a dimension that is made whole."""
    x, k = tensor(node), integer(node, 1, "k")
    dim = integer(node, 2, "dim", -1) % s[x].ndim
    rows = s.whole(x, [dim])
    both = s.build(
        aten.topk.default, rows, k, dim, *node.args[3:], **{n: v for n, v in node.kwargs.items() if n != "dim"}
    )
    placement = s[rows].with_dim(dim, [Factor(k)])
    for user in list(node.users):
        user.replace_all_uses_with(s.emit(placement, operator.getitem, both, user.args[1]))
        s.graph.erase_node(user)
    return both


# --- writing rows --------------------------------------------------------------------------------------------------------


@rule(aten.index_put.default)
def index_put(s: Sharder, node: Node) -> Node:
    """`x[:, i] = values`: rows may be written anywhere, so all ranks have them and write all."""
    x, indices, values = tensor(node), list(node.args[1]), tensor(node, 2)
    of_x, of_indices, picked = _indexed(s, x, indices)
    of_values = picked[len(picked) - s[values].ndim :]
    whole = [label for label in (*of_x, *picked) if isinstance(label, tuple)]
    dims = joint(s, [(x, of_x), *of_indices, (values, of_values)], whole)
    written = cut_as(s, values, of_values, dims)
    mine = iter([cut_as(s, index, labels, dims) for index, labels in of_indices])
    where = [None if i is None else next(mine) for i in indices]
    accumulate = bool(argument(node, 3, "accumulate", False))
    return s.emit(by(of_x, dims), aten.index_put.default, cut_as(s, x, of_x, dims), where, written, accumulate)


@rule(aten.index_copy.default, aten.index_add.default)
def index_copy(s: Sharder, node: Node) -> Node:
    x, index, source = tensor(node), tensor(node, 2), tensor(node, 3)
    dim = integer(node, 1, "dim") % s[x].ndim
    labels: list[Hashable] = [*range(s[x].ndim)]
    of_source = [*labels[:dim], "source", *labels[dim + 1 :]]
    dims = joint(s, [(x, labels), (source, of_source)], whole=[dim, "source"])
    x, source = cut_as(s, x, labels, dims), cut_as(s, source, of_source, dims)
    assert callable(node.target)
    return s.emit(by(labels, dims), node.target, x, dim, s.whole(index), source, **node.kwargs)


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(s: Sharder, node: Node) -> Node:
    """`x[index[i, j], j] = source[i, j]`"""
    x, index, source = tensor(node), tensor(node, 2), node.args[3]
    dim = integer(node, 1, "dim") % max(s[x].ndim, 1)
    labels: list[Hashable] = [*range(s[x].ndim)]
    of_index = [
        label if isinstance(label, int) else ("index", d) for d, label in enumerate(_rows_apart(s, x, index, dim))
    ]
    operands: list[tuple[Node, Labels]] = [(x, labels), (index, of_index)]
    whole: list[Hashable] = [d for d, label in enumerate(of_index) if d != label]
    whole += [label for label in of_index if isinstance(label, tuple)]
    if isinstance(source, Node):
        of_source = [
            label if s[source].shape[d] == s[index].shape[d] else ("source", d) for d, label in enumerate(of_index)
        ]
        operands.append((source, of_source))
        whole += [of_index[d] for d, label in enumerate(of_source) if label != of_index[d]]
        whole += [label for label in of_source if isinstance(label, tuple)]
    dims = joint(s, operands, whole)
    moved = [cut_as(s, operand, its, dims) for operand, its in operands]
    written = moved[2] if isinstance(source, Node) else source
    assert callable(node.target)
    return s.emit(by(labels, dims), node.target, moved[0], dim, moved[1], written, *node.args[4:], **node.kwargs)


@rule(aten.select_scatter.default)
def select_scatter(s: Sharder, node: Node) -> Node:
    """`x[:, index] = source`"""
    x, source = tensor(node), tensor(node, 1)
    dim = integer(node, 2, "dim") % s[x].ndim
    labels = [*range(s[x].ndim)]
    of_source = labels[:dim] + labels[dim + 1 :]
    dims = joint(s, [(x, labels), (source, of_source)], whole=[dim])
    x, source = cut_as(s, x, labels, dims), cut_as(s, source, of_source, dims)
    return s.emit(by(labels, dims), aten.select_scatter.default, x, source, dim, integer(node, 3, "index"))


# --- sums of products ------------------------------------------------------------------------------------------------------


def einsum_labels(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of every operand's dimensions and of the result's, with `...` as letters that the equation leaves over."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in _LETTERS if letter not in equation]
    most = max((n - len(t) + 3 for t, n in zip(terms, ranks, strict=True) if "..." in t), default=0)
    dots = "".join(free[:most])

    def spelled(term: str, rank: int) -> str:
        return term.replace("...", dots[most - (rank - len(term) + 3) :]) if "..." in term else term

    inputs = [spelled(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        return inputs, right.replace("...", dots)
    letters = re.sub(r"[.,]", "", left)
    return inputs, dots + "".join(sorted(letter for letter in {*letters} if letters.count(letter) == 1))


@rule(aten.einsum.default)
def einsum(s: Sharder, node: Node) -> Node:
    """Where a summed dimension is split, every rank sums over its piece and the sums are added up."""
    equation, operands = argument(node, 0, "equation"), tensors(node, 1)
    inputs, output = einsum_labels(equation, [s[x].ndim for x in operands])
    return _contracted(s, node, operands, inputs, output, equation)


@rule(aten.outer.default)
def outer(s: Sharder, node: Node) -> Node:
    return _contracted(s, node, [tensor(node), tensor(node, 1)], ["i", "j"], "ij", "i,j->ij")


def _contracted(
    s: Sharder, node: Node, operands: Sequence[Node], inputs: Sequence[str], output: str, equation: str
) -> Node:
    labelled = list(zip(operands, inputs, strict=True))
    twice = {letter for letters in inputs for letter in letters if letters.count(letter) > 1}  # a diagonal
    dims = joint(s, labelled, whole=twice)
    placement = by(output, dims)
    moved = [cut_as(s, x, letters, dims) for x, letters in labelled]
    axes = [] if s.patch else sorted(by([letter for letter in dims if letter not in [*output]], dims).axes)
    if axes and value(node).dtype in HALF:  # partial sums are rounded once, at the end
        moved = [s.build(aten.to.dtype, x, torch.float32) for x in moved]
    result = total(s, s.build(aten.einsum.default, equation, moved), axes)
    if value(result).dtype != value(node).dtype:
        result = s.build(aten.to.dtype, result, value(node).dtype)
    return s.place(result, placement)


# --- complex numbers -------------------------------------------------------------------------------------------------------


@rule(aten.view_as_complex.default)
def view_as_complex(s: Sharder, node: Node) -> Node:
    """`[..., 2]` to `[...]`"""
    x = tensor(node)
    pairs = s.whole(x, [s[x].ndim - 1])
    return s.again(node, Placement(s[pairs].dims[:-1]), {x: pairs})


@rule(aten.view_as_real.default)
def view_as_real(s: Sharder, node: Node) -> Node:
    return s.again(node, Placement((*s[tensor(node)].dims, (Factor(2),))))


# --- lists of sequences ------------------------------------------------------------------------------------------------------


@rule(aten.vstack.default)
def vstack(s: Sharder, node: Node) -> Node:
    if min(s[x].ndim for x in tensors(node)) < 2:
        raise ComputeWhole("an operand is a vector")
    return cat(s, node)


@rule(aten.pad_sequence.default)
def pad_sequence(s: Sharder, node: Node) -> Node:
    """Sequences `[length, ...]` as a batch."""
    parts = tensors(node)
    if len({s[x].shape[0] for x in parts}) > 1:
        raise ComputeWhole("the sequences have different lengths, and are padded at their ends")
    labels = [*range(s[parts[0]].ndim)]
    dims = joint(s, [(x, labels) for x in parts])
    placement = list(by(labels, dims).dims)
    batch = 0 if argument(node, 1, "batch_first", False) else 1
    placement.insert(batch, (Factor(len(parts)),))
    parts = [cut_as(s, x, labels, dims) for x in parts]
    return s.emit(Placement(tuple(placement)), aten.stack.default, parts, batch)
