"""The pipeline as text, what it refuses, and that a wrong or failing pass fails the compile by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from pvae.passes import pipeline
from pvae.passes.ir import Builder, aten, output_node
from pvae.passes.pipeline import PASSES, Pipeline, PipelineError, Step, register
from pvae.passes.rule import Match, Pass
from pvae.passes.verify import VerifyError
from pvae.testing import rewrite

steps = st.lists(
    st.sampled_from(PASSES).flatmap(
        lambda p: st.fixed_dictionaries(
            {}, optional={k: st.sampled_from(v.split("|")) for k, v in p.options.items()}
        ).map(lambda settings: Step(p, settings))
    ),
    max_size=8,
)


@given(steps)
def test_prints_and_parses(drawn: list[Step]) -> None:
    whole = Pipeline(tuple(drawn))
    again = Pipeline.parse(str(whole))
    assert str(again) == str(whole)
    assert [(s.pass_.name, dict(s.settings)) for s in again.steps] == [(s.pass_.name, dict(s.settings)) for s in drawn]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("canonicalise", "did you mean 'canonicalize'?"),
        ("fold_pad{x=1}", "has no setting 'x'"),
        ("conv3d_unfold{form}", "not written key=value"),
        ("fold_pad fold_pad", "expected ','"),
    ],
)
def test_what_does_not_parse(text: str, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert says in str(caught.value)


class Planted:
    """Rewrites every relu by `change`."""

    name = "planted"

    def __init__(self, change: Callable[[Graph, Node], None]) -> None:
        self.change = change

    def match(self, node: Node) -> Match | None:
        return Match(node) if node.target is aten.relu.default else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        self.change(graph, match.node)


def wrong_dtype(graph: Graph, node: Node) -> None:
    build = Builder(node)
    build.replace(build(aten.to.dtype, node.args[0], torch.float64))


def wrong_shape(graph: Graph, node: Node) -> None:
    build = Builder(node)
    build.replace(build(aten.unsqueeze.default, node.args[0], 0))


def stale_meta(graph: Graph, node: Node) -> None:
    node.args = (Builder(node)(aten.unsqueeze.default, node.args[0], 0),)


def in_place(graph: Graph, node: Node) -> None:
    build = Builder(node)
    build.replace(build(aten.relu_.default, node.args[0]))


def dropped_output(graph: Graph, node: Node) -> None:
    output_node(graph).args = ((node,),)


def used_before_defined(graph: Graph, node: Node) -> None:
    node.args = (output_node(graph).args[0][1],)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (wrong_dtype, "output 0 was f32"),
        (wrong_shape, "output 0 was f32"),
        (stale_meta, "computes f32[1, 2, 3]"),
        (in_place, "writes in place"),
        (dropped_output, "1 outputs, 2 before"),
    ],
)
def test_the_verifier_names_the_pass(change: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)
    monkeypatch.setattr(pipeline, "BY_NAME", pipeline.BY_NAME)
    register(Pass("planted", "a bug", lambda context, settings: [Planted(change)]))
    with pytest.raises(VerifyError, match="after pass 'planted'") as caught:
        rewrite(lambda x: (x.relu(), x.neg()), torch.randn(2, 3), passes="canonicalize,planted")
    assert says in str(caught.value)


def test_lint_catches_a_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)
    monkeypatch.setattr(pipeline, "BY_NAME", pipeline.BY_NAME)
    register(Pass("planted", "a bug", lambda context, settings: [Planted(used_before_defined)]))
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        rewrite(lambda x: (x.relu(), x.neg()), torch.randn(2, 3), passes="planted")


def test_a_pass_that_raises_fails_the_compile_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)
    monkeypatch.setattr(pipeline, "BY_NAME", pipeline.BY_NAME)

    def fails(graph: Graph, node: Node) -> None:
        raise ZeroDivisionError("a bug")

    register(Pass("planted", "a bug", lambda context, settings: [Planted(fails)]), before="fold_pad")
    with pytest.raises(ZeroDivisionError) as caught:
        rewrite(lambda x: (x.relu(), x.neg()), torch.randn(2, 3), passes="planted")
    assert caught.value.__notes__ == ["in pvae pass 'planted'; PVAE_DISABLE=planted compiles without it"]


def test_register_replaces_by_name_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PASSES", pipeline.PASSES)
    monkeypatch.setattr(pipeline, "BY_NAME", pipeline.BY_NAME)
    mine = Pass("fold_pad", "mine", lambda context, settings: [])
    register(mine)
    assert pipeline.pass_named("fold_pad") is mine
    assert len(pipeline.PASSES) == len(PASSES)
    with pytest.raises(PipelineError, match="no pass 'nowhere'"):
        register(Pass("new", "", lambda context, settings: []), before="nowhere")


def test_ordinals_run_on_through_passes() -> None:
    conv = torch.nn.Conv3d(2, 2, 3)

    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1)), w).clone().relu()

    _, reports = rewrite(
        forward, torch.randn(1, 2, 3, 4, 4), conv.weight, passes="canonicalize,fold_pad{where=any},conv3d_unfold",
        options={"conv3d": "unfold2d"},
    )  # fmt: skip
    assert [m.ordinal for r in reports for m in r.matches] == [1, 2, 3]
    assert all(m.source.startswith("test_pipeline.py:") for r in reports for m in r.matches)
