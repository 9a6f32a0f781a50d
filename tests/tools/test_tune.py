"""`pvae tune`: every form is the convolution that it stands for, wrong or failing configs are dropped and said, and what is
stored is what `pvae explain` and a compile go by."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pvae
from pvae.kernels import conv_taps
from pvae.kernels.conv_taps_config import Config
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.tuning_store import read
from pvae.tools import cli, conv_trial, tune
from pvae.tools.conv_trial import Bench, try_forms
from pvae.tools.model_run import Request

CPU = torch.device("cpu")
SMALL = ("small:video", "--device", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`small:video`: three convolutions, two of them alike."""

    def video() -> Any:
        convs = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        return nn.Sequential(*convs, nn.Conv3d(8, 3, 1)), (torch.randn(1, 4, 3, 8, 8),)

    module = types.ModuleType("small")
    module.video = video  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small", module)
    monkeypatch.setattr(conv_trial, "median_ms", counted())
    monkeypatch.setattr(tune, "copy_rate", lambda device: 1e10)


def counted() -> Callable[..., float]:
    """A clock by which every measurement takes a millisecond more than the one before."""
    calls: list[int] = []

    def median_ms(run: Any, inputs: Iterator[torch.Tensor], device: torch.device, seconds: float) -> float:
        calls.append(1)
        run(next(inputs))
        return float(len(calls))

    return median_ms


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    found = capsys.readouterr()
    return int(left.value.code or 0), found.out, found.err


# --- the forms ---------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    ndim = draw(st.integers(2, 3))

    def each(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(values) for _ in range(ndim))

    kernel, groups = each(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2]))
    small = st.integers(0, 2)
    before = draw(st.integers(0, 2)) if ndim == 3 else 0
    return ConvProblem(
        draw(st.sampled_from(["float32", "bfloat16", "float64"])),
        draw(st.integers(1, 2)) if not before else 1,
        groups * draw(st.integers(1, 4)),
        each(st.integers(5, 8)),
        groups * draw(st.integers(1, 4)),
        kernel,
        each(st.integers(1, 2)),
        each(st.tuples(small, small)),
        each(st.integers(1, 2)),
        groups,
        before,
    )


@given(problems())
def test_property_every_form_is_the_convolution(problem: ConvProblem) -> None:
    bench = Bench(problem, CPU)
    forms = [bench.native(), bench.channels_last()]
    if problem.ndim == 3:
        forms.append(bench.unfold2d())
    if problem.groups == 1:
        forms.append(bench.taps([]))
    for x, run in forms:
        y = run(x)
        assert tuple(y.shape[2:]) == problem.out_sizes
        assert bench.error(y) <= 2 * bench.allowed


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("1x4x5x8x6 > 6 kernel 2x4x2 stride 2x4x2", "linear"),
        ("2x4x3x8x6 > 6 kernel 1x1x1", "linear"),
        ("2x4x3x8x6 > 6 kernel 1x1x1 groups 2", "linear"),
        ("2x4x8x6 > 6 kernel 1x1 groups 2", "linear"),
        ("2x4x3x8x6 > 6 kernel 1x3x3 padding 0.0x1.1x1.1", "frames"),
        ("2x4x4x8x6 > 6 kernel 1x3x3 padding 0.0x0.1x1.1 stride 2x1x2 groups 2", "frames"),
    ],
)
def test_linear_and_frames(text: str, form: str) -> None:
    bench = Bench(ConvProblem.parse(f"float32 {text}"), CPU)
    x, run = getattr(bench, form)()
    assert bench.error(run(x)) <= bench.allowed and run(x).shape == bench.reference.shape


def test_timing_changes_the_input_and_takes_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    problem = ConvProblem.parse("float32 1x4x8x8 > 4 kernel 3x3")
    bench, seen = Bench(problem, CPU, seconds=0.001), set[int]()
    x, run = bench.native()

    def watched(y: torch.Tensor) -> torch.Tensor:
        seen.add(y.data_ptr())
        return run(y)

    assert 0 < bench.time(x, watched) < 1e3 and len(seen) > 4
    assert conv_trial.copy_rate(CPU) > 1e6


# --- configs of conv_taps ----------------------------------------------------------------------------------------------

PROBLEM = ConvProblem.parse("float32 1x16x8x8 > 16 kernel 3x3 padding 1.1x1.1")
CONFIGS = [Config(h, 16, 64, 0, depth, warps, 3) for h in (8, 16) for depth in (16, 32) for warps in (4, 8)]


def with_configs(monkeypatch: pytest.MonkeyPatch, times: Callable[[Config], float | str]) -> list[Config]:
    """conv_taps with the eight CONFIGS, each taking its time, or raising or erring as it says; what is tried is returned."""
    tried: list[Config] = []

    def op(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        config = Config(*rest[-1])
        tried.append(config)
        if times(config) == "raises":
            raise RuntimeError("out of resources\nmore")
        y = conv_taps.reference(x, *rest[:-1])
        return y * 1.01 if times(config) == "wrong" else y

    monkeypatch.setattr(conv_trial, "conv_taps", types.SimpleNamespace(OP=op))
    monkeypatch.setattr(conv_trial, "candidate_configs", lambda *_: iter(CONFIGS))
    monkeypatch.setattr(conv_trial, "median_ms", lambda *_: float(times(tried[-1])))
    return tried


def test_configs_are_searched_from_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Config(16, 16, 64, 0, 32, 8, 3)
    tried = with_configs(monkeypatch, lambda c: 1.0 + (c.height != 16) + (c.depth != 32) + (c.warps != 8))
    found = try_forms(PROBLEM, ["taps"], {}, CPU)
    assert found.forms["taps"].config == tuple(best.numbers()) and found.forms["taps"].ms == 1.0
    own = CONFIGS[0].numbers()
    assert tried[0] == CONFIGS[0] and not found.dropped
    tried.clear()
    assert try_forms(PROBLEM, ["taps"], {}, CPU, configs=1).forms["taps"].config == tuple(own)
    assert set(tried) == {CONFIGS[0]}
    assert try_forms(PROBLEM, ["taps"], {}, CPU, configs=3).forms["taps"].ms == 3.0 and len(set(tried)) == 3


def test_wrong_and_failing_configs_are_dropped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(c: Config) -> float | str:
        return "wrong" if c.depth == 32 else "raises" if c.warps == 8 else 3.0 - c.height / 16

    with_configs(monkeypatch, times)
    found = try_forms(PROBLEM, ["native", "taps"], {"unfold2d": "two dimensions"}, CPU)
    assert found.forms["taps"].config == (16, 16, 64, 0, 16, 4, 3)
    assert found.forms["unfold2d"].why_not == "two dimensions" and list(found.forms)[-1] == "unfold2d"
    reasons = dict(found.dropped)
    assert reasons["taps [8, 16, 64, 0, 16, 8, 3]"] == "RuntimeError: out of resources"
    assert reasons["taps [8, 16, 64, 0, 32, 4, 3]"].startswith("wrong: error 1.0e-02, allowed ")


@pytest.mark.parametrize(("outcome", "says"), [("wrong", "wrong: error"), ("raises", "RuntimeError: out of resources")])
def test_no_config_is_right(monkeypatch: pytest.MonkeyPatch, outcome: str, says: str) -> None:
    tried = with_configs(monkeypatch, lambda c: outcome)
    found = try_forms(PROBLEM, ["taps"], {}, CPU)
    assert found.forms["taps"].ms is None and (found.forms["taps"].why_not or "").startswith(says)
    assert set(tried) == set(CONFIGS) and len(found.dropped) == len(CONFIGS)


def test_the_kernels_own_fails_and_another_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_configs(monkeypatch, lambda c: 1.0 if c == CONFIGS[-1] else "raises")
    assert try_forms(PROBLEM, ["taps"], {}, CPU).forms["taps"].config == tuple(CONFIGS[-1].numbers())


# --- a model -----------------------------------------------------------------------------------------------------------


def test_distinct_convolutions_of_every_graph_by_arithmetic() -> None:
    options = pvae.Options(conv3d="unfold2d", tuning_store="off")
    found = tune.sites(Request("small:video", device="cpu", options=options))
    assert [(str(s.problem), s.count) for s in found] == [
        ("float32 1x8x3x8x8 > 8 kernel 3x3x3 padding 1.1x1.1x1.1", 2),
        ("float32 1x4x3x8x8 > 8 kernel 3x3x3 padding 1.1x1.1x1.1", 1),
        ("float32 1x8x3x8x8 > 3 kernel 1x1x1", 1),
    ]
    assert found[0].forms == ("native", "channels_last", "unfold2d") and set(found[0].why_not) == {"taps"}
    assert found[2].forms == ("linear",)


class Chunked(nn.Module):
    """A decoder that is called with one frame, and then with two."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decoder(x[:, :, :1]), self.decoder(x[:, :, 1:])], 2)


def test_every_kind_of_chunk_is_found() -> None:
    sys.modules["small"].video = lambda: (Chunked(), (torch.randn(1, 4, 3, 8, 8),))  # type: ignore[attr-defined]
    found = tune.sites(Request("small:video", device="cpu", options=pvae.Options(disable=("drop_zero_taps",))))
    assert [s.problem.sizes for s in found] == [(2, 8, 8), (1, 8, 8)]


def test_tune_and_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    store = ("-o", f"tuning_store={path}")
    code, out, err = say(capsys, "tune", *SMALL, *store)
    assert code == 0 and "3 convolutions, 0 of them known" in err
    assert "2 x float32 1x8x3x8x8 > 8 kernel 3x3x3" in out
    assert "native 1 ms, channels_last 2 ms, unfold2d 3 ms" in out and "taps not: Triton does not run on cpu" in out
    (table,) = read(path).values()
    assert len(table.convolutions) == 3 and table.copy == 1e10

    code, out, _ = say(capsys, "tune", *SMALL, *store, "--json")
    assert code == 0 and [c["known"] for c in json.loads(out)["convolutions"]] == [True] * 3
    found = json.loads(say(capsys, "tune", *SMALL, *store, "--json", "--again")[1])
    assert found["store"] == str(path) and found["left"] == 0
    first = found["convolutions"][0]
    assert set(first) == {"convolution", "sites", "known", "forms", "dropped"} and first["sites"] == 2
    assert set(first["forms"]) == {"native", "channels_last", "unfold2d", "taps"}

    out = say(capsys, "explain", *SMALL, *store)[1]
    assert "native 8 ms in contiguous (measured here)" in out and "unfold2d 10 ms" in out
    (graph,) = json.loads(say(capsys, "explain", *SMALL, *store, "--json")[1])["graphs"]
    (policy,) = [p for p in graph["passes"] if p["name"] == "conv_policy"]
    assert [d["rule"] for d in policy["decisions"]] == ["native", "native", "native", "linear"]
    assert "(measured here)" not in say(capsys, "explain", *SMALL, "-o", "tuning_store=off")[1]


def test_what_is_measured_decides_a_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways; and the result is right either way."""
    path, model, x = tmp_path / "tuning.json", nn.Conv3d(4, 8, 3, padding=1), torch.randn(1, 4, 3, 8, 8)
    sys.modules["small"].video = lambda: (copy.deepcopy(model), (x,))  # type: ignore[attr-defined]
    for slow, unfolds in (("unfold2d", 0), ("native", 1)):
        request = Request("small:video", device="cpu", options=pvae.Options(tuning_store=str(path)))

        def attempt(bench: Bench, trial: Any, what: str, prepare: Any, slow: str = slow) -> Any:
            return conv_trial.Measured(9.0 if what == slow else 1.0)

        monkeypatch.setattr(conv_trial, "_attempt", attempt)
        assert all(found.trial is not None for found in tune.tune(request, again=True, seconds=60))
        with torch.no_grad():
            expected = model(x)
            compiled = pvae.compile(model, engine="eager", tuning_store=path)
            torch.testing.assert_close(compiled(x), expected)
        (graph,) = [f.programs[0].report for f in pvae.module.compiled_forwards(model)]
        assert graph.matches("conv3d_unfold") == unfolds
        pvae.module.restore(model)


def test_it_can_be_cut_short_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = ("-o", f"tuning_store={tmp_path / 'tuning.json'}")
    code, out, _ = say(capsys, "tune", *SMALL, *store, "--seconds", "0")
    assert code == 0 and "3 convolutions left after 0 seconds" in out
    request = Request("small:video", device="cpu", options=pvae.Options(tuning_store=str(tmp_path / "tuning.json")))
    next(tune.tune(request, again=False, seconds=60))
    found = json.loads(say(capsys, "tune", *SMALL, *store, "--json")[1])
    assert [c["known"] for c in found["convolutions"]] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "tuning_store=off"), "leaves nowhere to keep the times"),
        (("--passes", "canonicalize"), "the pipeline has no pass conv_policy"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    store = () if "off" in arguments[-1] else ("-o", f"tuning_store={tmp_path / 't.json'}")
    code, _, err = say(capsys, "tune", *SMALL, *store, *arguments)
    assert code == 2 and says in err


def test_a_damaged_store_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text("{")
    for command in ("tune", "explain"):
        code, _, err = say(capsys, command, *SMALL, "-o", f"tuning_store={path}")
        assert code == 2 and str(path) in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_here(tmp_path: Path) -> None:
    request = replace(
        Request("small:video"), device="cuda", options=pvae.Options(tuning_store=str(tmp_path / "t.json"))
    )
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        list(tune.tune(request, again=False, seconds=1))
