"""A graph as text that a person can read and diff: one node a line, its type, what it computes, the model's line.

conv3d      bf16[1, 96, 4, 480, 832]   = aten.conv3d(pad, decoder.conv_in.weight, bias, [1, 1, 1])  # vae.py:190: ...
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from pvae.passes.ir import source_line
from pvae.passes.verify import describe


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _argument(value: object) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value)


def _type(node: Node, strides: bool) -> str:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return (
            ""
            if val is None
            else "(" + ", ".join(map(describe, val)) + ")"
            if isinstance(val, (list, tuple))
            else "int"
        )
    text = describe(val)
    if strides:
        text += f" {val.device} {[str(s) for s in val.stride()]}"
    elif val.dim() in (4, 5):
        fmt = torch.channels_last if val.dim() == 4 else torch.channels_last_3d
        if (
            all(isinstance(s, int) for s in val.shape)
            and val.is_contiguous(memory_format=fmt)
            and not val.is_contiguous()
        ):
            text += " channels_last"
    return text


def line(node: Node, *, strides: bool = False, source: bool = True) -> str:
    """One node; `strides` adds device and strides, `source` the model's line."""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    left = f"{node.name:28s} {_type(node, strides):34s}"
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "get_attr":
        return f"{left} = constant {node.target}"
    args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    text = f"{left} = {_target(node)}({', '.join(args)})"
    where = source_line(node) if source else ""
    return f"{text}  # {where}" if where else text


def text(graph: Graph, *, strides: bool = False, source: bool = True) -> str:
    """The whole graph, one node a line."""
    return "\n".join(line(node, strides=strides, source=source) for node in graph.nodes) + "\n"
