"""What a pass is made of: rules that match or refuse with a reason, and the report of what they did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.fx import Graph, Node

from pvae.passes.ir import repropagate, source_line
from pvae.runtime.mesh import Mesh
from pvae.runtime.sharded_tensor import Piece

BEYOND_LIMIT = "beyond the rewrite limit"  # the reason of every refusal once a counter is used up


@dataclass(frozen=True)
class Match:
    """A place where a rule applies: the anchor node, what the rule found there, and a note for people."""

    node: Node
    facts: Any = None
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """A place that is the rule's kind but must be left alone, and why, in words."""

    node: Node
    reason: str


@dataclass(frozen=True)
class Record:
    """One line of a report: what happened to which node, and the model's line that made it."""

    rule: str
    node: str
    source: str
    note: str
    ordinal: int | None = None


@dataclass
class RewriteCounter:
    """Numbers every rewrite of a compile from 1; with a limit, rewrites after it are not done (that is what bisects)."""

    limit: int | None = None
    count: int = 0

    def take(self) -> int | None:
        if self.limit is not None and self.count >= self.limit:
            return None
        self.count += 1
        return self.count


@dataclass
class Context:
    """What passes may know besides the graph: the options, which inputs are weights, which outputs may be re-strided.

    For sharding also this rank's place in the mesh, and which inputs arrive as pieces (`held`, by placeholder). A pass
    that leaves outputs as pieces says so in `left`, by output. `arguments` are the names that the model's own forward has
    for its inputs, by placeholder: `hidden_states`, and `caches_0` or `kwargs_mask` for what is in a list or dict. `world` are
    all ranks in a line, whatever the mesh is: those among whom a main-rank region's results travel. `returned_caches` are
    outputs that the caller only hands back in the next call.
    """

    options: Any
    weights: frozenset[str] = frozenset()
    free_strides: frozenset[int] = frozenset()
    counter: RewriteCounter = field(default_factory=RewriteCounter)
    mesh: Mesh | None = None
    held: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    left: dict[int, tuple[Piece, ...]] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    world: Mesh | None = None
    returned_caches: frozenset[int] = frozenset()


@dataclass
class Report:
    """What one pass did to one graph."""

    name: str
    matches: list[Record] = field(default_factory=list)
    refusals: list[Record] = field(default_factory=list)
    decisions: list[Record] = field(default_factory=list)  # of an analysis: `rule` is what was chosen
    counters: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        return bool(self.matches)


class Rule(Protocol):
    """One rewrite. `match` reads; `rewrite` acts on what `match` found and on nothing else."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def match(self, node: Node) -> Match | Refusal | None:
        """None: not this rule's kind of node. Refusal: its kind, but not now, and why."""

    def rewrite(self, graph: Graph, match: Match) -> None:
        """Replace what `match` names; the nodes that become dead are removed by the pass."""


def refresh_strides(graph: Graph, context: Context, report: Report) -> None:
    """What a pass does at its end that changed layouts: later passes read in the meta what follows from them."""
    if report.changed:
        graph.eliminate_dead_code()
        repropagate(graph.nodes)


@dataclass(frozen=True)
class Pass:
    """An ordered set of rules, tried on every node in graph order; the first that matches a node rewrites it."""

    name: str
    summary: str
    rules: Callable[[Context, Mapping[str, str]], list[Rule]]
    options: Mapping[str, str] = field(default_factory=dict)  # setting -> its values, for `name{setting=value}`
    before: Callable[[Graph, Context, Report], None] | None = None  # what must not be cut short by a rewrite limit
    after: Callable[[Graph, Context, Report], None] | None = None
    exact: str = "only rounding can differ"

    def run(self, graph: Graph, context: Context, settings: Mapping[str, str] | None = None) -> Report:
        """Apply the rules to `graph` in place and say what happened."""
        start = time.perf_counter()
        report = Report(self.name)
        if self.before is not None:
            self.before(graph, context, report)
        rules = self.rules(context, settings or {})
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users and not node._erased:
                self._visit(graph, node, rules, context, report)
        if self.after is not None:
            self.after(graph, context, report)
        if report.changed:
            graph.eliminate_dead_code()
        report.seconds = time.perf_counter() - start
        return report

    def _visit(self, graph: Graph, node: Node, rules: list[Rule], context: Context, report: Report) -> None:
        for rule in rules:
            found = rule.match(node)
            if found is None:
                continue
            line = source_line(node)
            if isinstance(found, Refusal):
                report.refusals.append(Record(rule.name, node.name, line, found.reason))
                continue
            ordinal = context.counter.take()
            if ordinal is None:
                report.refusals.append(Record(rule.name, node.name, line, BEYOND_LIMIT))
                return
            record = Record(rule.name, node.name, line, found.note, ordinal)
            rule.rewrite(graph, found)
            report.matches.append(record)
            report.counters[rule.name] += 1
            return
