"""The verifier: what must hold of a graph after every pass.

    lint                FX's own: users, order, names
    meta                every node run again on its arguments' fakes gives the recorded shape, dtype and device
    outputs             as many, of the shapes, dtypes and devices that went in
    writes              nothing is written in place except graph inputs, by the copies that end the graph
Strides are derived, not promised: the verifier writes the derived ones into the meta (layout passes change them), and
`output_layout.py` gives the caller what eager would have returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.passes.ir import aten, derive, known, output_node, value
from pvae.runtime.torch_compat import free_unbacked_symbols


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

    def with_pieces(self, graph: Graph, indexes: Iterable[int]) -> Signature:
        """With the outputs `indexes` as they now are: sharding left them as this rank's pieces."""
        now = Signature.of(graph).outputs
        pieces = set(indexes)
        return Signature(tuple(now[i] if i in pieces else old for i, old in enumerate(self.outputs)))


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
    # Sizes that only values decide get a new symbol at every derivation, and are equal to nothing.
    val = value(node)
    return not unbacked and not (isinstance(val, torch.Tensor) and free_unbacked_symbols(val))


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
