"""The bench of autoencoders' kernels: every row is complete, its forms compute the same, and a wrong one fails the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvae.kernels import wide_attention
from pvae.tools.bench_vae_ops import ATTENTIONS, KINDS, NORMS, UPSAMPLES, Row, main

TINY = ["--tiny", "--device", "cpu", "--rounds", "1"]


def _rows(file: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(file.read_text())["rows"]]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rows_are_complete_and_right(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main([*TINY, "--dtype", dtype, "--json", str(file)]) == 0
    rows, out = _rows(file), capsys.readouterr().out
    assert [row.case.split()[0] for row in rows if row.kind == "norms"] == list(NORMS)
    assert {row.kind for row in rows} == set(KINDS)
    eps = torch.finfo(torch.bfloat16 if dtype == "bf16" else torch.float16).eps
    for row in rows:
        assert tuple(row.ms) == KINDS[row.kind].forms and not row.failure
        assert all(math.isfinite(t) and t > 0 for t in (*row.ms.values(), row.rate, row.error, row.eager_error))
        assert row.error <= max(1.25 * row.eager_error, eps) and row.eager_error < 2 * eps
        assert str(row) in out


def test_full_shapes_are_listed_once() -> None:
    shapes = sum(len(texts.split()) for *_, texts in NORMS.values())
    for kind, count in {"norms": shapes, "upsample": len(UPSAMPLES), "attention": len(ATTENTIONS)}.items():
        names = [name for name, _ in KINDS[kind].cases(False)]
        assert len(set(names)) == len(names) == count > 0


def test_what_is_counted() -> None:
    """Bytes and operations of the tiny shapes, by hand."""

    def work(kind: str) -> dict[str, int]:
        built = KINDS[kind].cases(True)
        return {name.split()[0]: build(torch.bfloat16, torch.device("cpu")).work for name, build in built}

    norms = work("norms")
    assert norms["wan"] == 2 * 64 * 4 * 6 * 8 * 2
    assert norms["flux"] == 2 * 64 * 6 * 8 * 3
    assert norms["hunyuan"] == 2 * 64 * (17 * 6 * 8 * 2 + 19 * 8 * 10)
    assert norms["cogvideox"] == 2 * 64 * (9 * 6 * 8 * 4 + 11 * 6 * 8)
    assert norms["ltx2"] == 2 * 64 * (49 * 6 * 8 + 51 * 8 * 10)
    assert work("upsample")["32-16"] == 2 * 32 * 16 * 4 * (16 * 20)
    assert work("attention")["1x2x96x320"] == 2 * 2 * (2 * 96 * 96 * 320)


def _raises(*_: object) -> Tensor:
    raise RuntimeError("out of memory, say")


@pytest.mark.parametrize(
    ("op", "said"),
    [(lambda q, k, v, scale: 1.1 * wide_attention.reference(q, k, v, scale), "beyond the bound"), (_raises, "say")],
)
def test_a_row_that_fails(
    op: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wide_attention, "OP", op)
    file = tmp_path / "rows.json"
    assert main([*TINY, "--kinds", "attention,upsample", "--json", str(file)]) == 1
    first, *others = _rows(file)
    assert said in first.failure and first.failure in capsys.readouterr().out
    assert others and all(row.ms and not row.failure for row in others), "the rows behind it are measured"


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (["--kinds", "norm"], "no kind norm; they are norms"), (["--rounds", "0"], "measures nothing"):
        with pytest.raises(SystemExit) as stop:
            main([*TINY, *wrong])
        assert stop.value.code == 2 and said in capsys.readouterr().err
