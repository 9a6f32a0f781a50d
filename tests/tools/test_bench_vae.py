"""The bench of whole autoencoders: its rows and models by name, rows that fail alone, ratios, and the published sizes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from pvae.options import OptionError
from pvae.tools.bench_vae import (
    PUBLISHED,
    Figures,
    LimitError,
    Row,
    left_eager,
    main,
    models_named,
    ratio_interval,
    time_limit,
)
from pvae.tools.model_run import RequestError
from pvae.tools.zoo import load, names

TINY = ("--preset", "tiny", "--device", "cpu", "--dtype", "fp64")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """`main` is a program: it turns gradients off and raises Dynamo's limit for the whole process."""
    limit, gradients = torch._dynamo.config.recompile_limit, torch.is_grad_enabled()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.set_grad_enabled(gradients)


def test_models_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models, three rows held at once; a row that cannot run is said, fails alone, and makes the exit code 1."""
    figures = tmp_path / "figures.json"
    rows = "eager,pvae:engine=eager,pvae:engine=eager:expect=conv3d_unfold=999"
    asked = ["tiny-kl@32x40", "flux2", *TINY, "--rows", rows, "--interleave", "--runs", "3"]
    assert main([*asked, "--error-size", "32x32", "--clock", "process", "--json", str(figures)]) == 1
    written = json.loads(figures.read_text())
    assert (written["dtype"], written["device"], written["clock"]) == ("float64", "cpu", "process")
    found = [Figures(**row) for row in written["rows"]]
    assert [(f.model, f.row.split(":")[0]) for f in found] == [
        (model, row) for model in ("tiny-kl@32x40", "flux2") for row in ("eager", "pvae", "pvae")
    ]
    for eager, ours, failing in (found[:3], found[3:]):
        assert "conv3d_unfold" in failing.failed and failing.ms is None and not failing.times_ms
        assert eager.error == 0 and ours.error is not None and ours.error < 1e-12
        assert len(eager.times_ms) == len(ours.times_ms) == 3 and not (eager.failed or ours.failed)
        assert ours.ms == statistics.median(ours.times_ms)
        assert ours.ratio == pytest.approx(eager.ms / ours.ms) and eager.ratio == 1  # type: ignore[operator]
        assert ours.ratio_minima == pytest.approx(min(eager.times_ms) / min(ours.times_ms))
        assert ours.interval[0] <= ours.ratio <= ours.interval[1]  # type: ignore[index, operator]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "failed:" in lines[2] and "of minima" in lines[1]


def test_one_row_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny-kl", *TINY, "--rows", "eager,pvae", "-o", "engine=eager", "--runs", "1", "--profile"]) == 0
    out = capsys.readouterr().out
    assert "convolution" in out, "the profile"
    assert "minima" not in out, "rows measured at different times have no common rounds"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kl", "--rows", "pvea"], "did you mean pvae?"),
        (["kl", "--rows", "inductor:weights=frozen"], "takes no options"),
        (["kl", "--rows", "pvae:weights=cold"], "weights='cold'"),
        (["kl", "--rows", "eager,eager"], "twice"),
        (["kl", "-o", "conv3d"], "KEY=VALUE"),
        (["kl@big"], "FRAMESxHEIGHTxWIDTH"),
        (["kl", "--runs", "0"], "measures nothing"),
        (["kl", "--device", "cuda", "--clock", "process"], "CPU's time"),
    ],
)
def test_bad_requests(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and says in capsys.readouterr().err


def test_a_model_that_does_not_exist_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wan21", "tiny-kl", *TINY, "--rows", "eager", "--runs", "1"]) == 1
    missing, there = capsys.readouterr().out.splitlines()
    assert "did you mean wan2.1?" in missing and "ms" in there


def test_rows() -> None:
    row = Row.parse("pvae-cudagraphs:weights=frozen:strict=off", {"conv3d": "native"})
    assert row.options == {"strict": "off", "conv3d": "native", "cudagraphs": "on", "weights": "frozen"}
    assert Row.parse("pvae", {}).options == {"strict": "on"}
    assert Row.parse("inductor", {"conv3d": "native"}).options == {}
    with pytest.raises(RequestError):
        Row.parse("eager:engine=eager", {})
    with pytest.raises(OptionError):
        Row.parse("pvae", {"conv3d": "none of these"})


def test_models() -> None:
    assert models_named(["kl@64x64", "qwen-image"], "32x32") == [("kl", (64, 64)), ("qwen-image", (32, 32))]
    assert [name for name, _ in models_named(["all"], "")] == list(names())
    assert ("qwen-image", (2048, 2048)) in models_named(["published"], "")


LATENTS = {  # /docs/measurements.md and what was measured before there was a pvae
    "wan2.1": (1, 16, 21, 60, 104),
    "qwen-image": (1, 16, 1, 128, 128),
    "qwen-image@2048x2048": (1, 16, 1, 256, 256),
    "kl": (1, 16, 128, 128),
    "flux2": (1, 32, 128, 128),
    "dc": (1, 32, 32, 32),
    "hunyuan-video": (1, 16, 5, 45, 80),
    "hunyuan-video-1.5": (1, 32, 5, 30, 52),
    "ltx-video": (1, 128, 7, 15, 22),
    "ltx2-video": (1, 128, 7, 15, 22),
    "cogvideox": (1, 16, 3, 60, 90),
    "mochi": (1, 12, 4, 60, 106),
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_sizes(text: str) -> None:
    ((name, size),) = models_named([text], "")
    assert load(name, preset="full", device="meta", size=size).inputs[0].shape == LATENTS[text]


def test_the_interval_is_of_the_ratio() -> None:
    slow = [2.0, 2.2, 1.8, 2.0, 9.0, 2.1, 1.9]
    fast = [1.0, 1.1, 0.9, 1.0, 1.0, 4.0, 1.0]
    low, high = ratio_interval(slow, fast)
    assert 1.5 < low <= 2.0 <= high < 2.6
    assert ratio_interval(slow, slow) == (1.0, 1.0), "the same rounds are drawn of both"
    assert ratio_interval(slow, fast) == (low, high), "it is not drawn anew"


def test_time_limit() -> None:
    with pytest.raises(LimitError, match="longer than 1 s"), time_limit(1):
        time.sleep(5)
    with time_limit(1):
        pass
    time.sleep(1.2)  # the alarm was taken back
    with time_limit(0):
        pass


def test_what_dynamo_leaves_is_said() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    @torch.compile(backend="eager")
    def whole(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    whole(torch.ones(2))
    assert left_eager() == ""
    broken(torch.ones(2))
    assert left_eager().startswith("1 graph breaks: ")
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
