"""The last step of every pipeline: outputs in the memory that eager would have given them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from pvae.kernels.compact import OP as COMPACT
from pvae.passes.channels_last import works_channels_last
from pvae.passes.ir import VIEW_OPS, Builder, aten, known, output_node, value
from pvae.passes.rule import Context
from pvae.passes.verify import Signature


def lay_out_outputs(gm: GraphModule, signature: Signature, context: Context) -> int:
    """Give outputs the memory that eager gives them; returns how many were re-laid.

    The caller's outputs get eager's order of dimensions (one that was a view with gaps comes back dense). Outputs in
    `free_strides`, which only compiled code reads again, are channels_last if this graph works so and contiguous if not:
    one rule for every graph of a model, so that a cache looks the same to the next call whichever graph wrote it.
    `returned_caches` are channels_last if they are computed so (to turn them costs more than to copy them: 26 of 150 ms of
    a CogVideoX decode), and else as eager's.
    An output that eager copies out of a larger tensor is copied here too.
    """
    out = output_node(gm.graph)
    leaves, spec = torch.utils._pytree.tree_flatten(out.args)
    inner = works_channels_last(gm.graph)
    changed = 0
    for index, (node, promised) in enumerate(zip(leaves, signature.outputs, strict=True)):
        if not isinstance(node, Node) or not isinstance(promised, torch.Tensor) or node.op == "placeholder":
            continue
        turned = inner and promised.dim() in (4, 5)
        if index in context.free_strides or (index in context.returned_caches and turned and _innermost(value(node))):
            order = list(range(promised.dim()))
            if turned:
                order = [0, *order[2:], 1]
            wanted = _dense_strides(promised.shape, order)
        else:
            wanted = promised.stride()
            order = dimension_order(wanted) if _are_numbers(wanted) else list(range(promised.dim()))
        source = node
        while source.target is aten.clone.default:
            source = source.args[0]
        copied_out = source is not node and source.target in VIEW_OPS
        if not copied_out and same_strides(value(node), wanted):
            continue
        # Right after what it copies: at the end of the graph it would keep every activation alive until then.
        build = Builder(source.next if source.op != "placeholder" else node.next)
        leaves[index] = build(COMPACT, source, order)
        changed += 1
    if changed:
        out.args = torch.utils._pytree.tree_unflatten(leaves, spec)
        gm.graph.eliminate_dead_code()
    return changed


def _innermost(tensor: torch.Tensor) -> bool:
    return known(tensor.stride(1) == 1) and not known(tensor.shape[1] == 1)


def dimension_order(strides: Any) -> list[int]:
    """The dimensions, outermost in memory first. Compares the strides, which are guards where they are symbols."""
    return sorted(range(len(strides)), key=lambda d: strides[d], reverse=True)


def _are_numbers(strides: Any) -> bool:
    return all(isinstance(s, int) for s in strides)


def _dense_strides(shape: Any, order: list[int]) -> list[Any]:
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return strides


def same_strides(tensor: torch.Tensor, strides: Any) -> bool:
    """Whether `tensor` has those strides, where they mean anything: in dimensions of more than one element."""
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(known(size == 1) or known(now == then) for size, now, then in triples)


def in_strides(tensor: torch.Tensor, strides: Any) -> torch.Tensor:
    """`tensor` itself if it has those strides, where they mean anything, or they are symbols; else a copy that has them."""
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if not _are_numbers(strides) or all(size == 1 or now == then for size, now, then in triples):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
