"""The bench of sharded autoencoders, as a person runs it: torchrun with two gloo ranks, then its rows one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pvae.options import OptionError
from pvae.testing import FLOAT64_BOUND
from pvae.tools.bench_shard import FORMS, Figures, RowError, distvae, row_options, vllm_omni_shard

pytest.importorskip("diffusers")
from pvae.tools.zoo import load


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """A row that does not take the model fails alone; the rows around it are measured, and halo is exact."""
    figures = tmp_path / "figures.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    bench = ["-m", "pvae.tools.bench_shard", "kl", "--rows", "eager,vllm-omni-fused,halo", "--preset", "tiny"]
    asked = ["--device", "cpu", "--dtype", "float64", "--size", "40x56", "--error-size", "40x24", "--runs", "1"]
    engine = ["-o", "engine=eager", "--shard-dims", "w", "--json", str(figures)]
    done = subprocess.run([*torchrun, *bench, *asked, *engine], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert figures.exists(), done.stderr
    found = json.loads(figures.read_text())
    assert (found["model"], found["world"], found["device"], found["dtype"]) == ("kl", 2, "cpu", "float64")
    eager, vllm, halo = found["rows"]
    assert [r["row"] for r in found["rows"]] == ["eager", "vllm-omni-fused", "halo"]
    assert vllm["failed"] == "vLLM-Omni shards the decode of AutoencoderKLWan, not AutoencoderKL decode"
    assert vllm["ms"] is None
    assert eager["ratio"] == 1 and eager["error"] == eager["eager_error"] == 0 and eager["form"] is None
    assert halo["form"] == {"shard": "halo", "shard_dims": "w", "mesh": None}
    assert 0 < halo["error"] <= FLOAT64_BOUND  # group norms sum in another order, so not zero: it was sharded
    for row in (eager, halo):
        assert row["ms"] > 0 and row["first_s"] > 0 and row["peak_gib"] is None and not row["failed"]
    assert halo["ratio"] == pytest.approx(eager["ms"] / halo["ms"])
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["eager", "vllm-omni-fused", "halo"], "only rank 0 prints"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("distvae", "vllm_omni"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RowError, match="pip install distvae"):
        distvae(load("kl"))
    with pytest.raises(RowError, match="pip install vllm vllm-omni"):
        vllm_omni_shard(load("wan2.1"))
    with pytest.raises(RowError, match="not AutoencoderKLWan encode"):
        vllm_omni_shard(load("wan2.1", part="encode"))


def test_the_row_decides_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for row, form in FORMS.items():
        options = row_options(row, {"mesh": "2x2"})
        assert options is not None
        assert (options.shard, options.mesh, options.strict) == (form, (2, 2), "on")
    assert row_options("eager", {}) is None
    monkeypatch.setenv("PVAE_SHARD", "patch")
    with pytest.raises(OptionError, match="PVAE_SHARD=patch"):
        row_options("halo", {})


def test_lines() -> None:
    form = {"shard": "halo", "shard_dims": "h", "mesh": (4,)}
    wanted = "auto 12.50 ms 2.00x peak 1.25 GiB first 3.0 s error 1.00e-02 (eager 2.00e-02) chose shard=halo shard_dims=h mesh=(4,)"
    assert " ".join(str(Figures("auto", 12.5, 2.0, 3.0, 1.25, 1e-2, 2e-2, form)).split()) == wanted
    assert str(Figures("distvae", failed="no")).split() == ["distvae", "failed:", "no"]
