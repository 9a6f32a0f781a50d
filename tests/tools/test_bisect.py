"""Bisection finds a planted bug, whatever its kind, down to the rewrite; and says so where nothing is wrong."""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph

import pvae.backend
from pvae.options import Options
from pvae.passes import pipeline
from pvae.passes.conv3d_unfold import UnfoldTime
from pvae.passes.ir import Builder, aten, placeholders
from pvae.passes.rule import Context, Match, Pass, Refusal, Report
from pvae.testing import agreement
from pvae.tools.bisect import Culprit, bisect, first_wrong
from pvae.tools.check import Subject, Trial
from pvae.tools.model_run import Request, trace_shapes

OPTIONS = Options(engine="eager", conv3d="unfold2d")
Rewrite = Callable[[Any, Graph, Match], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`planted:model`: six convolutions, all of which the unfold takes."""

    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Conv3d(4, 4, 3, padding=1), nn.Dropout(), nn.SiLU()]
        return nn.Sequential(*layers), (torch.randn(1, 4, 3, 6, 5),)

    module = types.ModuleType("planted")
    module.model = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted", module)


PLANTED = Request("planted:model", options=OPTIONS, device="cpu")


def find(request: Request = PLANTED, **changed: Any) -> Culprit:
    options = dataclasses.replace(request.options, **changed)
    return bisect(Subject(request.load()), options, lambda what, trial: None)


def without_bias(rewrite: Rewrite, rule: Any, graph: Graph, match: Match) -> None:
    conv, x, widths = match.facts
    rewrite(rule, graph, dataclasses.replace(match, facts=(dataclasses.replace(conv, bias=None), x, widths)))


def without_padding(rewrite: Rewrite, rule: Any, graph: Graph, match: Match) -> None:
    """Of another size than what it replaces: the verifier stops it."""
    conv, x, _ = match.facts
    rewrite(rule, graph, dataclasses.replace(match, facts=(conv, x, [0] * 6)))


def raising(rewrite: Rewrite, rule: Any, graph: Graph, match: Match) -> None:
    raise IndexError("planted")


def not_a_number(rewrite: Rewrite, rule: Any, graph: Graph, match: Match) -> None:
    build = Builder(match.node)
    build.replace(build(aten.full_like.default, match.node.args[0], float("nan")))


def plant(
    monkeypatch: pytest.MonkeyPatch,
    rule: type,
    bug: Callable[[Rewrite, Any, Graph, Match], None],
    where: Callable[[Match], bool],
) -> None:
    rewrite = rule.rewrite  # type: ignore[attr-defined]

    def planted(self: Any, graph: Graph, match: Match) -> None:
        bug(rewrite, self, graph, match) if where(match) else rewrite(self, graph, match)

    monkeypatch.setattr(rule, "rewrite", planted)


def test_nothing_is_wrong() -> None:
    culprit = find()
    assert culprit.kind == "good" and culprit.after.ok


@pytest.mark.parametrize("bug", [without_bias, without_padding, raising, not_a_number])
@pytest.mark.parametrize("index", [0, 3, 5])
def test_the_single_rewrite(bug: Callable[..., None], index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = trace_shapes(PLANTED)[0].report
    assert clean is not None
    expected = next(p for p in clean.passes if p.name == "conv3d_unfold").matches[index]
    plant(monkeypatch, UnfoldTime, bug, lambda match: match.node.name == expected.node)
    culprit = find()
    assert (culprit.kind, culprit.pass_name, culprit.graph) == ("rewrite", "conv3d_unfold", 0)
    assert culprit.record is not None and culprit.before is not None
    assert dataclasses.replace(culprit.record, note="") == dataclasses.replace(expected, note="")
    assert culprit.before.ok and not culprit.after.ok
    if bug is raising:
        assert "IndexError: planted" in culprit.after.error and "conv3d_unfold" in culprit.after.error
    else:  # the dump on both sides, around that node and no other
        assert any(line.startswith("-" + expected.node) for line in culprit.diff)
        assert any(line.startswith("+") for line in culprit.diff)
        assert sum(line.startswith("@@") for line in culprit.diff) <= 2
    if bug is not_a_number:
        assert culprit.after.agreement is not None and culprit.after.agreement.error != culprit.after.agreement.error


def test_in_the_second_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinals run on over a model's graphs, and the same node names stand in each."""
    pytest.importorskip("diffusers")
    options = dataclasses.replace(OPTIONS, passes="canonicalize,conv3d_unfold")
    request = Request("wan2.1", options=options, device="cpu", size=(5, 16, 16))
    clean = trace_shapes(request)[1].report
    assert clean is not None
    expected = [r for r in clean.passes[1].matches if r.rule == "unfold2d"][3]

    def here(match: Match) -> bool:
        takes_caches = any(n.name.startswith("feat_cache") for n in placeholders(match.node.graph))
        return match.node.name == expected.node and takes_caches

    plant(monkeypatch, UnfoldTime, without_bias, here)
    culprit = find(request)
    assert culprit.record is not None
    assert (culprit.kind, culprit.pass_name, culprit.graph) == ("rewrite", "conv3d_unfold", 1)
    assert dataclasses.replace(culprit.record, note="") == dataclasses.replace(expected, note="")
    assert culprit.record.source.startswith("autoencoder_kl_wan.py:")


class NegateSilu:
    """A rule that is wrong wherever it applies."""

    name = "negate"

    def match(self, node: torch.fx.Node) -> Match | Refusal | None:
        return Match(node) if node.target is aten.silu.default else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        build = Builder(match.node)
        negative = build(aten.neg.default, match.node.args[0])
        match.node.replace_input_with(match.node.args[0], negative)


def _negate_first(graph: Graph, context: Context, report: Report) -> None:
    node = next(n for n in graph.nodes if n.target is aten.silu.default)
    NegateSilu().rewrite(graph, Match(node))


RULE_PASS = Pass("planted", "", rules=lambda context, settings: [NegateSilu()])
HOOK_PASS = Pass("planted", "", rules=lambda context, settings: [], after=_negate_first)


@pytest.mark.parametrize(("wrong", "kind"), [(RULE_PASS, "rewrite"), (HOOK_PASS, "pass")])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_wrong_pass(wrong: Pass, kind: str, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BY_NAME", {**pipeline.BY_NAME, "planted": wrong})
    names = ["canonicalize", "fold_pad", "conv3d_unfold"]
    names.insert(position, "planted")
    culprit = find(passes=",".join(names))
    assert (culprit.kind, culprit.pass_name) == (kind, "planted")
    if kind == "rewrite":
        assert culprit.record is not None and culprit.record.node == "silu"


@pytest.mark.parametrize(("engines", "kind"), [(("inductor",), "engine"), (("inductor", "eager"), "capture")])
def test_no_pass_at_all(engines: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(gm: torch.fx.GraphModule, inputs: Any, options: Options, fake_mode: Any) -> Callable[..., Any]:
        run = torch.fx.Interpreter(gm).boxed_run
        return (lambda args: tuple(2 * t for t in run(args))) if options.engine in engines else run

    monkeypatch.setattr(pvae.backend, "_engine", engine)
    pvae.backend.reset()
    assert find(engine=engines[-1]).kind == kind
    pvae.backend.reset()


@given(st.lists(st.booleans(), min_size=0, max_size=40))
def test_first_wrong_is_a_turn_from_right_to_wrong(states: list[bool]) -> None:
    states = [True, *states, False]
    one = torch.ones(1)
    trials = {state: Trial(agreement(one if state else -one, one, one)) for state in (True, False)}
    asked: list[int] = []

    def trial(step: int) -> Trial:
        asked.append(step)
        return trials[states[step]]

    last = len(states) - 1
    found = {0: trials[True], last: trials[False]}
    step = first_wrong(0, last, trial, found)
    assert states[step - 1] and not states[step] and step - 1 in found and step in found
    assert len(asked) <= last.bit_length() and len(set(asked)) == len(asked)
