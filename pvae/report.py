"""What pvae did: a record a graph, found again by the weights that the graph reads or by the code that it came from."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from pvae.passes.rule import Report


@dataclass
class GraphReport:
    """One compiled graph: where it came from, what each pass did, and how long pvae itself took."""

    name: str
    entry: str  # "torch.compile" or "pvae.compile"
    pipeline: str
    passes: list[Report] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    capture_seconds: float = 0.0
    pass_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    shared_with: int | None = None  # index of the earlier graph whose compiled code this one uses

    def matches(self, name: str) -> int:
        return sum(len(p.matches) for p in self.passes if p.name == name)

    def to_dict(self) -> dict[str, Any]:
        def records(items: Iterable[Any]) -> list[dict[str, Any]]:
            return [vars(r).copy() for r in items]

        return {
            "name": self.name,
            "entry": self.entry,
            "pipeline": self.pipeline,
            "nodes": [self.nodes_before, self.nodes_after],
            "capture_s": round(self.capture_seconds, 4),
            "passes_s": round(self.pass_seconds, 4),
            "shared_with": self.shared_with,
            "notes": self.notes,
            "passes": [
                {
                    "name": p.name,
                    "matches": records(p.matches),
                    "refusals": records(p.refusals),
                    "decisions": records(p.decisions),
                    "counters": dict(p.counters),
                    "seconds": round(p.seconds, 4),
                }
                for p in self.passes
            ],
        }


def _grouped(pass_report: Report) -> list[str]:
    """Refusals as `3 x rule: reason`, most frequent first."""
    reasons = Counter((r.rule, r.note) for r in pass_report.refusals)
    return [f"{count} x {rule}: {reason}" for (rule, reason), count in reasons.most_common()]


@dataclass
class ModelReport:
    """The graphs of one model; prints as text, `to_dict()` for machines."""

    graphs: list[GraphReport]
    notes: list[str] = field(default_factory=list)

    def matches(self, name: str) -> int:
        """How often pass `name` matched, over all graphs."""
        return sum(g.matches(name) for g in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": [g.to_dict() for g in self.graphs], "notes": self.notes}

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)} compiled by pvae"]
        lines += [f"note: {note}" for note in self.notes]
        for index, graph in enumerate(self.graphs):
            shared = f", compiled code shared with graph {graph.shared_with}" if graph.shared_with is not None else ""
            lines.append(
                f"graph {index}: {graph.name} ({graph.entry}), {graph.nodes_before} -> {graph.nodes_after} nodes, "
                f"capture {graph.capture_seconds:.2f} s, passes {graph.pass_seconds:.2f} s{shared}"
            )
            lines += [f"  note: {note}" for note in graph.notes]
            for p in graph.passes:
                done, what = (p.decisions, "decisions") if p.decisions else (p.matches, "rewrites")
                rules = ", ".join(f"{rule} {n}" for rule, n in Counter(r.rule for r in done).items())
                lines.append(f"  {p.name:18s} {len(done):4d} {what}" + (f": {rules}" if rules else ""))
                lines += [f"  {'':18s}      left alone {text}" for text in _grouped(p)]
        return "\n".join(lines)


class Registry:
    """Every report of this process with weak references to the weights it reads; dropped with `clear`."""

    def __init__(self) -> None:
        self._entries: list[tuple[GraphReport, list[weakref.ref[torch.Tensor]], CodeType | None]] = []
        self._notes: list[tuple[CodeType | None, str]] = []

    def add(self, report: GraphReport, weights: Iterable[torch.Tensor], code: CodeType | None) -> None:
        self._entries.append((report, [weakref.ref(w) for w in weights], code))

    def note(self, code: CodeType | None, text: str) -> None:
        """Something to say about every model that runs `code`, outside any graph."""
        self._notes.append((code, text))

    def index(self, report: GraphReport) -> int:
        return next(i for i, (known, _, _) in enumerate(self._entries) if known is report)

    def clear(self) -> None:
        self._entries.clear()
        self._notes.clear()

    def codes(self) -> set[CodeType]:
        return {code for _, _, code in self._entries if code is not None}

    def find(self, model: torch.nn.Module | None) -> ModelReport:
        """All graphs (model None), or those that read a weight of `model` or came from the forward of one of its modules."""
        if model is None:
            return ModelReport([r for r, _, _ in self._entries], [text for _, text in self._notes])
        mine = {id(t) for t in (*model.parameters(), *model.buffers())}
        codes = {getattr(type(m).forward, "__code__", None) for m in model.modules()} - {None}
        graphs = [
            report
            for report, weights, code in self._entries
            if any(id(ref()) in mine for ref in weights) or (not weights and code in codes)
        ]
        if not graphs:  # a second instance of a class runs the code that Dynamo compiled for the first
            graphs = [report for report, _, code in self._entries if code in codes]
        return ModelReport(graphs, [text for code, text in self._notes if code in codes])
