"""The command line: what it prints, its JSON, its exit codes, and that every mistake is one line that names the way out."""

import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pvae
from pvae.passes import pipeline
from pvae.passes.conv3d_unfold import UnfoldTime
from pvae.passes.ir import Builder, aten
from pvae.passes.rule import BEYOND_LIMIT
from pvae.tools import cli, doctor
from pvae.tools.model_run import Request, attach_reports, compile_traced, trace_shapes

COMMANDS = ("passes", "run", "explain", "tune", "dump", "diff", "check", "bisect", "doctor", "demo")
SMALL = ("small:video", "--device", "cpu")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `pvae` with arguments, as its entry point does."""

    def call(*arguments: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    return call


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(3, 8, 3)
        self.conv_out = nn.Conv3d(8, 3, (1, 2, 2), (1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
        return self.conv_out(nn.functional.silu(self.conv_in(x)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`small:video`, a model of two convolutions; and one thread."""
    module = types.ModuleType("small")
    module.video = lambda: (Video(), (torch.randn(1, 3, 3, 8, 6),))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small", module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_first_screen_fits_a_terminal(say: Call) -> None:
    said = say("--help")
    assert said.code == 0
    assert len(said.out.splitlines()) <= 40 and all(name in said.out for name in COMMANDS)
    assert say("--version").out.strip() == pvae.__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, say: Call) -> None:
    said = say(command, "--help")
    assert said.code == 0 and "--json" in said.out and len(said.out.splitlines()) <= 50


def test_passes(say: Call) -> None:
    said = say("passes")
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines()[-1] == str(pipeline.Pipeline.default())
    found = say("passes", "--json").json
    assert [p["name"] for p in found["passes"]] == [p.name for p in pipeline.PASSES]
    assert all(set(p) == {"name", "summary", "settings", "chosen", "exact"} for p in found["passes"])
    text = "canonicalize,conv3d_unfold{form=unfold2d}"
    found = say("passes", "--pipeline", f" {text} ", "--json").json
    assert found["pipeline"] == text and found["passes"][1]["chosen"] == {"form": "unfold2d"}


def test_run(say: Call) -> None:
    said = say("run", *SMALL, "--engine", "eager", "--repeat", "1")
    assert said.code == 0
    assert "1 graph compiled by pvae" in said.out and "times as fast as eager on cpu" in said.out
    found = say("run", *SMALL, "--engine", "eager", "--repeat", "1", "-o", "conv3d=unfold2d", "--json").json
    assert found["request"]["options"] == {"conv3d": "unfold2d", "engine": "eager"}
    assert found["speedup"] == found["eager"]["median_s"] / found["pvae"]["median_s"]
    matches = {p["name"]: len(p["matches"]) for p in found["report"]["graphs"][0]["passes"]}
    assert matches["conv3d_unfold"] == 2


def test_explain(say: Call) -> None:
    said = say("explain", *SMALL, "-o", "conv3d=unfold2d")
    assert said.code == 0
    assert said.out.startswith("graph 0: Video,") and "conv3d 2 -> conv3d_unfold 1, linear 1" in said.out
    assert "test_cli.py:" in said.out, "the model's own line"
    assert "left alone: no gain measured on cpu" not in said.out
    every = say("explain", *SMALL, "--all")
    assert "conv_in(x)" in every.out and "left alone: " in every.out
    graph = say("explain", *SMALL, "-o", "conv3d=unfold2d", "--json").json["graphs"][0]
    assert graph["graph"] == 0
    assert graph["convolutions"] == {"captured": {"conv3d": 2}, "final": {"conv3d_unfold": 1, "linear": 1}}
    limited = say("explain", *SMALL, "-o", "rewrite_limit=0", "--json").json["graphs"][0]
    notes = [r["note"] for p in limited["passes"] for r in p["refusals"]]
    assert BEYOND_LIMIT in notes and not any(p["matches"] for p in limited["passes"])


def test_shapes_alone_tell_what_a_run_does() -> None:
    for name in ("small:video", "kl", "cogvideox"):
        request = Request(name, device="cpu", options=pvae.Options(engine="eager"))
        case = request.load()
        real = compile_traced(case, request.options)
        case.run()
        attach_reports(case, real)
        alone = trace_shapes(request)
        assert [[s.text for s in t.stages] for t in alone] == [[s.text for s in t.stages] for t in real]
        for ours, theirs in zip(alone, real, strict=True):
            assert ours.report is not None and theirs.report is not None
            assert [p.matches for p in ours.report.passes] == [p.matches for p in theirs.report.passes]


def test_published_size_needs_no_memory(say: Call) -> None:
    graphs = say("explain", "wan2.1", "--preset", "full", "--device", "cpu", "--json").json["graphs"]
    assert [g["graph"] for g in graphs] == [0, 1, 2]
    assert all(g["convolutions"]["captured"]["conv3d"] >= 31 for g in graphs)


def test_dump(say: Call, tmp_path: Path) -> None:
    said = say("dump", *SMALL, "--after", "captured")
    assert "aten.conv3d(" in said.out and "conv_in_weight" in said.out and "test_cli.py:" in said.out
    assert "conv3d_unfold" in say("dump", *SMALL, "-o", "conv3d=unfold2d").out
    assert "['" in say("dump", *SMALL, "--strides").out
    written = say("dump", *SMALL, "--all", "--out", str(tmp_path / "d"), "-o", "conv3d=unfold2d").out.split()
    assert written[0] == str(tmp_path / "d" / "graph0" / "000_captured.txt")
    texts = [Path(p).read_text() for p in written]
    assert all(a != b for a, b in itertools.pairwise(texts)), "only what changed is written"
    stages = say("dump", *SMALL, "--all", "--json", "-o", "conv3d=unfold2d").json["stages"]
    assert [s["text"] for s in stages] == texts


def test_diff(say: Call) -> None:
    said = say("diff", *SMALL, "-o", "conv3d=unfold2d", "--pass", "conv3d_unfold")
    assert "# graph 0: Video, conv3d_unfold" in said.out
    assert any(line.startswith("-conv3d") for line in said.out.splitlines())
    assert any(line.startswith("+conv3d_unfold") for line in said.out.splitlines())
    assert say("diff", *SMALL, "--pass", "conv_dtype").out == "nothing changed\n"
    changes = say("diff", *SMALL, "-o", "conv3d=unfold2d", "--json").json["changes"]
    assert {c["pass"] for c in changes} <= {p.name for p in pipeline.PASSES} | {"lay_out_outputs"}
    assert all(set(c) == {"graph", "name", "pass", "diff"} for c in changes)


def wrong_unfold(self: Any, graph: Any, match: Any) -> None:
    build = Builder(match.node)
    match.node.replace_input_with(match.facts[0].x, build(aten.mul.Tensor, match.facts[0].x, 1.01))


def test_check(say: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ("--engine", "eager", "--dtypes", "float32,bf16,float64", "--seeds", "0,1")
    said = say("check", *SMALL, *every)
    assert said.code == 0 and "6 right, 0 wrong, 0 skipped (engine eager)" in said.out
    monkeypatch.setattr(UnfoldTime, "rewrite", wrong_unfold)
    said = say("check", *SMALL, *every, "-o", "conv3d=unfold2d")
    assert said.code == 1 and said.out.count("VIOLATED") == 6
    found = say("check", *SMALL, *every, "-o", "conv3d=unfold2d", "--json")
    assert found.code == 1 and found.json["ok"] is False
    first = found.json["results"][0]
    assert set(first) == {"model", "part", "size", "dtype", "seed", "ok", "pvae_error", "eager_error", "bound"}
    assert first["pvae_error"] > first["bound"] > first["eager_error"] > 0


def test_check_sizes_and_what_torch_lacks(say: Call) -> None:
    said = say("check", "cosmos", "--device", "cpu", "--engine", "eager", "--parts", "encode", "--json")
    full, half = said.json["results"]
    assert said.code == 0 and full["ok"] and "avg_pool3d" in half["skipped"]
    said = say("check", "kl", "--engine", "eager", "--sizes", "16x8,8x24", "--dtypes", "float32", "--json")
    assert [(r["part"], r["size"]) for r in said.json["results"]] == [
        ("decode", "16x8"),
        ("decode", "8x24"),
        ("encode", "16x8"),
        ("encode", "8x24"),
    ]


def test_check_says_what_was_raised(say: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, graph: Any, match: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(UnfoldTime, "rewrite", broken)
    said = say("check", *SMALL, "--engine", "eager", "-o", "conv3d=unfold2d", "--dtypes", "float32")
    assert said.code == 1 and "KeyError: 'planted' (in pvae pass 'conv3d_unfold'" in said.out


def test_bisect(say: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    said = say("bisect", *SMALL, "-o", "conv3d=unfold2d")
    assert said.code == 0 and "nothing to bisect: the model is right" in said.out
    monkeypatch.setattr(UnfoldTime, "rewrite", wrong_unfold)
    said = say("bisect", *SMALL, "-o", "conv3d=unfold2d")
    assert said.code == 1
    assert "pass conv3d_unfold, rule unfold2d, node conv3d" in said.out and "conv_in(x)" in said.out
    found = say("bisect", *SMALL, "-o", "conv3d=unfold2d", "--json")
    assert found.code == 1
    assert found.json["kind"] == "rewrite" and found.json["pass"] == "conv3d_unfold" and found.json["graph"] == 0
    assert found.json["rewrite"]["rule"] == "unfold2d" and found.json["before"]["ok"] and not found.json["after"]["ok"]
    assert any("mul" in line for line in found.json["diff"]) and len(found.json["trials"]) > 3
    for left_out, code in ((1, 0), (0, 1)):  # what it says reproduces it
        limit = found.json["rewrite"]["ordinal"] - left_out
        again = ("--passes", found.json["passes"], "-o", f"rewrite_limit={limit}", "-o", "conv3d=unfold2d")
        assert say("check", *SMALL, "--engine", "eager", "--dtypes", "float32", *again).code == code


def test_doctor(say: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = say("doctor", "--json")
    states = {f["name"]: f["state"] for f in found.json["findings"]}
    assert states["self-test"] == states["torch"] == states["backend"] == "ok"
    monkeypatch.setenv("PVAE_CONV3D", "unfold3d")
    said = say("doctor")
    assert said.code == 1 and "valid values of conv3d: auto, native" in said.out
    monkeypatch.setenv("PVAE_CONV3D", "native")
    assert "PVAE_CONV3D=native: wins over the code" in say("doctor").out
    monkeypatch.delenv("PVAE_CONV3D")
    monkeypatch.setattr(doctor, "cpp_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = say("doctor")
    assert said.code == 1 and "Inductor needs one: install g++" in said.out


def test_demo(say: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Result:
        panel: str

    asked: list[Any] = []

    def run_demo(out: Path, device: str, engine: str, console: Any) -> Result:
        asked.append((out, device, engine))
        console.print("progress")
        return Result(str(out / "panel.png"))

    module = types.ModuleType("pvae.tools.demo.run")
    module.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pvae.tools.demo.run", module)
    arguments = ("demo", "--out", str(tmp_path / "o"), "--engine", "eager", "--device", "cpu")
    assert "progress" in say(*arguments).out
    found = say(*arguments, "--json")
    assert found.json == {"panel": str(tmp_path / "o" / "panel.png")} and "progress" in found.err
    assert asked[0] == (tmp_path / "o", "cpu", "eager")


def test_a_factory_where_one_stands(say: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\ndef block():\n    return torch.nn.Conv2d(3, 4, 3), (torch.ones(1, 3, 5, 5),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert say("explain", "my_models:block", "--device", "cpu", "--json").json["graphs"][0]["name"] == "Conv2d"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explain", "wan21"), "did you mean wan2.1?"),
        (("explain", "kl", "--dtype", "bfloat61"), "--dtype 'bfloat61' does not exist; did you mean bfloat16?"),
        (("explain", "kl", "--size", "9x"), "such as 9x64x96"),
        (("explain", "kl", "--size", "33x48"), "multiples of 8"),
        (("explain", "kl", "--part", "decoder"), "did you mean decode?"),
        (("explain", "kl", "--device", "gpu"), "--device 'gpu' does not exist"),
        (("explain", "kl", "-o", "conv3"), "is not written KEY=VALUE"),
        (("explain", "kl", "-o", "conv3=auto"), "did you mean 'conv3d'?"),
        (("explain", "kl", "-o", "conv3d=unfold"), "valid values of conv3d: auto, native, channels_last, unfold2d"),
        (("explain", "kl", "-o", "engine=eager", "--engine", "inductor"), "engine is given twice"),
        (("explain", "kl", "--passes", "fold_pads"), "did you mean 'fold_pad'?"),
        (("explain", "kl", "--disable", "fold"), "The passes are: canonicalize"),
        (("explain", "kl", "--graph", "7"), "--graph 7 does not exist; valid: 0"),
        (("dump", "kl", "--after", "capture"), "did you mean captured?"),
        (("dump", "kl", "--after", "captured", "--all"), "exclude each other"),
        (("diff", "kl", "--pass", "conv_unfold"), "did you mean conv3d_unfold?"),
        (("passes", "--pipeline", "fold_pad{x=1}"), "has no setting 'x'"),
        (("check", "kl", "--seeds", "a"), "not a list of whole numbers"),
        (("check", "kl", "--dtypes", ""), "nothing to check"),
        (("check", "kl", "--engine", "eager", "--parts", "decoded"), "did you mean decode?"),
        (("bisect", "diffusers:AutoencoderKLWam"), "did you mean AutoencoderKLWan?"),
        (("run", "no.such:factory"), "no module 'no'"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], says: str, say: Call) -> None:
    said = say(*arguments)
    assert said.code == 2 and says in said.err and said.err.count("\n") == 1 and said.err.startswith("pvae: ")
    assert "Traceback" not in said.err
    machine = say(*arguments, "--json")
    assert machine.code == 2 and says in machine.json["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_here(say: Call) -> None:
    assert "explain, dump and diff do without one" in say("run", "kl", "--device", "cuda").err


def test_environment_mistakes(say: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVAE_CONV3", "auto")
    said = say("explain", "kl")
    assert said.code == 2 and "did you mean 'PVAE_CONV3D'?" in said.err


def test_unknown_arguments_are_usage_errors(say: Call) -> None:
    for arguments, says in (
        (("explane",), "No such command 'explane'"),
        (("explain",), "Missing argument"),
        (("explain", "kl", "--colour"), "No such option: --colour"),
        (("tune", "kl", "--seconds", "soon"), "--seconds"),
    ):
        assert say(*arguments).code == 2
        machine = say(*arguments, "--json")
        assert machine.code == 2 and says in machine.json["error"]
