"""What a modulation chain is made of, read from the graph: operands, gated residuals, views of rows, who depends on whom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.ir import CASTS, aten, is_tensor, known, value
from pvae.passes.norm_node import NormNode, before_widening

NARROW_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})  # what the ops compute with in float32
ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
RESHAPES = frozenset({aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints})
ROW_VIEWS = RESHAPES | {aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int}


@dataclass(frozen=True)
class Operand:
    """A scale, shift or gate: a node, and where it is a two-way select its second set and the index that chooses it."""

    whole: Node  # as the graph has it
    node: Node
    second: Node | None = None
    index: Node | None = None  # not 0 (or true) takes the second

    @classmethod
    def of(cls, whole: Node) -> Operand:
        node = before_casts(whole)
        plain = cls(node, node)
        if node.target is not aten.where.self or not all(map(is_tensor, node.args)):
            return plain
        condition, first, second = node.args
        assert isinstance(condition, Node) and isinstance(first, Node) and isinstance(second, Node)
        shape = value(condition).shape
        if len(shape) != value(node).dim() or len(shape) < 2 or not known(shape[-1] == 1):
            return plain
        if not (fits(first, node) and fits(second, node)):
            return plain
        index, zero_takes_first = _index(condition)
        return cls(node, first, second, index) if zero_takes_first else cls(node, second, first, index)

    def chosen_by(self, index: Node | None, rows: Node) -> Operand:
        """As it is if it is not chosen at all, or by `index` with one number a row of `rows`; else its value in full."""
        if self.index is None:
            return self
        ranks = (value(rows).dim() - 1, value(rows).dim())
        fit = self.index is index and value(self.index).dim() in ranks and value(self.whole).dim() == ranks[1]
        return self if fit else Operand(self.whole, self.whole)

    def nodes(self) -> list[Node]:
        return [n for n in (self.node, self.second, self.index) if n is not None]


@dataclass(frozen=True)
class Residual:
    """h = residual + gate * x; `node` is the value of h that is replaced."""

    node: Node
    residual: Node
    x: Node
    gate: Operand | None
    view: Node | None = None  # the reshape behind gate * x, to be done to x instead

    @property
    def rows(self) -> Node:
        """A node of the size of x as the op gets it."""
        return self.view or self.x


@dataclass(frozen=True)
class Chain:
    """One way from a norm to `end`, with the row views on it, to be repeated on the norm's input."""

    norm: NormNode
    end: Node
    views: tuple[Node, ...] = ()
    weight: Node | None = None
    bias: Node | None = None
    scale: Operand | None = None
    constant: float = 0.0  # k of k + scale
    shift: Operand | None = None

    def operands(self) -> list[Operand]:
        return [o for o in (self.scale, self.shift) if o is not None]

    def inputs(self) -> list[Node]:
        """The nodes that the op takes besides x."""
        affine = [n for n in (self.weight, self.bias) if n is not None]
        return affine + [n for o in self.operands() for n in o.nodes()]

    def index(self) -> Node | None:
        return next((o.index for o in self.operands() if o.index is not None), None)

    def note(self) -> str:
        parts = [{"layer": "layer norm", "rms": "RMS norm"}[self.norm.kind]]
        parts += [name for name in ("weight", "bias", "scale", "shift") if getattr(self, name) is not None]
        parts += ["two sets by index"] if any(o.second is not None for o in self.operands()) else []
        return ", ".join(parts)


def before_casts(node: Node) -> Node:
    """What `node` was before casts between the floating-point types that the ops compute with in float32."""
    while is_cast(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def is_cast(node: Node) -> bool:
    if node.target not in CASTS or not isinstance(node.args[0], Node) or not is_tensor(node.args[0]):
        return False
    source = value(node.args[0])
    if source.device != value(node).device:
        return False
    return source.dtype == value(node).dtype or not ({source.dtype, value(node).dtype} - NARROW_FLOATS)


def _index(condition: Node) -> tuple[Node, bool]:
    """The index [*, 1] or [*] behind a condition [*, 1] of `where`, and whether where() takes its first value for 0."""
    node, zero_takes_first = _without_last(condition), False
    if node.target in (aten.eq.Scalar, aten.ne.Scalar) and node.args[1] == 0 and isinstance(node.args[0], Node):
        zero_takes_first = node.target is aten.eq.Scalar
        node = _without_last(node.args[0])
    return node, zero_takes_first


def _without_last(node: Node) -> Node:
    """`x` of `x.unsqueeze(-1)`."""
    source = node.args[0] if node.args else None
    if node.target is aten.unsqueeze.default and isinstance(source, Node) and node.args[1] in (-1, value(source).dim()):
        return source
    return node


def numbers(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that `node` adds or multiplies, None where it does neither or scales one on the way."""
    if node.target not in (aten.add.Tensor, aten.mul.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    if not isinstance(first, Node) or not isinstance(second, Node) or not (is_tensor(first) and is_tensor(second)):
        return None
    return first, second


def same_sizes(a: Node, b: Node) -> bool:
    x, y = value(a).shape, value(b).shape
    return len(x) == len(y) and all(known(p == q) for p, q in zip(x, y, strict=True))


def narrow(node: Node, than: Node) -> bool:
    """Whether `node` has one value for several rows of `than`: some leading dimension is broadcast."""
    x, y = list(value(node).shape[:-1]), list(value(than).shape[:-1])
    if len(x) >= len(y):
        return len(x) == len(y) and any(known(p == 1) and not known(q == 1) for p, q in zip(x, y, strict=True))
    return True


def fits(operand: Node, rows: Node) -> bool:
    """Whether the operand has a value for each channel of `rows` (or is their size in full)."""
    shape, of = value(operand).shape, value(rows).shape
    return 0 < len(shape) <= len(of) and known(shape[-1] == of[-1])


def keeps_channels(view: Node) -> bool:
    """Whether a view moves whole rows: the last dimension stays what and where it was."""
    source = view.args[0]
    if not isinstance(source, Node) or not known(value(source).shape[-1] == value(view).shape[-1]):
        return False
    last = value(source).dim() - 1
    if view.target is aten.permute.default:
        return list(view.args[1])[-1] in (last, -1)
    if view.target in (aten.slice.Tensor, aten.select.int, aten.transpose.int):
        dims = view.args[1:3] if view.target is aten.transpose.int else view.args[1:2]
        return all(isinstance(d, int) and d % (last + 1) != last for d in dims)
    if view.target is aten.reshape.default:
        return value(view).dim() > 1
    return view.target is aten.flatten.using_ints or view.args[1] not in (-1, value(view).dim() - 1)


def constant_plus(node: Node) -> tuple[float, Node]:
    """(k, s) of `k + s`, seen through casts; (0, node) for anything else."""
    node = before_casts(node)
    if node.target in ADDS and node.kwargs.get("alpha", 1) == 1:
        first, second = node.args[:2]
        if isinstance(first, (int, float)):
            first, second = second, first
        if isinstance(first, Node) and isinstance(second, (int, float)):
            return float(second), first
    return 0.0, node


def with_cast(end: Node) -> Node:
    """The cast that is the only user of `end`, else `end`."""
    users = list(end.users)
    return with_cast(users[0]) if len(users) == 1 and is_cast(users[0]) else end


def residual_of(x: Node) -> Residual | None:
    """x as residual + gate * y or residual + y, both of the size of x; None if it is neither."""
    casts = [x]
    while is_cast(casts[-1]):
        casts.append(casts[-1].args[0])
    total = casts.pop()
    node = total
    while len(node.users) == 1 and casts:  # the sum is seen by this cast only
        node = casts.pop()
    found = gated_sum(total)
    if found is None:
        pair = numbers(total) if total.target is aten.add.Tensor else None
        if pair is None or not all(same_sizes(n, total) for n in pair):
            return None
        return Residual(node, before_widening(pair[0]), before_widening(pair[1]), None)
    return replace(found, node=node)


def gated_sum(node: Node) -> Residual | None:
    """`node` as residual + gate * x, the gate broadcast over rows, chosen by an index or cut out of a modulation tensor."""
    candidates: list[tuple[Any, Any, Any, Node | None]] = []
    if node.target is aten.addcmul.default and node.kwargs.get("value", 1) == 1:
        candidates.append((*node.args[:3], None))
    elif node.target is aten.add.Tensor and (pair := numbers(node)):
        for residual, product in (pair, pair[::-1]):
            product, view = before_casts(product), None
            if product.target in RESHAPES and len(product.users) == 1 and keeps_channels(product):
                view, product = product, before_casts(product.args[0])
            if product.target is aten.mul.Tensor and len(product.users) == 1 and numbers(product):
                candidates.append((residual, *product.args[:2], view))
    for residual, first, second, view in candidates:
        for gate, x in ((first, second), (second, first)):
            if not all(isinstance(n, Node) for n in (residual, gate, x)):
                continue
            if not (same_sizes(residual, node) and same_sizes(view or x, node) and fits(gate, x)):
                continue
            operand = Operand.of(gate)
            if view is not None:
                if not _is_per_frame(operand, x, view):
                    continue
            elif not (
                operand.second or narrow(gate, x) or (same_sizes(gate, x) and is_piece(gate) and not is_piece(x))
            ):
                continue
            return Residual(node, before_widening(residual), before_widening(x), operand, view)
    return None


def _is_per_frame(gate: Operand, x: Node, rows: Node) -> bool:
    """Whether a gate [B, F, 1, C] on x [B, F, N, C] can be one on `rows` [B, F * N, C]."""
    if gate.second is not None or value(gate.node).dim() != 4 or value(x).dim() != 4 or value(rows).dim() != 3:
        return False
    (batch, frames, one, _), (batches, extent, *_) = value(gate.node).shape, value(x).shape
    return (
        known(batch == batches) and known(frames == extent) and known(one == 1) and known(value(rows).shape[0] == batch)
    )


def is_piece(node: Node) -> bool:
    """Whether `node` is cut out of another tensor, as a gate is out of a modulation tensor."""
    while True:
        node = before_casts(node)
        if node.target in (aten.slice.Tensor, aten.select.int):
            return True
        if node.target not in RESHAPES or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
