"""The one IR: a functional FX graph of ATen ops before decomposition, every value with its fake tensor in `meta["val"]`.

This file holds what passes read and write nodes with: values and sizes, a builder that derives the meta of what it adds,
and typed views (`ConvNode`, `PadNode`), so that no pass unpacks positional arguments by hand.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.runtime.exchange import exchange, exchanged_like
from pvae.runtime.fetch import fetch, fetched_like
from pvae.runtime.torch_compat import FakeTensor, FakeTensorMode, enable_python_dispatcher, statically_known_true

aten = torch.ops.aten
_FRAME = re.compile(r'^ *File "(.*)", line (\d+).*\n *(.*)$', re.MULTILINE)
_TORCH = torch.__path__[0]

# Ops whose result shares memory with their first argument.
VIEW_OPS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.reshape.default,
        aten.unfold.default,
        operator.getitem,
    }
)


def value(node: Node) -> Any:
    """The fake tensor, SymInt or plain value that `node` stands for."""
    return node.meta["val"]


def only_user(node: Node) -> Node | None:
    """The one node that reads `node`, or None if there are more, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    return None


def output_node(graph: Graph) -> Node:
    return next(iter(reversed(graph.nodes)))


def placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def source_line(node: Node) -> str:
    """`file.py:123: code` of the model's line that made `node`, or an empty string.

    That is the innermost line outside torch, not counting the `super().forward(x)` of a layer derived from torch's.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH) and not f[2].startswith("return super().forward(")]
    for path, number, code in reversed(own or frames):
        return f"{path.rsplit('/', 1)[-1]}:{number}: {code}"
    return ""


CATS = frozenset({aten.cat.default, aten.concat.default, aten.concatenate.default})
# Ops that change the dtype (or device) of their first argument and nothing else.
CASTS = frozenset(
    {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default}
)

# Ops that hand back their first argument itself where nothing has to be done.
MAYBE_NO_OPS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
        aten.contiguous.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
    }
)


def _may_alias(node: Node) -> bool:
    """Whether the result of `node` may share memory with its first argument."""
    return node.target in VIEW_OPS or node.target in MAYBE_NO_OPS or getattr(node.target, "is_view", False)


def reaches_output(node: Node) -> bool:
    """Whether the memory of `node` may be what the graph returns: an output is it, or a view of it."""
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if _may_alias(user) and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def derive(node: Node) -> Any:
    """Run `node` on its arguments' fake values: what its meta must be."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    fakes = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), FakeTensor)]
    mode = fakes[0].fake_mode if fakes else fake_mode_of(node.graph)
    assert callable(node.target)
    if node.target is fetch:
        return fetched_like(*args, **kwargs)
    if node.target is exchange:
        return exchanged_like(*args, **kwargs)
    with torch.no_grad():
        if mode is None:
            return node.target(*args, **kwargs)
        # The C++ fakes of some ops (`pad` is one) fix symbolic sizes to today's; the Python ones do not.
        symbolic = any(f._has_symbolic_sizes_strides for f in fakes)
        with mode, enable_python_dispatcher() if symbolic else nullcontext():
            return node.target(*args, **kwargs)


class Builder:
    """Adds nodes before `anchor`; each inherits the anchor's source line and gets its meta derived at once.

    Calling it returns the new Node, or a plain number where the result is one (sizes that are static fold away).
    """

    def __init__(self, anchor: Node) -> None:
        self.anchor = anchor
        self.graph = anchor.graph
        self.inherited = {k: v for k, v in anchor.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self.inherited, "val": derive(node)}
        if isinstance(node.meta["val"], (int, float, bool)):
            self.graph.erase_node(node)
            return node.meta["val"]
        return node

    def size(self, x: Node, dim: int) -> Any:
        """The size of dimension `dim`: an int where it is static, else a node."""
        size = value(x).shape[dim]
        return size if isinstance(size, int) else self(aten.sym_size.int, x, dim)

    def product(self, *factors: Any) -> Any:
        result = factors[0]
        for factor in factors[1:]:
            if isinstance(result, int) and isinstance(factor, int):
                result *= factor
            else:
                result = self(operator.mul, result, factor)
        return result

    def replace(self, new: Node) -> None:
        """Give every user of the anchor `new` instead, and remove the anchor."""
        self.anchor.replace_all_uses_with(new)
        self.graph.erase_node(self.anchor)


def static(value_: Any) -> int | None:
    """A size as an int, or None where it is symbolic."""
    return value_ if isinstance(value_, int) else None


def known(condition: Any) -> bool:
    """Whether `condition` on sizes holds for every size that may come; adds no guard."""
    return statically_known_true(condition)


def repropagate(nodes: Iterator[Node] | Sequence[Node]) -> None:
    """Re-derive the meta of `nodes`, in order, after something upstream changed its strides."""
    for node in nodes:
        if node.op == "call_function" and "val" in node.meta:
            node.meta["val"] = derive(node)


def per_dim(values: Any, ndim: int) -> tuple[int, ...]:
    """One number a dimension, as torch's windowed ops take them: a single one is meant for all."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * ndim if len(values) == 1 else values


CONVS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}


@dataclass(frozen=True)
class ConvNode:
    """A convolution as written: x `[N, C, *spatial]`, weight `[O, C/groups, *kernel]`; one (front, back) pad a dim."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: object) -> ConvNode | None:
        if not isinstance(node, Node) or node.op != "call_function" or node.target not in CONVS:
            return None
        ndim = CONVS[node.target]
        defaults: list[Any] = [None, None, None, 1, 0, 1, 1]
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = list(node.args) + defaults[len(node.args) :]
        given = [node.kwargs.get(name, arg) for name, arg in zip(names, given, strict=True)]
        x, weight, bias, stride, padding, dilation, groups = given
        dilation = per_dim(dilation, ndim)
        kernel = value(weight).shape[2:]
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        else:
            pads = tuple((p, p) for p in per_dim(padding, ndim))
        return cls(node, x, weight, bias, per_dim(stride, ndim), pads, dilation, groups)

    @property
    def ndim(self) -> int:
        return len(self.stride)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(value(self.weight).shape[2:])

    @property
    def in_channels(self) -> int:
        return value(self.weight).shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return value(self.weight).shape[0]

    @property
    def batched(self) -> bool:
        return value(self.x).dim() == self.ndim + 2

    def out_size(self, dim: int, size: Any) -> Any:
        """Output size along spatial dimension `dim` for an input of `size`: the one shape formula of convolution."""
        front, back = self.padding[dim]
        return (size + front + back - self.dilation[dim] * (self.kernel[dim] - 1) - 1) // self.stride[dim] + 1

    @property
    def flops(self) -> int | None:
        """Multiply-adds times two as written, or None where a size is symbolic."""
        sizes = [static(s) for s in value(self.node).shape]
        if any(s is None for s in sizes):
            return None
        weight = value(self.weight)
        return 2 * math.prod(s for s in sizes if s is not None) * math.prod(weight.shape[1:])


@dataclass(frozen=True)
class PadNode:
    """`pad(x, ...)`: (front, back) per dimension, counted from the last dimension backwards."""

    node: Node
    x: Node
    pads: tuple[tuple[int, int], ...]
    mode: str
    fill: float

    @classmethod
    def of(cls, node: object) -> PadNode | None:
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        if node.target is aten.pad.default:
            args = [*node.args, "constant", None][:4] if len(node.args) == 2 else [*node.args, None][:4]
            x, widths = args[0], args[1]
            mode, fill = node.kwargs.get("mode", args[2]), node.kwargs.get("value", args[3])
        elif node.target is aten.constant_pad_nd.default:
            x, widths = node.args[0], node.args[1]
            mode, fill = "constant", node.args[2] if len(node.args) > 2 else 0
        else:
            return None
        if any(not isinstance(w, int) for w in widths):
            return None
        pairs = tuple((widths[i], widths[i + 1]) for i in range(0, len(widths), 2))
        return cls(node, x, pairs, mode, 0.0 if fill is None else float(fill))

    def along(self, dim: int) -> tuple[int, int]:
        """(front, back) of the `dim`-th dimension counted from the last (0 is the last)."""
        return self.pads[dim] if dim < len(self.pads) else (0, 0)
