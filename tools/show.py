"""How the CLI's findings look on a terminal: tables and coloured differences. Data in, rich renderables out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pvae.passes.pipeline import Pipeline
from pvae.tools.bisect import Culprit
from pvae.tools.check import Checked, Trial
from pvae.tools.doctor import BROKEN, NOTE, Finding
from pvae.tools.model_run import Trace, dtype_name
from pvae.tools.timing import Timing
from pvae.tools.tune import Tuned

WIDTH_IN_A_FILE = 160
_DIFF = {"+": "green", "-": "red", "@": "cyan"}
_STATE = {NOTE: "yellow", BROKEN: "bold red"}


def console(*, stderr: bool = False) -> Console:
    """Stdout or stderr as they are now; wide where nobody's terminal sets the width."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_IN_A_FILE, highlight=False)


def table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def pipeline_table(pipeline: Pipeline) -> Table:
    rows = table("", "pass", "what it does", "settings", "exactness", right=("",))
    for number, step in enumerate(pipeline.steps, 1):
        p = step.pass_
        settings = ", ".join(
            f"{key}={step.settings[key]}" if key in step.settings else f"{key}={values}"
            for key, values in p.options.items()
        )
        rows.add_row(str(number), p.name, p.summary, Text(settings), p.exact)
    return rows


def difference(lines: Iterable[str]) -> Iterable[Text]:
    for line in lines:
        yield Text(line, style=_DIFF.get(line[:1], ""), no_wrap=True, overflow="ignore")


def timings(found: Mapping[str, Timing]) -> Table:
    figures = ("median ms", "first call s", "peak GiB of GPU memory")
    rows = table("", *figures, right=figures)
    for name, timing in found.items():
        peak = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f}"
        rows.add_row(name, f"{1e3 * timing.median_s:.2f}", f"{timing.first_s:.2f}", peak)
    return rows


def forms(trace: Trace) -> str:
    """`conv3d 25, conv2d 5 -> conv2d 27, linear 1`: the convolutions of a graph as captured and at the end."""
    sides = (trace.stages[0].forms, trace.stages[-1].forms)
    return " -> ".join(", ".join(f"{kind} {count}" for kind, count in side.most_common()) or "none" for side in sides)


def explained(traces: Sequence[Trace]) -> Table:
    """One line for each pass, rule and reason; how often in each graph (in all graphs, if there are many)."""
    columns = [f"g{i}" for i in range(len(traces))] if len(traces) <= 4 else ["all graphs"]
    rows = table(*columns, "pass", "rule", "what happened", "first at", right=columns)
    counts: dict[tuple[str, str, str], Counter[int]] = {}
    first: dict[tuple[str, str, str], str] = {}
    for number, trace in enumerate(traces):
        assert trace.report is not None
        for done in trace.report.passes:
            texts = [(r, "rewritten") for r in done.matches] + [(r, f"left alone: {r.note}") for r in done.refusals]
            for record, text in texts:
                key = done.name, record.rule, text
                counts.setdefault(key, Counter())[number if len(traces) <= 4 else 0] += 1
                first.setdefault(key, record.source or record.node)
    order = {done.name: index for trace in traces if trace.report for index, done in enumerate(trace.report.passes)}
    for key, by_graph in sorted(counts.items(), key=lambda item: order[item[0][0]]):
        numbers = [str(by_graph[i] or "") for i in range(len(columns))]
        style = "" if key[2] == "rewritten" else "dim"
        rows.add_row(*numbers, *key[:2], Text(key[2]), Text(first[key], overflow="ellipsis", no_wrap=True), style=style)
    return rows


def decisions(traces: Sequence[Trace]) -> Table:
    """One line for each distinct convolution and choice: its forms with times or why not, and how often in each graph."""
    columns = [f"g{i}" for i in range(len(traces))] if len(traces) <= 4 else ["all graphs"]
    rows = table(*columns, "takes", "convolution", "chosen (source); other forms", right=columns)
    counts: dict[tuple[str, str], Counter[int]] = {}
    for number, trace in enumerate(traces):
        assert trace.report is not None
        for record in (r for done in trace.report.passes for r in done.decisions):
            key = record.rule, record.note
            counts.setdefault(key, Counter())[number if len(traces) <= 4 else 0] += 1
    for (form, note), by_graph in counts.items():
        what, _, forms = note.partition(": ")
        rows.add_row(*(str(by_graph[i] or "") for i in range(len(columns))), form, Text(what), Text(forms))
    return rows


def tuned(found: Tuned) -> str:
    """A convolution as measured: the forms, fastest first, and what was left out."""
    head = f"{found.site.count:4} x {found.site.problem}"
    if found.trial is None:
        return f"{head}: known"
    forms = found.trial.forms.items()
    timed = sorted((m.ms, name, m.config) for name, m in forms if m.ms is not None)
    lines = [", ".join(f"{name} {ms:.3g} ms" + (f" {list(config)}" if config else "") for ms, name, config in timed)]
    lines += [f"{name} not: {m.why_not}" for name, m in forms if m.ms is None]
    lines += [f"dropped {what}: {reason}" for what, reason in found.trial.dropped]
    return "\n".join([head, *(f"       {line}" for line in lines if line)])


def every_record(trace: Trace) -> Table:
    """Each rewrite with its ordinal, and each refusal, of one graph."""
    rows = table("#", "pass", "rule", "node", "note", "model's line", right=("#",))
    assert trace.report is not None
    for done in trace.report.passes:
        for r in done.matches:
            rows.add_row(str(r.ordinal), done.name, r.rule, r.node, Text(r.note), Text(r.source))
        for r in done.decisions:
            rows.add_row("", done.name, r.rule, r.node, Text(r.note), Text(r.source))
        for r in done.refusals:
            rows.add_row("", done.name, r.rule, r.node, Text(f"left alone: {r.note}"), Text(r.source), style="dim")
    return rows


def checked_header() -> str:
    figures = f"{'pvae error':>11} {'eager error':>11} {'bound':>9}"
    return f"{'model':22} {'part':7} {'size':12} {'dtype':9} {'seed':>4} {figures}"


def checked_row(line: Checked) -> Text:
    r = line.request
    text = f"{r.model:22} {r.part:7} {line.size:12} {dtype_name(r.dtype):9} {r.seed:4} "
    if line.trial is None:
        return Text(f"{text}skipped: {line.skipped}", style="yellow")
    found = line.trial.agreement
    if found is None:
        return Text(f"{text}{line.trial.error}", style="bold red")
    text += f"{found.error:11.2e} {found.eager_error:11.2e} {found.bound:9.2e} {'ok' if found.ok else 'VIOLATED'}"
    return Text(text, style="" if found.ok else "bold red")


def trial_line(what: str, trial: Trial) -> Text:
    return Text(f"{'right' if trial.ok else 'WRONG':5}  {what:28} {trial}", style="green" if trial.ok else "red")


def verdict(culprit: Culprit) -> str:
    """The outcome of a bisection in a sentence or two."""
    if culprit.kind == "good":
        return f"nothing to bisect: the model is right ({culprit.after})"
    if culprit.kind == "engine":
        return f"the engine: with no pass at all Inductor gives {culprit.after}; interpreted it is right"
    if culprit.kind == "capture":
        return f"the capture: wrong with no pass at all and interpreted: {culprit.after}"
    if culprit.kind == "pass" or culprit.record is None:
        return f"pass {culprit.pass_name}, not by a rewrite of its rules: {culprit.after}"
    r = culprit.record
    return (
        f"rewrite {r.ordinal}: pass {culprit.pass_name}, rule {r.rule}, node {r.node} of graph {culprit.graph}\n"
        f"  model's line  {r.source or 'unknown'}\n  before        {culprit.before}\n  after         {culprit.after}\n"
        f"  again by      --passes {culprit.passes} -o rewrite_limit={r.ordinal}"
    )


def finding(line: Finding) -> Text:
    return Text(f"{line.state:7} {line.name:15} {line.text}", style=_STATE.get(line.state, ""))
