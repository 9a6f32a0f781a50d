"""Finds what breaks a model: the capture, the engine, or the first pass and in it the single rewrite.

Two binary searches between a pipeline that is right and one that is wrong: over the number of passes that run,
then over `rewrite_limit` within that prefix. Each keeps one end right and the other wrong, so what it ends at is a
step that turns right into wrong, even where a later step hides the damage again.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pvae.options import Options
from pvae.passes.pipeline import Pipeline
from pvae.passes.rule import BEYOND_LIMIT, Record
from pvae.tools.check import Subject, Trial


class Say(Protocol):
    """Hears of each trial as it ends: what ran, and how it went."""

    def __call__(self, what: str, trial: Trial) -> None: ...


@dataclass(frozen=True)
class Culprit:
    """What bisection found.

    `kind` is `good` (nothing is wrong), `capture` (wrong with no pass at all), `engine` (right when interpreted),
    `pass` (a pass, outside its rules) or `rewrite`. `before` and `after` are the trials on both sides of the step;
    `record` is the rewrite, with its ordinal among those of the pipeline `passes`; `diff` shows what it did to graph
    number `graph`.
    """

    kind: str
    after: Trial
    before: Trial | None = None
    pass_name: str = ""
    graph: int | None = None
    record: Record | None = None
    diff: tuple[str, ...] = ()
    passes: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pass": self.pass_name or None,
            "passes": self.passes or None,
            "graph": self.graph,
            "rewrite": vars(self.record) if self.record is not None else None,
            "before": self.before.to_dict() if self.before is not None else None,
            "after": self.after.to_dict(),
            "diff": list(self.diff),
        }


def first_wrong(right: int, wrong: int, trial: Callable[[int], Trial], found: dict[int, Trial]) -> int:
    """A step in (right, wrong] at which trials turn from right to wrong; `found` keeps every trial made."""
    while wrong - right > 1:
        middle = (right + wrong) // 2
        found[middle] = trial(middle)
        if found[middle].ok:
            right = middle
        else:
            wrong = middle
    return wrong


def bisect(subject: Subject, options: Options, say: Say) -> Culprit:
    """Find what makes `subject` break the numerical contract, raise, or give NaN under `options`."""

    def attempt(what: str, changed: Options) -> Trial:
        trial = subject.trial(changed)
        say(what, trial)
        return trial

    steps = options.pipeline.steps

    def prefix(count: int) -> Options:
        return replace(options, passes=str(Pipeline(steps[:count])), disable=())

    def after_passes(count: int) -> Trial:
        return attempt(f"{count} of {len(steps)} passes", prefix(count))

    whole = attempt(f"all {len(steps)} passes", options)
    if whole.ok:
        return Culprit("good", whole)
    nothing = after_passes(0)
    if not nothing.ok:
        if options.engine == "eager":
            return Culprit("capture", nothing)
        interpreted = attempt("0 passes, engine eager", replace(prefix(0), engine="eager"))
        return Culprit("engine", nothing, interpreted) if interpreted.ok else Culprit("capture", interpreted)

    by_passes = {0: nothing, len(steps): whole}
    count = first_wrong(0, len(steps), after_passes, by_passes)
    pass_name, wrong = steps[count - 1].pass_.name, by_passes[count]

    def limited(limit: int) -> Trial:
        return attempt(f"{count} passes, {limit} rewrites", replace(prefix(count), rewrite_limit=limit))

    by_rewrites = {wrong.rewrites: wrong, 0: limited(0)}
    if not by_rewrites[0].ok:
        return Culprit("pass", wrong, by_passes[count - 1], pass_name)
    ordinal = first_wrong(0, wrong.rewrites, limited, by_rewrites)
    before, after = by_rewrites[ordinal - 1], by_rewrites[ordinal]
    graph, stage, record = _first_left_out(before, ordinal)
    # Without the verifier, which might stop this trial before its graph can be seen.
    seen = subject.trial(replace(prefix(count), rewrite_limit=ordinal, verify="off"))
    texts = [trial.traces[graph].stages[stage : stage + 1] for trial in (before, seen)]
    diff = tuple(diff_lines(texts[0][0].text, texts[1][0].text)) if all(texts) else ()
    return Culprit("rewrite", after, before, steps[stage - 1].pass_.name, graph, record, diff, prefix(count).passes)


def _first_left_out(trial: Trial, ordinal: int) -> tuple[int, int, Record]:
    """Where rewrite `ordinal` would come in a trial limited to those before it: graph, stage, and its record."""
    for number, trace in enumerate(trial.traces):
        assert trace.report is not None
        for index, report in enumerate(trace.report.passes):
            for record in report.refusals:
                if record.note == BEYOND_LIMIT:
                    return number, index + 1, replace(record, note="", ordinal=ordinal)
    raise AssertionError(f"rewrite {ordinal} is wrong, yet nothing was left out with a limit of {ordinal - 1}")


def diff_lines(before: str, after: str, context: int = 2) -> list[str]:
    """Unified difference of two dumps, without the file header."""
    return list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=context, lineterm=""))[2:]
