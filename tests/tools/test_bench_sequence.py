"""The bench of sequence sharding, as a person runs it: torchrun with two gloo ranks, then its parts one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pvae.options import OptionError
from pvae.testing import FLOAT64_BOUND
from pvae.tools.bench_ranks import RowError
from pvae.tools.call_profile import profile_call
from pvae.tools.model_run import RequestError

pytest.importorskip("diffusers")
from pvae.tools.bench_sequence import OURS, Bench, Subject, Timed, install, row_options

QWEN = Subject("qwen-image-dit", "tiny", 1, torch.float64, torch.device("cpu"), (6, 10))
ALONE: Any = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """A row that cannot run fails alone; the rows around it are measured in turn, and the tokens are split exactly."""
    figures = tmp_path / "figures.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    rows = "eager,diffusers-cp-compile,pvae"
    bench = ["-m", "pvae.tools.bench_sequence", "qwen-image-dit", "--rows", rows, "--preset", "tiny", "--layers", "1"]
    asked = ["--device", "cpu", "--dtype", "float64", "--error-size", "6x10", "--rounds", "2", "--runs", "1"]
    more = ["-o", "engine=eager", "--profile", "pvae", "--top", "500", "--json", str(figures)]
    done = subprocess.run([*torchrun, *bench, *asked, *more], capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr
    assert figures.exists(), done.stderr
    found = json.loads(figures.read_text())
    assert (found["model"], found["layers"], found["world"], found["dtype"]) == ("qwen-image-dit", 1, 2, "float64")
    eager, diffusers, *ours = found["rows"]
    assert [r["row"] for r in found["rows"]] == rows.split(",")
    assert diffusers["failed"] == "diffusers' context parallelism needs accelerators" and diffusers["ms"] is None
    assert eager["ratio"] == 1 and eager["error"] == eager["eager_error"] == 0
    for row in ours:
        assert not row["failed"] and 0 < row["error"] <= FLOAT64_BOUND  # not zero: it was sharded
        assert row["form"]["graphs"] == 1 and sum(row["form"].values()) >= 3  # for the attention, and the result
        assert row["ratio"] == pytest.approx(eager["ms"] / row["ms"])
    for row in (eager, *ours):
        assert row["ms"] > 0 and row["first_s"] > 0 and row["spread"] >= 0 and row["peak_gib"] is None
    ops = {name for _, _, name in found["profiles"]["pvae"]["kernels"]}
    assert "_c10d_functional::wait_tensor" in ops, "the profiled call moved nothing"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("eager", "diffusers", "pvae"))]
    first = [line.split()[0] for line in lines]
    assert first == [*rows.split(","), "pvae,", *rows.split(",")], "only rank 0 prints: times, the profile, errors"
    assert "_c10d_functional::wait_tensor" in done.stdout


def test_layers_and_sizes() -> None:
    assert len(QWEN.load().model.transformer_blocks) == 1
    case = replace(QWEN, layers=3).load()
    assert len(case.model.transformer_blocks) == 3
    assert case.kwargs["hidden_states"].shape == (2, 15, 8)  # type: ignore[attr-defined]
    mask: Any = case.kwargs["encoder_hidden_states_mask"]
    assert mask.dtype is torch.bool and mask.shape == (2, 5) and mask.all()
    flux = replace(QWEN, model="flux-dit", layers=3).load().model
    assert (len(flux.transformer_blocks), len(flux.single_transformer_blocks)) == (3, 3)
    full = replace(QWEN, preset="full", size=None, device=torch.device("meta")).load()
    assert full.kwargs["hidden_states"].shape[1] == 4096  # type: ignore[attr-defined]
    assert full.kwargs["encoder_hidden_states_mask"].shape == (1, 512)  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="did you mean qwen-image-dit"):
        replace(QWEN, model="qwen-imagedit").load()
    with pytest.raises(RequestError, match=r"takes \(height, width\)"):
        replace(QWEN, size=(3, 6, 10)).load()
    with pytest.raises(RequestError, match="full preset of prx-dit sets no number of layers: {'depth': 1}"):
        replace(QWEN, model="prx-dit", preset="full", layers=2).entry()


def test_the_row_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for row, asked in OURS.items():
        options = row_options(row, {"engine": "eager"})
        assert options is not None and options.strict == "on" and options.engine == "eager"
        assert all(getattr(options, name) == value for name, value in asked.items())
    assert row_options("diffusers-cp", {}) is None
    with pytest.raises(OptionError, match="leave -o regions away"):
        row_options("pvae", {"regions": "blocks"})
    monkeypatch.setenv("PVAE_REGIONS", "blocks")
    with pytest.raises(OptionError, match="PVAE_REGIONS=blocks"):
        row_options("pvae", {})


def test_rows_that_cannot_run_say_why() -> None:
    case = QWEN.load()
    with pytest.raises(RowError, match="needs accelerators"):
        install("diffusers-cp", case, ALONE, {})
    gpu: Any = SimpleNamespace(size=4, device=torch.device("cuda"))
    with pytest.raises(RowError, match="more than one rank"):
        install("diffusers-cp", case, SimpleNamespace(size=1, device=gpu.device), {})  # type: ignore[arg-type]
    with pytest.raises(RowError, match="no context parallel plan for Krea2"):
        install("diffusers-cp-compile", replace(QWEN, model="krea2-dit").load(), gpu, {})


def test_the_slowest_rank_of_each_call_counts() -> None:
    """Times of two ranks, two rounds of two calls: the slowest are 4, 6 and 8, 6 ms."""
    ours = Timed(1.0, 2**30, [[0.004, 0.005], [0.008, 0.002]], {"graphs": 2})
    other = Timed(3.0, 2**31, [[0.001, 0.006], [0.003, 0.006]], {"graphs": 2})
    bench = Bench(SimpleNamespace(rank=1, gather=lambda timed: [timed, other]), QWEN, {})  # type: ignore[arg-type]
    bench.failed["eager"] = "no"
    bench.ready["pvae"] = QWEN.load(), ours
    failed, found = bench.figures(["eager", "pvae"])
    assert failed.failed == "no" and found.ratio is None
    assert (found.ms, found.first_s, found.peak_gib, found.form) == (6.0, 3.0, 2.0, {"graphs": 2})
    assert found.spread == pytest.approx((7.0 - 5.0) / 6.0)


def test_a_profile_counts_what_one_call_does() -> None:
    calls: list[int] = []
    x = torch.randn(64, 64)

    def run() -> None:
        calls.append(1)
        torch.mm(torch.mm(x, x), x)

    found = profile_call(run, torch.device("cpu"))
    assert len(calls) == 3, "Bench.profile has the other ranks call as often"
    assert {name: count for _, count, name in found.kernels}["aten::mm"] == 2
    assert found.host_ms > 0 and found.launches is None
    assert found.lines(1)[1].endswith(found.kernels[0][2]) and len(found.lines(1)) == 2
