"""The verifier: what must hold of a graph after every pass.

    lint                FX's own: users, order, names
    meta                every node run again on its arguments' fakes gives the recorded shape, dtype and device
    outputs             as many, of the shapes, dtypes and devices that went in
    writes              nothing is written in place except graph inputs, by the copies that end the graph
Strides are derived, not promised: the verifier writes the derived ones into the meta (layout passes change them), and
`lay_out_outputs` gives the caller what eager would have returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pvae.passes.ir import Builder, aten, derive, known, output_node, value
from pvae.passes.rule import Context


class VerifyError(AssertionError):
    """A pass left the graph wrong; the message names the pass and the node."""


@dataclass(frozen=True)
class Signature:
    """What the caller of a graph relies on: a fake tensor, number or None for each output."""

    outputs: tuple[Any, ...]

    @classmethod
    def of(cls, graph: Graph) -> Signature:
        outputs = torch.utils._pytree.tree_leaves(output_node(graph).args)
        return cls(tuple(value(o) if isinstance(o, Node) else o for o in outputs))


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    sizes = a.dim() == b.dim() and all(known(p == q) for p, q in zip(a.shape, b.shape, strict=True))
    return sizes and a.dtype == b.dtype and a.device == b.device


def _differs(recorded: Any, derived: Any) -> str:
    """In words, how what a node computes differs from its meta; empty if it does not."""
    if isinstance(recorded, torch.Tensor):
        if not isinstance(derived, torch.Tensor) or not _same_tensor(recorded, derived):
            return f"recorded {describe(recorded)}, computes {describe(derived)}"
    elif isinstance(recorded, (list, tuple)):
        if len(recorded) != len(derived):
            return f"recorded {len(recorded)} results, computes {len(derived)}"
        return next((d for d in map(_differs, recorded, derived) if d), "")
    return ""


def describe(val: Any) -> str:
    """`f32[1, 8, s0, 16]` for a tensor, its text for anything else."""
    if not isinstance(val, torch.Tensor):
        return str(val)
    kind = str(val.dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        kind = kind.replace(long, short)
    return f"{kind}[{', '.join(str(s) for s in val.shape)}]"


def _derivable(node: Node) -> bool:
    if node.op != "call_function" or "val" not in node.meta or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    target = node.target
    unbacked = isinstance(target, torch._ops.OpOverload) and bool(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(target.tags)
    )
    return not unbacked


def verify(graph: Graph, signature: Signature, after: str) -> None:
    """Raise VerifyError unless `graph` is well formed and still returns `signature`; refresh the strides in its meta."""
    graph.lint()
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            mutable = node.target._schema.is_mutable
            is_write_back = node.target is aten.copy_.default and getattr(node.args[0], "op", "") == "placeholder"
            if mutable and not is_write_back:
                raise VerifyError(f"after pass {after!r}: {node.format_node()} writes in place")
        if not _derivable(node):
            continue
        try:
            derived = derive(node)
        except Exception as error:
            raise VerifyError(f"after pass {after!r}: {node.format_node()} cannot be computed: {error}") from error
        difference = _differs(value(node), derived)
        if difference:
            raise VerifyError(f"after pass {after!r}: {node.format_node()}: {difference}")
        node.meta["val"] = derived
    now = Signature.of(graph)
    if len(now.outputs) != len(signature.outputs):
        raise VerifyError(f"after pass {after!r}: {len(now.outputs)} outputs, {len(signature.outputs)} before")
    for index, (old, new) in enumerate(zip(signature.outputs, now.outputs, strict=True)):
        if isinstance(old, torch.Tensor) and not (isinstance(new, torch.Tensor) and _same_tensor(old, new)):
            raise VerifyError(f"after pass {after!r}: output {index} was {describe(old)}, is {describe(new)}")


def lay_out_outputs(gm: GraphModule, signature: Signature, context: Context) -> int:
    """Give each output whose strides a pass changed its layout back; returns how many were re-laid.

    The caller's outputs get eager's order of dimensions (one that was a view with gaps comes back dense). Outputs in
    `free_strides`, which only compiled code reads again, are channels_last if this graph works so and contiguous if not:
    one rule for every graph of a model, so that a cache looks the same to the next call whichever graph wrote it.
    """
    out = output_node(gm.graph)
    leaves, spec = torch.utils._pytree.tree_flatten(out.args)
    inner = any(n.target is torch.ops.pvae.channels_last.default for n in gm.graph.nodes)
    changed = 0
    for index, (node, promised) in enumerate(zip(leaves, signature.outputs, strict=True)):
        if not isinstance(node, Node) or not isinstance(promised, torch.Tensor) or node.op == "placeholder":
            continue
        if index not in context.free_strides:
            order = _dimension_order(promised.stride())
            if _same_strides(value(node), promised.stride()):
                continue
        else:
            order = list(range(promised.dim()))
            if inner and promised.dim() in (4, 5):
                order = [0, *order[2:], 1]
            if _same_strides(value(node), _dense_strides(promised.shape, order)):
                continue
        build = Builder(out)
        y = build(aten.permute.default, node, order)
        y = build(aten.clone.default, y, memory_format=torch.contiguous_format)
        leaves[index] = build(aten.permute.default, y, [order.index(d) for d in range(len(order))])
        changed += 1
    if changed:
        out.args = torch.utils._pytree.tree_unflatten(leaves, spec)
    return changed


def _dimension_order(strides: Any) -> list[int]:
    if not all(isinstance(s, int) for s in strides):
        return list(range(len(strides)))
    return sorted(range(len(strides)), key=lambda d: strides[d], reverse=True)


def _dense_strides(shape: Any, order: list[int]) -> list[Any]:
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return strides


def _same_strides(tensor: torch.Tensor, strides: Any) -> bool:
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(known(size == 1) or known(now == then) for size, now, then in triples)
