"""Which modulation chains of the zoo's transformers are fused, which are refused and why: `pvae coverage`.

Chains are counted three times over: those that the passes fuse, those that they refuse with a reason, and what a second,
simpler search still finds in the rewritten graph although no pass said anything about it ("unseen").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pvae.backend import REGISTRY, PvaeError, reset
from pvae.module import CompiledForward, restore
from pvae.options import parse_options
from pvae.passes.ancestry import Ancestry
from pvae.passes.ir import VIEW_OPS, aten, is_tensor, source_line
from pvae.passes.modulation import before_casts, constant_plus, narrow, numbers
from pvae.passes.rule import RewriteCounter
from pvae.report import GraphReport
from pvae.tools.zoo import Case

PASSES = ("fuse_modulation", "fuse_residual_gate")
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.rsqrt.default, aten.linalg_vector_norm.default})
STEPS = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.cat.default, aten.where.self})
DEPTH = 8


@dataclass
class Coverage:
    """One class: how many chains its forward has and what became of them."""

    name: str
    cls: str
    scope: str  # "forward": one graph; "graphs": those that Dynamo makes, where forward cannot be captured as one
    fused: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # reason -> how often
    unseen: list[str] = field(default_factory=list)  # source lines
    why_graphs: str = ""
    nodes: set[str] = field(default_factory=set, repr=False)  # of the refusals
    output: Any = field(default=None, repr=False)  # of the rewritten model

    @property
    def chains(self) -> int:
        return self.fused + sum(self.refused.values()) + len(self.unseen)

    def line(self) -> str:
        counts = f"{self.chains:3d} chains, {self.fused:3d} fused, {sum(self.refused.values()):2d} refused"
        return f"{self.name:28s} {counts}, {len(self.unseen):2d} unseen  ({self.scope})"

    def to_dict(self) -> dict[str, Any]:
        counts = {"chains": self.chains, "fused": self.fused, "refused": dict(self.refused), "unseen": self.unseen}
        return {"name": self.name, "class": self.cls, "scope": self.scope, "why_graphs": self.why_graphs, **counts}


def cover(case: Case, options: Mapping[str, str]) -> Coverage:
    """Run `case` with its forward captured as one graph, or else as the graphs that Dynamo makes, and count the chains."""
    found = Coverage(case.name, type(case.model).__name__, "forward")
    try:
        _as_one_graph(case, options, found)
    except PvaeError as error:
        found.scope, found.why_graphs = "graphs", str(error).split(": ", 1)[-1].splitlines()[0]
        _by_dynamo(case, options, found)
    return found


def _as_one_graph(case: Case, options: Mapping[str, str], found: Coverage) -> None:
    model = case.model
    strict = parse_options({**options, "strict": "on"})  # what would run eagerly is an error here
    forward = CompiledForward(model, found.cls, strict, RewriteCounter())
    weights = frozenset(re.sub(r"\W", "_", name) for name, _ in model.named_parameters())
    left: list[tuple[str, str]] = []

    def observe(stage: str, gm: GraphModule) -> None:
        if stage == PASSES[-1]:
            left.extend(left_over(gm.graph, Ancestry(weights)))

    forward.observe = observe
    model.forward = forward
    try:
        found.output = case.run()
    finally:
        restore(model)
    _count([program.report for program in forward.programs], found)
    found.unseen = [line for node, line in left if node not in found.nodes]


def _by_dynamo(case: Case, options: Mapping[str, str], found: Coverage) -> None:
    torch._dynamo.reset()
    reset()
    found.output = case.run(torch.compile(case.model, backend="pvae", options=dict(options)))
    _count(REGISTRY.find(None).graphs, found)


def _count(reports: Sequence[GraphReport], found: Coverage) -> None:
    for report in reports:
        for step in report.passes:
            if step.name in PASSES:
                found.fused += len(step.matches)
                found.refused.update(record.note for record in step.refusals)
                found.nodes.update(record.node for record in step.refusals)


def left_over(graph: Graph, ancestry: Ancestry) -> list[tuple[str, str]]:
    """Multiplications of something normalised by `k + scale`, and gated sums, that are still there: the name of the
    norm or sum, and the model's line."""
    lines = []
    for node in graph.nodes:
        pair = numbers(node) if node.op == "call_function" and is_tensor(node) else None
        if pair is None:
            continue
        for one, other in (pair, pair[::-1]):
            if node.target is aten.mul.Tensor:
                constant, scale = constant_plus(_without_views(other))
                norm = _norm_before(one)
                if constant and ancestry.from_input(scale) and narrow(other, one) and norm is not None:
                    lines.append((norm.name, source_line(node)))
            elif _gated(other, ancestry) and not narrow(one, other) and not _gated(one, ancestry):  # nor a rotary sum
                lines.append((node.name, source_line(node)))
    return lines


def _without_views(node: Node) -> Node:
    node = before_casts(node)
    while node.target in VIEW_OPS and isinstance(node.args[0], Node):
        node = before_casts(node.args[0])
    return node


def _gated(node: Node, ancestry: Ancestry) -> bool:
    """Whether `node` is a tensor times something with one value for several of its rows, one a channel."""
    node = _without_views(node)
    pair = numbers(node) if node.target is aten.mul.Tensor else None
    if pair is None or len(node.meta["val"].shape) < 3:
        return False
    return any(
        narrow(g, x) and g.meta["val"].shape[-1] == x.meta["val"].shape[-1] and ancestry.from_input(g)
        for g, x in (pair, pair[::-1])
    )


def _norm_before(node: Node) -> Node | None:
    """The norm within a few elementwise steps or views before `node`."""
    todo = [(node, 0)]
    while todo:
        at, depth = todo.pop()
        at = _without_views(at)
        if at.target in NORMS:
            return at
        if depth < DEPTH and at.target in STEPS:
            todo += [(n, depth + 1) for n in at.all_input_nodes]
    return None


def complete(found: Sequence[Coverage]) -> bool:
    """Whether 95 % of all chains are fused."""
    return sum(f.fused for f in found) >= 0.95 * sum(f.chains for f in found)


def markdown(found: Sequence[Coverage]) -> str:
    """The table as Markdown, then each refusal, what was not seen, and what was captured in blocks."""
    chains, fused = sum(f.chains for f in found), sum(f.fused for f in found)
    share = 100 * fused / max(chains, 1)
    lines = [
        "# Coverage of modulation chains",
        "",
        "Made by `pvae coverage --out docs/coverage.md` (CPU, tiny presets, `modulation=on`). A chain is a norm with scale,",
        "shift or a gated residual that depends on the model's input, or a gated residual alone. `unseen` is what a",
        "second, simpler search found in the rewritten graph though no pass had said anything about it.",
        "",
        f"{len(found)} models of {len({f.cls for f in found})} classes: {chains} chains, {fused} fused ({share:.1f} %).",
        "",
        "| model | class | captured | chains | fused | refused | unseen |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for f in found:
        counts = f"{f.chains} | {f.fused} | {sum(f.refused.values())} | {len(f.unseen)}"
        lines.append(f"| {f.name} | {f.cls} | {f.scope} | {counts} |")
    refused = [f"- {f.name}: {n} x {reason}" for f in found for reason, n in f.refused.items()]
    unseen = [f"- {f.name}: {n} x `{line}`" for f in found for line, n in Counter(f.unseen).items()]
    blocks = [f"- {f.name}: {f.why_graphs}" for f in found if f.why_graphs]
    for title, items in (("Refused, and why", refused), ("Unseen", unseen), ("Captured in several graphs", blocks)):
        lines += ["", f"## {title}", "", *(items or ["None."])]
    whole = "Ops that sharding computes whole on every rank, over the zoo's autoencoders: none ([sharding.md](sharding.md))."
    lines += ["", whole, ""]
    return "\n".join(lines)
