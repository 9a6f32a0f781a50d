"""The pipeline: it prints and parses, names what is wrong, numbers rewrites, and a failing pass fails the compile."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import pvae
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pvae.passes import pipeline
from pvae.passes.ir import Builder, aten
from pvae.passes.pipeline import BY_NAME, PASSES, Pipeline, PipelineError, Step, register, run_pipeline
from pvae.passes.rule import BEYOND_LIMIT, Context, Match, Pass, Refusal, RewriteCounter
from pvae.testing import capture, rewrite, structure
from torch import nn

X, W = torch.randn(1, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    pass_ = draw(st.sampled_from(PASSES))
    chosen = draw(st.lists(st.sampled_from(sorted(pass_.options)), unique=True)) if pass_.options else []
    return Step(pass_, {key: draw(st.sampled_from(pass_.options[key].split("|"))) for key in chosen})


@given(st.lists(steps()))
def test_prints_and_parses(found: list[Step]) -> None:
    written = Pipeline(tuple(found))
    assert Pipeline.parse(str(written)) == written
    assert str(Pipeline.parse(f" {written} ")) == str(written)


def test_default_and_without() -> None:
    names = [p.name for p in PASSES]
    assert names == ["canonicalize", "drop_zero_taps", "fold_pad", "conv_dtype", "conv3d_unfold", "channels_last"]
    assert str(Pipeline.default()) == ",".join(names)
    assert str(Pipeline.default(without=["fold_pad"])) == str(Pipeline.default().without(["fold_pad"]))
    assert "fold_pad" not in str(Pipeline.default().without(["fold_pad"]))
    assert Pipeline.parse("").steps == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("canonicalise", r"no pass 'canonicalise'; did you mean 'canonicalize'\? The passes are: canonicalize, drop_zero"),
        ("xyz", r"no pass 'xyz'\. The passes are: canonicalize"),
        ("fold_pad{by=2}", "pass 'fold_pad' has no setting 'by'; it has: none"),
        ("conv3d_unfold{shape=2}", r"no setting 'shape'; it has: form=auto\|native"),
        ("conv3d_unfold{form=3d}", r"conv3d_unfold\{form=3d\}: the values of form are auto\|native"),
        ("conv3d_unfold{form}", "setting 'form' of pass 'conv3d_unfold' is not written key=value"),
        ("fold_pad;canonicalize", "expected ',' in the pipeline at ';canonicalize'"),
        ("fold_pad,{}", r"cannot read the pipeline at '\{\}'"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(PipelineError, match=says):
        Pipeline.parse(text)
    with pytest.raises(PipelineError, match=says):
        pvae.compile(nn.Identity(), passes=text)


def test_without_checks_its_names() -> None:
    for attempt in (lambda: Pipeline.default(["foldpad"]), lambda: Pipeline.default().without(["foldpad"])):
        with pytest.raises(PipelineError, match="did you mean 'fold_pad'"):
            attempt()


# --- ordinals and the limit ------------------------------------------------------------------------------------------


def before(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w)
    return F.conv3d(F.pad(y.clone(), (1, 1, 1, 1, 2, 0)), w[:, :, :1].repeat(1, 2, 1, 1, 1)[:, :6]).relu()


def test_ordinals_count_over_all_passes() -> None:
    _, reports = rewrite(before, X, W, passes="canonicalize,fold_pad,conv3d_unfold{form=unfold2d}")
    ordinals = [record.ordinal for report in reports for record in report.matches]
    assert ordinals == list(range(1, len(ordinals) + 1)) and len(ordinals) >= 4


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limit_stops_after_so_many(limit: int) -> None:
    passes = "canonicalize,fold_pad,conv3d_unfold{form=unfold2d}"
    _, reports = rewrite(before, X, W, passes=passes, options={"rewrite_limit": limit})
    _, unlimited = rewrite(before, X, W, passes=passes)
    matches = [m for r in reports for m in r.matches]
    assert matches == [m for r in unlimited for m in r.matches][:limit]
    assert any(r.note == BEYOND_LIMIT for report in reports for r in report.refusals)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (1,) * 6))


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile"])
def test_reports_name_the_models_line(entry: str) -> None:
    model = Toy()
    with torch.no_grad():
        if entry == "pvae.compile":
            pvae.compile(model, engine="eager")(X)
        else:
            torch.compile(model, backend="pvae", options={"engine": "eager"})(X)
    (report,) = [p for p in pvae.report(model).graphs[0].passes if p.name == "fold_pad"]
    source = report.matches[0].source
    assert source.startswith("test_pipeline.py:") and source.endswith("return self.conv(F.pad(x, (1,) * 6))")


def test_observer_sees_the_graph_before_and_after_each_pass() -> None:
    gm = capture(before, X, W).gm
    seen: list[tuple[str, int]] = []
    context = Context(pvae.Options(), counter=RewriteCounter())
    pipe = Pipeline.parse("canonicalize,conv3d_unfold{form=unfold2d}")
    run_pipeline(gm, pipe, context, observe=lambda name, g: seen.append((name, len(structure(g)))))
    assert [name for name, _ in seen] == ["captured", "canonicalize", "conv3d_unfold", "lay_out_outputs"]
    assert seen[0][1] > seen[1][1]


# --- passes of one's own ---------------------------------------------------------------------------------------------


class Silence:
    """relu(x) -> silu(x), or an error."""

    name = "silence"

    def __init__(self, error: bool = False) -> None:
        self.error = error

    def match(self, node: Any) -> Match | Refusal | None:
        if node.target is not aten.relu.default:
            return None
        return Match(node)

    def rewrite(self, graph: Any, match: Match) -> None:
        if self.error:
            raise RuntimeError("something broke")
        build = Builder(match.node)
        build.replace(build(aten.silu.default, match.node.args[0]))


@pytest.fixture
def own_passes() -> Iterator[None]:
    saved = pipeline.PASSES, pipeline.BY_NAME
    yield
    pipeline.PASSES, pipeline.BY_NAME = saved


def test_register(own_passes: None) -> None:
    register(Pass("silence", "relu to silu", lambda context, settings: [Silence()]), before="fold_pad")
    assert [s.pass_.name for s in Pipeline.default().steps][1:4] == ["drop_zero_taps", "silence", "fold_pad"]
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    with torch.no_grad():
        expected = F.silu(model[0](X[:, :, 0]))
        assert torch.equal(pvae.compile(model, engine="eager")(X[:, :, 0]), expected)
        without = pvae.compile(model, engine="eager", disable="silence")
        assert torch.equal(without(X[:, :, 0]), model[0](X[:, :, 0]).relu())
    with pytest.raises(PipelineError, match="no pass 'nothing'"):
        register(Pass("other", "", lambda context, settings: []), before="nothing")
    assert "other" not in pipeline.BY_NAME
    register(Pass("silence", "nothing now", lambda context, settings: []))
    assert [p.name for p in pipeline.PASSES].count("silence") == 1


@pytest.mark.parametrize("entry", ["pvae.compile", "torch.compile"])
def test_a_pass_that_raises_fails_the_compile_by_name(own_passes: None, entry: str) -> None:
    register(Pass("silence", "breaks", lambda context, settings: [Silence(error=True)]))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    options: dict[str, Any] = {"engine": "eager"}

    def attempt() -> None:
        with torch.no_grad():
            if entry == "pvae.compile":
                pvae.compile(model, **options)(X[:, :, 0])
            else:
                torch.compile(model, backend="pvae", options=options)(X[:, :, 0])

    with pytest.raises(Exception, match="something broke") as caught:
        attempt()
    text = "".join(traceback.format_exception(caught.value))
    assert "in pvae pass 'silence'; PVAE_DISABLE=silence compiles without it" in text
    options["disable"] = "silence"
    torch._dynamo.reset()
    attempt()


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(PASSES)
