"""Norm + scale + shift chains, with the gated residual before them, become one op each: one pass over memory, not six.

    y = (norm(h) * weight + bias) * (k + scale) + shift          h = residual + gate * x

Chains are read by meaning. From a norm the rule walks along its users, through casts, as long as it meets multiplications
and additions with tensors that do not depend on the norm; the values met are weight, bias, scale and shift, in this order.
Row-wise views between norm and scale (a reshape that keeps the channels, a slice of the tokens) are moved before the norm.
An operand that is a `where` over one index (two-way select) is passed as both its sets. From the norm's input the rule
looks back for residual + gate * x.

What is a chain: some operand depends on an input of the graph that is not a weight. A norm with its own affine weights
alone, a rotary embedding behind a query norm, a post-norm residual are not.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import layer_norm_modulate as _layer
from pvae.kernels import residual_gate as _gate
from pvae.kernels import residual_gate_layer_norm_modulate as _residual_layer
from pvae.kernels import residual_gate_rms_norm_modulate as _residual_rms
from pvae.kernels import rms_norm_modulate as _rms
from pvae.kernels.norm_layout import MODULATION, Operands, shape_error
from pvae.passes.ir import CASTS, Builder, aten, is_tensor, known, static, value
from pvae.passes.norm_node import NormNode, before_widening
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

NORMS = {
    "layer": (_layer, torch.ops.pvae.layer_norm_modulate.default),
    "rms": (_rms, torch.ops.pvae.rms_norm_modulate.default),
}
RESIDUAL_NORMS = {
    "layer": (_residual_layer, torch.ops.pvae.residual_gate_layer_norm_modulate.default),
    "rms": (_residual_rms, torch.ops.pvae.residual_gate_rms_norm_modulate.default),
}
RESIDUAL_GATE = torch.ops.pvae.residual_gate.default
GATHERS = frozenset({aten.cat.default, aten.index_select.default, aten.index.Tensor})
NARROW_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})  # what the ops compute with in float32
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm too
POINTWISE = "Inductor writes a pointwise chain in one pass too (modulation=on forces)"
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
    while _is_cast(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _is_cast(node: Node) -> bool:
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


class Ancestry:
    """Which nodes depend on what. Answers about weights are kept: rewrites do not change them."""

    def __init__(self, weights: frozenset[str]) -> None:
        self.weights = weights
        self.known: dict[Node, bool] = {}

    def from_input(self, node: Node) -> bool:
        """Whether `node` depends on an input of the graph that is not a weight."""
        todo = [node]
        while todo:
            at = todo[-1]
            if at in self.known:
                todo.pop()
                continue
            if at.op == "placeholder":
                self.known[at] = at.name not in self.weights
                continue
            missing = [n for n in at.all_input_nodes if n not in self.known]
            if missing:
                todo += missing
            else:
                self.known[at] = any(self.known[n] for n in at.all_input_nodes)
        return self.known[node]

    @staticmethod
    def cone(nodes: list[Node], after: Node) -> list[Node]:
        """`nodes` and all that they are made of, as far as it stands at or behind `after`, in graph order."""
        found: set[Node] = set()
        todo = [n for n in nodes if not n < after]
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo += [n for n in at.all_input_nodes if not n < after]
        return sorted(found)

    def depends(self, node: Node, on: Node) -> bool:
        return on in self.cone([node], on)


class FuseNorm:
    """norm (* weight + bias) * (k + scale) + shift, after residual + gate * x or not -> one op."""

    name = "norm_modulate"

    def __init__(self, context: Context) -> None:
        self.auto = context.options.modulation == "auto"
        self.ancestry = Ancestry(context.weights)

    def match(self, node: Node) -> Match | Refusal | None:
        norm = NormNode.of(node)
        if norm is None:
            return None
        if isinstance(norm, str):
            return Refusal(node, norm) if any(self._scaled(user) for user in node.users) else None
        found = [self._walk(norm, user) for user in self._uses(norm.node)]
        chains = [f for f in found if isinstance(f, Chain)]
        reasons = [f for f in found if isinstance(f, str)]
        if reasons:
            return Refusal(node, reasons[0])
        residual = residual_of(norm.x)
        if not chains:
            if residual is None or residual.gate is None or not self.ancestry.from_input(residual.gate.whole):
                return None
            chains = [self._affine(norm)]
        elif len(chains) < len(found):
            if not any(c.constant or c.shift is not None for c in chains):
                return None  # a rotary embedding multiplies one use of a norm by a cosine
            return Refusal(node, "the norm's result is also used otherwise, so it is written anyway")
        if residual is not None and residual.gate is not None:
            gate = residual.gate.chosen_by(chains[0].index() or residual.gate.index, residual.node)
            residual = replace(residual, gate=gate)
        if residual is not None and (
            chains[0].views or residual.node in Ancestry.cone(chains[0].inputs(), residual.node)
        ):
            residual = None
        if residual is None and not chains[0].operands():
            return Refusal(node, "the norm's weight is made from the gated sum before it")
        for chain in chains:
            before = residual if chain is chains[0] else None
            rows = chain.views[-1] if chain.views else norm.x if before is None else before.rows
            operands = _operands(rows, before, chain)
            reason = _misfit(operands)
            if reason is None and self.auto:
                module = (NORMS if before is None else RESIDUAL_NORMS)[norm.kind][0]
                h = () if before is None else (value(before.node).dtype,)
                reason = _against(module, operands, (*(h or (None,)), value(chain.end).dtype))
            if reason is not None:
                return Refusal(node, reason)
        note = "; ".join(chain.note() for chain in chains)
        if residual is not None:
            note = ("residual + gate * x, " if residual.gate is not None else "residual + x, ") + note
        return Match(node, (chains, residual), note)

    def rewrite(self, graph: Graph, match: Match) -> None:
        chains, residual = match.facts
        if residual is not None:
            chain = chains[0]
            for operand in Ancestry.cone(chain.inputs(), residual.node):
                residual.node.prepend(operand)
            build = Builder(residual.node)
            pair = _residual_norm(build, chain, residual)
            h, y = build(operator.getitem, pair, 0), build(operator.getitem, pair, 1)
            chain.end.replace_all_uses_with(y)
            residual.node.replace_all_uses_with(h)
            chains = [replace(c, norm=replace(c.norm, x=h)) for c in chains[1:]]
        for chain in chains:
            build = Builder(chain.end)
            build.replace(_norm(build, chain))

    def _uses(self, node: Node) -> list[Node]:
        """The users of a value, seen through casts."""
        found: list[Node] = []
        for user in node.users:
            found += self._uses(user) if _is_cast(user) else [user]
        return found

    def _scaled(self, user: Node) -> bool:
        """Whether `user` multiplies by something that is no weight."""
        pair = numbers(user) if user.target is aten.mul.Tensor else None
        return pair is not None and any(self.ancestry.from_input(n) and narrow(n, user) for n in pair)

    def _walk(self, norm: NormNode, user: Node) -> Chain | str | None:
        """The chain that begins with `user`; a reason where it is nearly one; None where it is none."""
        views: list[Node] = []
        at = norm.node
        while user.target in ROW_VIEWS and _keeps_channels(user):
            views.append(user)
            uses = self._uses(user)
            if len(uses) != 1:
                return self._between(user, uses)
            at, user = user, uses[0]
        chain = Chain(norm, at, tuple(views), norm.weight, norm.bias)
        steps = self._steps(norm, at, user)
        if not steps:
            return self._between(user, self._uses(user)) if user.op == "call_function" else None
        return self._read(chain, steps)

    def _between(self, user: Node, uses: list[Node]) -> str | None:
        """A reason, if the rows of a norm are moved by `user` before they are scaled."""
        moves = user.target in GATHERS or (user.target in ROW_VIEWS and _keeps_channels(user))
        if moves and uses and all(self._scaled(u) for u in uses):  # not a rotary embedding: x * cos + rotated(x) * sin
            return f"{user.target} stands between the norm and its scale"
        return None

    def _steps(self, norm: NormNode, at: Node, user: Node) -> list[tuple[str, Node, Node]]:
        """(mul or add, the other operand, the node) along single uses from `at`, as long as the rows stay the same."""
        steps: list[tuple[str, Node, Node]] = []
        previous = at
        while True:
            found = self._step(at, previous, user)
            if found is None:
                return steps
            for kind, other in found:
                if not fits(other, at) or not same_sizes(user, at) or self.ancestry.depends(other, norm.node):
                    return steps
                steps.append((kind, other, user))
            uses = self._uses(user)
            if len(uses) != 1:
                return steps
            previous, user = user, uses[0]

    @staticmethod
    def _step(at: Node, previous: Node, user: Node) -> list[tuple[str, Node]] | None:
        if user.target is aten.addcmul.default and user.kwargs.get("value", 1) == 1:
            added, first, second = user.args[:3]
            for x, other in ((first, second), (second, first)):
                if isinstance(x, Node) and before_casts(x) is before_casts(previous):
                    assert isinstance(other, Node) and isinstance(added, Node)
                    return [("mul", other), ("add", added)]
            return None
        pair = numbers(user)
        if pair is None:
            return None
        kind = "mul" if user.target is aten.mul.Tensor else "add"
        mine = [before_casts(n) is before_casts(previous) for n in pair]
        if mine[0] == mine[1]:
            return None
        return [(kind, pair[1] if mine[0] else pair[0])]

    def _read(self, chain: Chain, steps: list[tuple[str, Node, Node]]) -> Chain | None:
        """Give the steps their roles; None where no operand modulates."""
        kinds = [kind for kind, _, _ in steps]
        position = 0
        if chain.weight is None and kinds.count("mul") > 1 and kinds[0] == "mul" and self._is_vector(steps[0][1]):
            chain = replace(chain, weight=before_casts(steps[0][1]), end=steps[0][2])
            position = 1
            later = kinds[position + 1 :]
            if kinds[position] == "add" and "mul" in later and self._is_vector(steps[position][1]):
                chain = replace(chain, bias=before_casts(steps[position][1]), end=steps[position][2])
                position += 1
        affine = chain
        if position < len(steps) and kinds[position] == "mul":
            constant, node = constant_plus(steps[position][1])
            chain = replace(chain, scale=Operand.of(node), constant=constant, end=steps[position][2])
            position += 1
        if position < len(steps) and kinds[position] == "add":
            chain = replace(chain, shift=Operand.of(steps[position][1]), end=steps[position][2])
        scale, shift = chain.scale, chain.shift
        modulated = self._modulates(chain, affine.end)
        if not modulated and shift is not None:
            modulated = self.ancestry.from_input(shift.whole) and (
                shift.second is not None or narrow(shift.node, affine.end)
            )
        if not modulated:
            return None
        index, rows = chain.index(), affine.end
        scale, shift = (None if o is None else o.chosen_by(index, rows) for o in (scale, shift))
        return replace(chain, scale=scale, shift=shift, end=_with_cast(chain.end))

    def _modulates(self, chain: Chain, rows: Node) -> bool:
        """Whether the scale is modulation: made from an input, and not the gate of a GLU, which has a value of its own
        for each row, is no `k + s`, is not cut out of another tensor, and is followed by no shift."""
        scale = chain.scale
        if scale is None or not self.ancestry.from_input(scale.whole):
            return False
        several = scale.second is not None or narrow(scale.node, rows) or _is_piece(scale.node)
        return several or bool(chain.constant) or chain.shift is not None

    def _affine(self, norm: NormNode) -> Chain:
        """The norm alone, with the weight that is multiplied in by hand behind it."""
        chain = Chain(norm, norm.node, (), norm.weight, norm.bias)
        uses = self._uses(norm.node)
        if len(uses) == 1 and norm.weight is None:
            for kind, other, node in self._steps(norm, norm.node, uses[0])[:1]:
                if kind == "mul" and self._is_vector(other):
                    chain = replace(chain, weight=before_casts(other), end=node)
        return replace(chain, end=_with_cast(chain.end))

    def _is_vector(self, node: Node) -> bool:
        return value(before_casts(node)).dim() == 1 and not self.ancestry.from_input(node)


def _keeps_channels(view: Node) -> bool:
    """Whether a view moves whole rows: the last dimension stays what and where it was."""
    source = view.args[0]
    if not isinstance(source, Node) or not known(value(source).shape[-1] == value(view).shape[-1]):
        return False
    last = value(source).dim() - 1
    if view.target is aten.permute.default:
        return list(view.args[1])[-1] in (last, -1)  # type: ignore[arg-type]
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


def _with_cast(end: Node) -> Node:
    """The cast that is the only user of `end`, else `end`."""
    users = list(end.users)
    return _with_cast(users[0]) if len(users) == 1 and _is_cast(users[0]) else end


def residual_of(x: Node) -> Residual | None:
    """x as residual + gate * y or residual + y, both of the size of x; None if it is neither."""
    casts = [x]
    while _is_cast(casts[-1]):
        casts.append(casts[-1].args[0])  # type: ignore[arg-type]
    total = casts.pop()
    node = total
    while len(node.users) == 1 and casts:  # the sum is seen by this cast only
        node = casts.pop()
    found = _gated_sum(total)
    if found is None:
        pair = numbers(total) if total.target is aten.add.Tensor else None
        if pair is None or not all(same_sizes(n, total) for n in pair):
            return None
        return Residual(node, before_widening(pair[0]), before_widening(pair[1]), None)
    return replace(found, node=node)


def _gated_sum(node: Node) -> Residual | None:
    """`node` as residual + gate * x, the gate broadcast over rows, chosen by an index or cut out of a modulation tensor."""
    candidates: list[tuple[Any, Any, Any, Node | None]] = []
    if node.target is aten.addcmul.default and node.kwargs.get("value", 1) == 1:
        candidates.append((*node.args[:3], None))
    elif node.target is aten.add.Tensor and (pair := numbers(node)):
        for residual, product in (pair, pair[::-1]):
            product, view = before_casts(product), None
            if product.target in RESHAPES and len(product.users) == 1 and _keeps_channels(product):
                view, product = product, before_casts(product.args[0])  # type: ignore[arg-type]
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
                operand.second or narrow(gate, x) or (same_sizes(gate, x) and _is_piece(gate) and not _is_piece(x))
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


def _is_piece(node: Node) -> bool:
    """Whether `node` is cut out of another tensor, as a gate is out of a modulation tensor."""
    while True:
        node = before_casts(node)
        if node.target in (aten.slice.Tensor, aten.select.int):
            return True
        if node.target not in RESHAPES or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]


def _viewed(build: Builder, r: Residual) -> Node:
    if r.view is None:
        return r.x
    assert callable(r.view.target)
    result: Node = build(r.view.target, r.x, *r.view.args[1:], **r.view.kwargs)
    return result


def _shaped(build: Builder, node: Node | None, rows: Node) -> Node | None:
    """An operand [L, C] of rows [B, L, C] as [1, L, C]: two dimensions mean one vector a sample to the ops."""
    if node is None or value(node).dim() != 2 or value(rows).dim() <= 2:
        return node
    result: Node = build(aten.unsqueeze.default, node, 0)
    return result


def _sets(build: Builder, rows: Node, operands: Mapping[str, Operand | None]) -> dict[str, Node]:
    """The second sets and their index as keyword arguments."""
    found: dict[str, Node] = {}
    for name, operand in operands.items():
        if operand is not None and operand.second is not None and operand.index is not None:
            second = _shaped(build, operand.second, rows)
            assert second is not None
            found[f"{name}1"] = second
            index = operand.index
            found["index"] = build(aten.squeeze.dim, index, -1) if value(index).dim() == value(rows).dim() else index
    return found


def _constant(chain: Chain) -> dict[str, float]:
    return {} if chain.scale is None or chain.constant == 1 else {"scale_constant": chain.constant}


def _first(build: Builder, operand: Operand | None, rows: Node) -> Node | None:
    return None if operand is None else _shaped(build, operand.node, rows)


def _norm(build: Builder, chain: Chain) -> Node:
    x = chain.norm.x
    for view in chain.views:
        assert callable(view.target)
        x = build(view.target, x, *view.args[1:], **view.kwargs)
    affine = (chain.weight, chain.bias) if chain.norm.kind == "layer" else (chain.weight,)
    scale, shift = _first(build, chain.scale, x), _first(build, chain.shift, x)
    sets = _sets(build, x, {"scale": chain.scale, "shift": chain.shift})
    dtype = value(chain.end).dtype
    kept = {} if dtype == value(x).dtype else {"out_dtype": dtype}
    result: Node = build(
        NORMS[chain.norm.kind][1], x, *affine, scale, shift, chain.norm.eps, **_constant(chain), **kept, **sets
    )
    return result


def _residual_norm(build: Builder, chain: Chain, r: Residual) -> Node:
    affine = (chain.weight, chain.bias) if chain.norm.kind == "layer" else (chain.weight,)
    x = _viewed(build, r)
    gate, scale, shift = (_first(build, o, x) for o in (r.gate, chain.scale, chain.shift))
    sets = _sets(build, x, {"gate": r.gate, "scale": chain.scale, "shift": chain.shift})
    h, y = value(r.node).dtype, value(chain.end).dtype
    kept = {} if h == value(r.residual).dtype else {"h_dtype": h}
    kept |= {} if y == value(x).dtype else {"out_dtype": y}
    op = RESIDUAL_NORMS[chain.norm.kind][1]
    result: Node = build(
        op, r.residual, x, gate, *affine, scale, shift, chain.norm.eps, **_constant(chain), **kept, **sets
    )
    return result


def _as_operand(operand: Node | None, rows: Node) -> torch.Tensor | None:
    """The fake value of a modulation operand in the shape in which the op gets it."""
    if operand is None:
        return None
    tensor: torch.Tensor = value(operand)
    return tensor.unsqueeze(0) if tensor.dim() == 2 and value(rows).dim() > 2 else tensor


def _operands(rows: Node, residual: Residual | None, chain: Chain | None) -> Operands:
    """What the kernel would be given, as fake tensors; `rows` has the shape of x."""
    given = {"gate": residual and residual.gate, "scale": chain and chain.scale, "shift": chain and chain.shift}
    sets = {name: o for name, o in given.items() if o is not None}
    index = next((value(o.index) for o in sets.values() if o.index is not None), None)
    if index is not None and index.dim() == value(rows).dim():
        index = index.squeeze(-1)
    return Operands(
        x=value(rows),
        residual=None if residual is None else value(residual.residual),
        weight=None if chain is None or chain.weight is None else value(chain.weight),
        bias=None if chain is None or chain.bias is None else value(chain.bias),
        select=index,
        **{name: _as_operand(o.node, rows) for name, o in sets.items()},
        **{f"{name}1": _as_operand(o.second, rows) for name, o in sets.items()},
    )


def _misfit(operands: Operands) -> str | None:
    """Why the operands do not go together, as far as their sizes are known."""
    if any(static(n) is None for t in operands if t is not None for n in t.shape):
        return None
    for name in MODULATION:
        operand = getattr(operands, name)
        if operand is not None and (error := shape_error(name, operand.shape, operands.x.shape)):
            return error
    return None


def _against(module: Any, operands: Operands, dtypes: tuple[torch.dtype | None, ...]) -> str | None:
    """Why `auto` leaves a chain to Inductor: no Triton on the device, or operands that the kernel does not take."""
    if operands.x.device.type not in TRITON_DEVICES:
        return f"on {operands.x.device.type} there is no Triton, and Inductor fuses this itself (modulation=on forces)"
    if any(static(n) is None for t in operands if t is not None for n in (*t.shape, *t.stride())):
        return None  # decided call by call, by the op
    with torch.utils._python_dispatch._disable_current_modes():
        reason: str | None = module.supports(operands, *dtypes)
    return reason


class FuseResidualGate:
    """residual + gate * x with no norm behind it -> one op."""

    name = "residual_gate"

    def __init__(self, context: Context) -> None:
        self.auto = context.options.modulation == "auto"
        self.ancestry = Ancestry(context.weights)

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target not in (aten.add.Tensor, aten.addcmul.default) or not value(node).is_floating_point():
            return None
        found = _gated_sum(node)
        if found is None or found.gate is None or not self.ancestry.from_input(found.gate.whole):
            return None
        other = before_casts(found.residual)
        if other.target is aten.mul.Tensor and any(narrow(n, other) for n in other.all_input_nodes):
            return None  # x * cos + rotated(x) * sin
        gate = found.gate.chosen_by(found.gate.index, node)
        facts = replace(found, node=_with_cast(node), gate=gate)
        operands = _operands(facts.rows, facts, None)
        if error := _misfit(operands):
            return Refusal(node, error)
        if self.auto:
            return Refusal(node, _against(_gate, operands, (value(facts.node).dtype,)) or POINTWISE)
        return Match(node, facts, "residual + gate * x" + (", two sets by index" if gate.second is not None else ""))

    def rewrite(self, graph: Graph, match: Match) -> None:
        r: Residual = match.facts
        build = Builder(r.node)
        x = _viewed(build, r)
        dtype = value(r.node).dtype
        kept = {} if dtype == value(r.residual).dtype else {"out_dtype": dtype}
        sets = _sets(build, x, {"gate": r.gate})
        build.replace(build(RESIDUAL_GATE, r.residual, x, _first(build, r.gate, x), **kept, **sets))


def _norm_rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [] if context.options.modulation == "off" else [FuseNorm(context)]


def _gate_rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [] if context.options.modulation == "off" else [FuseResidualGate(context)]


FUSE_MODULATION = Pass(
    name="fuse_modulation",
    summary="norm + scale + shift, with the gated residual before it, as one op",
    rules=_norm_rules,
)
FUSE_RESIDUAL_GATE = Pass(
    name="fuse_residual_gate",
    summary="the gated residuals that no norm follows, as one op",
    rules=_gate_rules,
)

__all__ = ["FUSE_MODULATION", "FUSE_RESIDUAL_GATE"]
