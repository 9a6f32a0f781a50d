"""The one place that decides which form each convolution takes, and in which layout (an analysis: it rewrites nothing).

Each convolution has several forms (`conv_forms.py`) with times from measurements or rules (`conv_figures.py`). A form reads
and writes one layout, so the choice is made for all convolutions of a graph together, by a minimum cut over what forms,
conversions and layout-dependent operations cost (`conv_layout.py`). The passes that follow ask `chosen` what to do with
a convolution; where this pass has not run they get the choice for that convolution alone.

All ranks of a sharded model must keep the same layouts, for they exchange rows in them, but hold pieces of different sizes
and perhaps different tuning stores. There a layout is chosen by rule, of device and dtype alone, and only the form in it
by figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.passes.conv_figures import MARGINS, Knowledge
from pvae.passes.conv_forms import Form, Forms, Wanted, default_layout, forms_of
from pvae.passes.conv_layout import layout_problem
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.ir import ConvNode, source_line, value
from pvae.passes.layout_cut import CHANNELS_LAST, CONTIGUOUS
from pvae.passes.rule import Context, Pass, Record, Report

KEY = "pvae_form"  # in the meta of a convolution


@dataclass(frozen=True)
class FormChoice:
    """What a convolution is to be computed as.

    form          native, channels_last, unfold2d, linear, frames or taps (`conv_forms.py`)
    layout        what it reads and writes: contiguous or channels_last
    ms            its time; None where nobody knows
    alternatives  all forms, each with its time or why it cannot be had
    source        where the times are from, or `rule`
    config        of the kernel, for taps; empty: the kernel's own choice
    converted     native: the activation comes in channels_last, and was found worth a copy (into channels_last none is needed)
    """

    form: str
    layout: str
    ms: float | None
    alternatives: tuple[Form, ...]
    source: str
    config: tuple[int, ...] = ()
    converted: bool = False

    @classmethod
    def of(cls, form: Form, every: tuple[Form, ...]) -> FormChoice:
        return cls(form.name, form.layout, form.ms, every, form.source or "rule", form.config)

    def why_not(self, form: str) -> str | None:
        """Why the convolution does not take `form`, in words; None if it does, or if that is no form of it."""
        other = self._alternative(form)
        if other is None or form == self.form:
            return None
        return other.why_not or f"{self.form} is chosen ({self.source})"

    def against(self, form: str) -> bool:
        """Whether figures decided between this form and `form`, which could be had."""
        other = self._alternative(form)
        return self.ms is not None and other is not None and other.ms is not None and other.why_not is None

    def _alternative(self, form: str) -> Form | None:
        return next((f for f in self.alternatives if f.name == form), None)

    def __str__(self) -> str:
        own = self._alternative(self.form)
        took = f"{self.form} {own.time}" if own is not None and own.ms is not None else self.form
        copied = ", its input copied" if self.converted else ""
        others = [f for f in self.alternatives if f.name != self.form]
        timed = sorted((f for f in others if f.why_not is None and f.ms is not None), key=lambda f: f.ms or 0.0)
        unknown = [f.name for f in others if f.why_not is None and f.ms is None]
        texts = [f"{took} in {self.layout}{copied} ({self.source})", *(f"{f.name} {f.time}" for f in timed)]
        texts += [f"{', '.join(unknown)}: no figure"] if unknown else []
        reasons = dict.fromkeys(f.why_not for f in others if f.why_not is not None)
        return "; ".join(texts + [f"{', '.join(f.name for f in others if f.why_not == r)} not: {r}" for r in reasons])


def chosen(node: Node, context: Context, form: str | None = None) -> FormChoice | None:
    """What the policy chose for a convolution; None if `node` is no convolution of two or three dimensions.

    `form` (a value of the option conv3d) is asked for instead of what the options ask for.
    """
    if form is None and KEY in node.meta:
        found: FormChoice = node.meta[KEY]
        return found
    conv = _conv(node)
    if conv is None:
        return None
    forms = forms_of(conv, Wanted.of(context.options, form), Knowledge.of(value(conv.x).device, context.options))
    return _best(forms)


def hand_over(choice: FormChoice | None, node: Node) -> None:
    """`node` is what became of a convolution: its layout stays what the policy chose."""
    if choice is not None:
        form = "channels_last" if choice.layout == CHANNELS_LAST else "native"
        node.meta[KEY] = replace(choice, form=form, ms=None, alternatives=(Form(form, choice.layout),), config=())


def _conv(node: Node) -> ConvNode | None:
    conv = ConvNode.of(node)
    return conv if conv is not None and conv.ndim in (2, 3) else None


def _best(forms: Forms, layout: str | None = None) -> FormChoice:
    """The best form in a layout; in the rule's one where none was decided on. That is of dtype, device and channels alone."""
    best = forms.best(forms.ruled.layout if layout is None else layout)
    return FormChoice.of(forms.ruled if best is None else best, forms.every)


def decide(graph: Graph, context: Context) -> dict[Node, tuple[Forms, FormChoice]]:
    """The choice for every convolution of two or three dimensions, all together."""
    convs = [conv for conv in map(_conv, graph.nodes) if conv is not None]
    if not convs:
        return {}
    wanted = Wanted.of(context.options)
    knowledge: dict[torch.device, Knowledge] = {}
    forms: dict[Node, Forms] = {}
    for conv in convs:
        device = value(conv.x).device
        if device not in knowledge:
            knowledge[device] = Knowledge.of(device, context.options)
        forms[conv.node] = forms_of(conv, wanted, knowledge[device])
    layouts, like = ({}, {}) if context.mesh is not None else _cut(graph, context, forms, knowledge)
    choices = {node: (found, _best(found, layouts.get(node))) for node, found in forms.items()}
    if not layouts:
        return choices
    for node, (found, choice) in choices.items():
        source = found.conv.x
        while source in like:
            source = like[source]
        arrives = choices[source][1].layout if source in choices else layouts.get(source, CONTIGUOUS)
        if choice.form == "native" and arrives == CHANNELS_LAST:
            choices[node] = found, replace(choice, converted=True)
    return choices


def _cut(
    graph: Graph,
    context: Context,
    forms: Mapping[Node, Forms],
    knowledge: Mapping[torch.device, Knowledge],
) -> tuple[dict[Any, str], dict[Node, Node]]:
    """The layout of every value, or nothing where the layouts by rule are as good, or nobody knows; and which value each
    is laid out like.

    Only a graph with all sizes known, on one device, of which both layouts of some convolution are known.
    """
    copy = next(iter(knowledge.values())).copy
    open_ones = [
        f for f in forms.values() if len({x.layout for x in f.every if x.ms is not None and not x.why_not}) > 1
    ]
    symbolic = any(ConvProblem.of(f.conv) is None for f in forms.values())
    if len(knowledge) != 1 or copy is None or not open_ones or symbolic:
        return {}, {}
    problem, like = layout_problem(
        graph,
        forms,
        copy,
        interpreted=context.options.engine == "eager",
        own_norms=_own_norms(context, next(iter(knowledge.values()))),
        weights=context.weights,
        free_outputs=context.free_strides | context.returned_caches,
    )
    layouts = problem.solve()
    usual = default_layout(open_ones[0].conv, Wanted.of(context.options))
    changed = [f for n, f in forms.items() if layouts[n] != f.ruled.layout]
    if not changed:
        return layouts, like
    by_rule = dict.fromkeys(problem.costs, usual) | {n: f.ruled.layout for n, f in forms.items()}
    margin = min(f.figures.margin or MARGINS["measured"] for f in changed)
    return (layouts if problem.cost(layouts) < margin * problem.cost(by_rule) else {}), like


def _own_norms(context: Context, knowledge: Knowledge) -> bool:
    """Whether norms in channels_last become pvae's kernels (fuse_norm_act.py)."""
    fused = any(step.pass_.name == "fuse_norm_act" for step in context.options.pipeline.steps)
    return fused and context.options.norm_act != "off" and knowledge.device.kind in ("cuda", "hip")


def _analyse(graph: Graph, context: Context, report: Report) -> None:
    for node, (forms, choice) in decide(graph, context).items():
        node.meta[KEY] = choice
        line = source_line(node)
        problem = ConvProblem.of(forms.conv)
        text = "sizes are symbolic" if problem is None else str(problem)
        report.decisions.append(Record(choice.form, node.name, line, f"{text}: {choice}"))
        report.counters[choice.form] += 1
        if forms.forced is not None:
            asked = context.options.conv3d
            reason = f"conv3d={asked} cannot be honoured: {forms.forced}; it takes {choice.form}"
            report.refusals.append(Record(asked, node.name, line, reason))


CONV_POLICY = Pass(
    name="conv_policy",
    summary="which form each convolution takes, and in which layout, by measurement or rule; rewrites nothing",
    rules=lambda context, settings: [],
    before=_analyse,
    exact="nothing changes",
)

__all__ = ["CONV_POLICY", "FormChoice", "chosen", "decide", "hand_over"]
