"""Sharding rules of ops that sum over dimensions: norms, reductions, matrix products.

Where the summed dimension is split, ranks exchange partial results (means and variances, sums), which are small.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.ir import aten, value
from pvae.passes.placement import Factor, Placement
from pvae.passes.sharder import ComputeWhole, Sharder, argument, integer, integers, rule, tensor
from pvae.runtime.fetch import fetch

HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def gathered(s: Sharder, x: Node, axis: int) -> Node:
    """`x` of every rank of a mesh axis, stacked in a new first dimension. Not placed."""
    world = s.mesh.shape[axis]
    row = s.build(aten.unsqueeze.default, x, 0)
    have = tuple(range(world + 1))
    everything, where = ((0, world),) * world, (s.mesh.coordinates[axis], "zeros", s.mesh.groups[axis])
    got = s.build(fetch, row, 0, have, everything, *where)
    s.exchanged("partial sums", got, "partial sums", value(row).numel() * value(row).element_size())
    return got


def total(s: Sharder, x: Node, axes: Sequence[int]) -> Node:
    """The sum of `x` over the ranks of these mesh axes. Not placed."""
    for axis in axes:
        x = s.build(aten.sum.dim_IntList, gathered(s, x, axis), [0])
    return x


def moments(s: Sharder, x: Node, dims: Sequence[int], factors: Sequence[Factor]) -> tuple[Node, Node]:
    """Mean and biased variance of `x` (in its own dtype) over local dimensions, which hold these split factors.

    Each rank's own are combined by Chan, Golub, LeVeque (1979), so nothing cancels: one exchange a mesh axis.
    """
    if value(x).numel():
        both = s.build(aten.var_mean.correction, x, list(dims), correction=0, keepdim=True)
        variance, mean = s.build(operator.getitem, both, 0), s.build(operator.getitem, both, 1)
    else:  # an empty piece: it has no share in the sums
        shape = [1 if d in dims else n for d, n in enumerate(value(x).shape)]
        variance = mean = s.build(aten.new_zeros.default, x, shape)
    for f in factors:
        assert f.axis is not None
        pairs = gathered(s, s.build(aten.stack.default, [mean, variance]), f.axis)
        counts = [hi - lo for lo, hi in f.spans]
        parts = [(s.build(aten.select.int, pairs, 0, r), n / f.size) for r, n in enumerate(counts) if n]
        means = [(s.build(aten.select.int, part, 0, 0), share) for part, share in parts]
        variances = [s.build(aten.select.int, part, 0, 1) for part, _ in parts]
        mean = _weighted(s, means)
        off = [s.build(aten.sub.Tensor, m, mean) for m, _ in means]
        around = [
            s.build(aten.add.Tensor, v, s.build(aten.mul.Tensor, d, d)) for v, d in zip(variances, off, strict=True)
        ]
        variance = _weighted(s, [(a, share) for a, (_, share) in zip(around, parts, strict=True)])
    return mean, variance


def _weighted(s: Sharder, terms: Sequence[tuple[Node, float]]) -> Node:
    first, *rest = [s.build(aten.mul.Tensor, x, share) for x, share in terms]
    for x in rest:
        first = s.build(aten.add.Tensor, first, x)
    return first


def split_factors(s: Sharder, x: Node, dims: Sequence[int]) -> list[Factor]:
    return [f for d in dims for f in s[x].dims[d] if f.axis is not None]


def normalised(s: Sharder, x: Node, dims: Sequence[int], factors: Sequence[Factor], eps: float) -> Node:
    mean, variance = moments(s, x, dims, factors)
    scale = s.build(aten.rsqrt.default, s.build(aten.add.Tensor, variance, eps))
    return s.build(aten.mul.Tensor, s.build(aten.sub.Tensor, x, mean), scale)


def affine(s: Sharder, x: Node, weight: Node | None, bias: Node | None, shape: Sequence[int]) -> Node:
    """`x * weight + bias`, both reshaped to `shape`, in the dtype of `x`."""
    for target, parameter in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if parameter is not None:
            p = s.reshape(parameter, shape)
            if value(p).dtype != value(x).dtype:
                p = s.build(aten.to.dtype, p, value(x).dtype)
            x = s.build(target, x, p)
    return x


def _cast(s: Sharder, x: Node, dtype: torch.dtype) -> Node:
    return x if value(x).dtype == dtype else s.build(aten.to.dtype, x, dtype)


def weight_bias_eps(node: Node) -> tuple[Node | None, Node | None, float]:
    return argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)


@rule(aten.group_norm.default)
def group_norm(s: Sharder, node: Node) -> Node:
    x, groups = tensor(node), integer(node, 1, "num_groups")
    weight, bias, eps = weight_bias_eps(node)
    factors = split_factors(s, x, range(2, s[x].ndim))
    if s[x].splits(1):
        raise ComputeWhole("its channel dimension is split")
    if s.patch or not factors:
        return s.again(node, s[x])
    shape, dtype = list(value(x).shape), value(x).dtype
    grouped = s.reshape(_cast(s, x, wide(dtype)), [shape[0], groups, math.prod(shape[1:]) // groups])
    y = s.reshape(normalised(s, grouped, [2], factors, eps), shape)
    y = affine(s, y, weight, bias, [1, shape[1], *[1] * (len(shape) - 2)])
    return s.place(_cast(s, y, dtype), s[x])


@rule(aten.instance_norm.default)
def instance_norm(s: Sharder, node: Node) -> Node:
    x, weight, bias = tensor(node), argument(node, 1, "weight"), argument(node, 2, "bias")
    use_input, eps = argument(node, 5, "use_input_stats"), argument(node, 7, "eps")
    factors = split_factors(s, x, range(2, s[x].ndim))
    if s.patch or not factors or not use_input:
        return s.again(node, s[x])
    if s[x].splits(1):
        raise ComputeWhole("its channel dimension is split")
    y = normalised(s, _cast(s, x, wide(value(x).dtype)), range(2, s[x].ndim), factors, eps)
    y = affine(s, y, weight, bias, [1, s[x].shape[1], *[1] * (s[x].ndim - 2)])
    return s.place(_cast(s, y, value(x).dtype), s[x])


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm(s: Sharder, node: Node) -> Node:
    """In eval mode, which is pointwise. Of its three results only the first is of use there."""
    x = tensor(node)
    if s[x].splits(1):
        raise ComputeWhole("its channel dimension is split")
    if any(user.args[1] != 0 for user in node.users if user.users):
        raise ComputeWhole("its statistics are read")
    *parameters, momentum, eps = node.args[1:]
    y = s.emit(s[x], aten.batch_norm.default, x, *parameters, False, momentum, eps, False)
    for user in list(node.users):
        user.replace_all_uses_with(y)
        s.graph.erase_node(user)
    return y


@rule(aten.layer_norm.default)
def layer_norm(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    weight, bias, eps = weight_bias_eps(node)
    dims = range(s[x].ndim - len(integers(node, 1, "normalized_shape")), s[x].ndim)
    factors = split_factors(s, x, dims)
    if not factors or s.patch:
        if factors:
            raise ComputeWhole("it normalises over a split dimension")
        return s.again(node, s[x])
    y = normalised(s, _cast(s, x, wide(value(x).dtype)), dims, factors, eps)
    for target, parameter in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if parameter is not None:
            one = s.conform(parameter, Placement(s[x].dims[-s[parameter].ndim :]))
            y = s.build(target, y, _cast(s, one, value(y).dtype))
    return s.place(_cast(s, y, value(x).dtype), s[x])


@rule(aten.rms_norm.default)
def rms_norm(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    dims = range(s[x].ndim - len(integers(node, 1, "normalized_shape")), s[x].ndim)
    if split_factors(s, x, dims):
        raise ComputeWhole("it normalises over a split dimension")
    return s.again(node, s[x])


# --- reductions --------------------------------------------------------------------------------------------------------


def reduced(placement: Placement, dims: Sequence[int], keepdim: bool) -> Placement:
    if keepdim:
        return Placement(tuple((Factor(1),) if d in dims else f for d, f in enumerate(placement.dims)))
    return Placement(tuple(f for d, f in enumerate(placement.dims) if d not in dims))


def _dims(s: Sharder, x: Node, dims: Any) -> list[int]:
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(s[x].ndim))
    return [d % s[x].ndim for d in ((dims,) if isinstance(dims, int) else dims)]


@rule(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
def mean_or_sum(s: Sharder, node: Node) -> Node:
    x, mean = tensor(node), node.target in (aten.mean.dim, aten.mean.default)
    everything = node.target in (aten.mean.default, aten.sum.default)
    dims = _dims(s, x, None if everything else argument(node, 1, "dim"))
    keepdim = False if everything else bool(argument(node, 2, "keepdim", False))
    axes = [f.axis for f in split_factors(s, x, dims) if f.axis is not None]
    placement = reduced(s[x], dims, keepdim)
    if not axes or s.patch:
        return s.again(node, placement)
    dtype = value(node).dtype
    partial = s.build(aten.sum.dim_IntList, x, dims, keepdim, dtype=wide(dtype))
    result = total(s, partial, axes)
    if mean:
        result = s.build(aten.div.Tensor, result, math.prod(s[x].shape[d] for d in dims))
    return s.place(_cast(s, result, dtype), placement)


REDUCTIONS = {
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.prod.dim_int: 1,
    aten.logsumexp.default: 1,
    aten.var.dim: 1,
    aten.var.correction: 1,
    aten.std.correction: 1,
    aten.any.dim: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
}


@rule(*REDUCTIONS)
def reduction(s: Sharder, node: Node) -> Node:
    """Over dimensions that are first made whole where they are split."""
    x, at = tensor(node), REDUCTIONS[node.target]
    chosen = argument(node, at, "dim")
    dims = _dims(s, x, chosen)
    if not s.patch and split_factors(s, x, dims):
        if chosen is None:
            raise ComputeWhole("it reduces everything")
        x = s.whole(x, dims)
    keepdim = value(node).dim() == s[x].ndim
    return s.again(node, reduced(s[x], dims, keepdim), {tensor(node): x})


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten.cumsum.default)
def along_a_whole_dim(s: Sharder, node: Node) -> Node:
    x = tensor(node)
    whole = x if s.patch else s.whole(x, [integer(node, 1, "dim") % s[x].ndim])
    return s.again(node, s[whole], {x: whole})


# --- products ----------------------------------------------------------------------------------------------------------


@rule(aten.linear.default)
def linear(s: Sharder, node: Node) -> Node:
    x, weight = tensor(node), tensor(node, 1)
    last = s[x].ndim - 1
    row = x if s.patch else s.whole(x, [last])
    out = [Factor(value(node).shape[-1])] if value(weight).dim() > 1 else None
    placement = s[row].with_dim(last, out) if out else reduced(s[row], [last], False)
    return s.again(node, placement, {x: row})


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matrix_product(s: Sharder, node: Node) -> Node:
    a, b = tensor(node), tensor(node, 1)
    if s[a].ndim < 2 or s[b].ndim < 2:
        raise ComputeWhole("an operand is a vector")
    product, axes = _multiplied(s, node, a, b)
    if not axes:
        return product
    placement = s[product]
    return s.place(_cast(s, total(s, product, axes), value(node).dtype), placement)


@rule(aten.baddbmm.default, aten.addmm.default)
def product_plus(s: Sharder, node: Node) -> Node:
    """beta * input + alpha * (a @ b)"""
    added, a, b = tensor(node), tensor(node, 1), tensor(node, 2)
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product, axes = _multiplied(s, node, a, b)
    placement = s[product]
    result = total(s, product, axes) if axes else product
    if alpha != 1:
        result = s.build(aten.mul.Tensor, result, alpha)
    if beta != 0:  # then `input` may be uninitialised memory
        other = s.conform(added, placement)
        result = s.build(aten.add.Tensor, result, s.build(aten.mul.Tensor, other, beta))
    return s.place(_cast(s, result, value(node).dtype), placement)


def _multiplied(s: Sharder, node: Node, a: Node, b: Node) -> tuple[Node, list[int]]:
    """`a @ b` of what this rank holds, placed; and the mesh axes over which that is a partial sum."""
    batch_a, batch_b = Placement(s[a].dims[:-2]), Placement(s[b].dims[:-2])
    rank = max(batch_a.ndim, batch_b.ndim)
    dims: list[Any] = []
    for d in range(-rank, 0):
        mine = [p.dims[d] for p in (batch_a, batch_b) if p.ndim >= -d]
        dims.append(next((f for f in mine if any(g.axis is not None for g in f)), max(mine, key=lambda f: f[0].size)))
    batch = Placement(tuple(dims))
    used = set(batch.axes)

    # The summed dimension: both operands cut alike, by whichever is split.
    inner = s[a].dims[-1] if s[a].splits(s[a].ndim - 1) else s[b].dims[-2]
    axes = [f.axis for f in inner if f.axis is not None]
    if used & set(axes):
        inner, axes = (Factor(s[a].shape[-1]),), []
    used |= set(axes)
    rows, columns = s[a].dims[-2], s[b].dims[-1]
    if used & {f.axis for f in rows if f.axis is not None}:
        rows = (Factor(s[a].shape[-2]),)
    used |= {f.axis for f in rows if f.axis is not None}
    if used & {f.axis for f in columns if f.axis is not None}:
        columns = (Factor(s[b].shape[-1]),)
    a = s.conform(a, Placement((*batch.dims, rows, inner)))
    b = s.conform(b, Placement((*batch.dims, inner, columns)))
    if axes and value(a).dtype in HALF:  # partial sums are rounded once, at the end
        a, b = _cast(s, a, torch.float32), _cast(s, b, torch.float32)
    product = s.build(aten.matmul.default, a, b)
    return s.place(product, Placement((*batch.dims, rows, columns))), axes
