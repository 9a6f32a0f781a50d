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
from dataclasses import replace

from torch.fx import Graph, Node

from pvae.passes.ancestry import Ancestry
from pvae.passes.ir import Builder, aten, value
from pvae.passes.modulation import (
    ROW_VIEWS,
    Chain,
    Operand,
    before_casts,
    constant_plus,
    fits,
    gated_sum,
    is_cast,
    is_piece,
    keeps_channels,
    narrow,
    numbers,
    residual_of,
    same_sizes,
    with_cast,
)
from pvae.passes.modulation_ops import against, misfit, norm_op, operands_of, residual_gate_op, residual_norm_op
from pvae.passes.norm_node import NormNode
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

GATHERS = frozenset({aten.cat.default, aten.index_select.default, aten.index.Tensor})

# What `auto` does, and why (one H200, bf16, docs/measurements.md). A chain with a norm is fused wherever the kernel takes it:
# light kernels of a block, Inductor -> fused: Wan 14B 3.54 -> 3.09 ms, Qwen-Image 0.446 -> 0.388, Flux 0.252 -> 0.214 and
# 0.162 -> 0.148. A gated residual alone is Inductor's: as an op of its own it changed 0.379 to 0.381 and 0.219 to 0.218 ms.
POINTWISE = "Inductor writes a pointwise chain in one pass too (modulation=on forces)"


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
            operands = operands_of(rows, before, chain)
            reason = misfit(operands) or (against(operands, chain, before) if self.auto else None)
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
            pair = residual_norm_op(build, chain, residual)
            h, y = build(operator.getitem, pair, 0), build(operator.getitem, pair, 1)
            chain.end.replace_all_uses_with(y)
            residual.node.replace_all_uses_with(h)
            chains = [replace(c, norm=replace(c.norm, x=h)) for c in chains[1:]]
        for chain in chains:
            build = Builder(chain.end)
            build.replace(norm_op(build, chain))

    def _uses(self, node: Node) -> list[Node]:
        """The users of a value, seen through casts."""
        found: list[Node] = []
        for user in node.users:
            found += self._uses(user) if is_cast(user) else [user]
        return found

    def _scaled(self, user: Node) -> bool:
        """Whether `user` multiplies by something that is no weight."""
        pair = numbers(user) if user.target is aten.mul.Tensor else None
        return pair is not None and any(self.ancestry.from_input(n) and narrow(n, user) for n in pair)

    def _walk(self, norm: NormNode, user: Node) -> Chain | str | None:
        """The chain that begins with `user`; a reason where it is nearly one; None where it is none."""
        views: list[Node] = []
        at = norm.node
        while user.target in ROW_VIEWS and keeps_channels(user):
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
        moves = user.target in GATHERS or (user.target in ROW_VIEWS and keeps_channels(user))
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
        return replace(chain, scale=scale, shift=shift, end=with_cast(chain.end))

    def _modulates(self, chain: Chain, rows: Node) -> bool:
        """Whether the scale is modulation: made from an input, and not the gate of a GLU, which has a value of its own
        for each row, is no `k + s`, is not cut out of another tensor, and is followed by no shift."""
        scale = chain.scale
        if scale is None or not self.ancestry.from_input(scale.whole):
            return False
        several = scale.second is not None or narrow(scale.node, rows) or is_piece(scale.node)
        return several or bool(chain.constant) or chain.shift is not None

    def _affine(self, norm: NormNode) -> Chain:
        """The norm alone, with the weight that is multiplied in by hand behind it."""
        chain = Chain(norm, norm.node, (), norm.weight, norm.bias)
        uses = self._uses(norm.node)
        if len(uses) == 1 and norm.weight is None:
            for kind, other, node in self._steps(norm, norm.node, uses[0])[:1]:
                if kind == "mul" and self._is_vector(other):
                    chain = replace(chain, weight=before_casts(other), end=node)
        return replace(chain, end=with_cast(chain.end))

    def _is_vector(self, node: Node) -> bool:
        return value(before_casts(node)).dim() == 1 and not self.ancestry.from_input(node)


class FuseResidualGate:
    """residual + gate * x with no norm behind it -> one op."""

    name = "residual_gate"

    def __init__(self, context: Context) -> None:
        self.auto = context.options.modulation == "auto"
        self.ancestry = Ancestry(context.weights)

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target not in (aten.add.Tensor, aten.addcmul.default) or not value(node).is_floating_point():
            return None
        found = gated_sum(node)
        if found is None or found.gate is None or not self.ancestry.from_input(found.gate.whole):
            return None
        other = before_casts(found.residual)
        if other.target is aten.mul.Tensor and any(narrow(n, other) for n in other.all_input_nodes):
            return None  # x * cos + rotated(x) * sin
        gate = found.gate.chosen_by(found.gate.index, node)
        facts = replace(found, node=with_cast(node), gate=gate)
        operands = operands_of(facts.rows, facts, None)
        reason = misfit(operands) or (against(operands, None, facts) or POINTWISE if self.auto else None)
        if reason is not None:
            return Refusal(node, reason)
        return Match(node, facts, "residual + gate * x" + (", two sets by index" if gate.second is not None else ""))

    def rewrite(self, graph: Graph, match: Match) -> None:
        build = Builder(match.facts.node)
        build.replace(residual_gate_op(build, match.facts))


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
