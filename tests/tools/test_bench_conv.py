"""The convolution bench: its forms compute the same convolution, its shapes are those of the zoo, its ratios what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pvae.kernels import conv_taps
from pvae.options import parse_options
from pvae.passes.compute_device import ComputeDevice
from pvae.passes.tuning_store import read
from pvae.tools.bench_conv import Problem, Row, configs, main, native_forms, summary, taps_form, unfold_forms
from pvae.tools.conv_shapes import MEASURED, MODELS, Shape, collect, shapes_named, shares
from pvae.tools.conv_table import figures, problem_of
from pvae.tools.model_run import Request, RequestError

KINDS = {
    "16-24:3x3x3:2x8x12": {"contiguous", "channels_last", "contiguous padded", "channels_last padded"},
    "8-3:3x3:9x7": {"contiguous", "channels_last", "contiguous padded", "channels_last padded"},
    "16-16:3x3:6x6:s2x2:n2": {"contiguous padded", "channels_last padded"},
    "16-32:3x1x1:2x4x4:s2x1x1": {"contiguous padded", "channels_last padded"},
    "16-8:1x3x3:3x6x5": {
        "contiguous",
        "channels_last",
        "contiguous padded",
        "channels_last padded",
        "frames padded",
    },
    "16-8:1x1:6x5": {"contiguous padded", "channels_last padded"},
    "5-7:2x4x5:3x55x50": {"contiguous padded", "channels_last padded"},
}


@pytest.mark.parametrize("text", KINDS)
def test_every_form_is_the_same_convolution(text: str) -> None:
    """In float64 all agree, in corners that touch every border; a result moved by one pixel does not."""
    shape = Shape.parse(text)
    problem = Problem.of(shape, torch.float64, torch.device("cpu"))
    exact = problem.exact()
    native = dict(native_forms(problem))
    assert native.keys() == KINDS[text]
    unfold = dict(unfold_forms(problem))
    assert bool(unfold) == (len(shape.kernel) == 3 and shape.kernel[0] > 1)
    for form in (*native.values(), *unfold.values()):
        result = form()
        assert result.shape == (shape.batch, shape.out_channels, *shape.size)
        assert problem.error(result, exact, bias=False) < 1e-13
    ours = taps_form(problem)([])
    assert problem.error(ours, exact, bias=True) < 1e-13
    assert problem.error(ours, exact, bias=False) > 0.1
    assert problem.error(ours.roll(1, -1), exact, bias=True) > 0.1


def test_zeros_are_around_the_picture_and_frames_in_front() -> None:
    problem = Problem.of(Shape.parse("2-2:3x3x3:4x5x6"), torch.float32, torch.device("cpu"))
    assert problem.padded.shape == (1, 2, 6, 7, 8) and problem.inner.shape == (1, 2, 6, 5, 6)
    assert problem.inner.count_nonzero() == problem.padded.count_nonzero() == problem.inner.numel()
    assert problem.shape.cached_frames() == 2 and problem.widths() == [0, 0, 1, 1, 1, 1]
    assert problem.shape.flop == 2 * 27 * 2 * 2 * 4 * 5 * 6
    down = Shape.parse("2-2:3x3:5x6:s2x2")
    assert down.borders() == [(0, 1), (0, 1)]


def test_shapes_are_written_as_they_are_read() -> None:
    every = shapes_named("all")
    assert len(MEASURED) == 7 and len(every) >= 27
    assert set(shapes_named("measured")) == set(MEASURED) <= set(every)
    for shape in (*every, *map(Shape.parse, KINDS)):
        assert Shape.parse(str(shape)) == shape
    for wrong in ("96", "96-96:3x3", "a-b:3x3:4x4", "96-96:3x3:4x4x4", "96-96:3x3:4x4:q1", "96-96:3x0:4x4", "1-1:3:4"):
        with pytest.raises(RequestError, match="--shapes"):
            Shape.parse(wrong)


@pytest.mark.parametrize("name", ["kl", "kl encode", "dc", "ltx2-video", "mochi", "cosmos", "qwen-image"])
def test_the_shapes_are_the_zoos(name: str) -> None:
    pytest.importorskip("diffusers")
    model, _, part = name.partition(" ")
    found = collect(Request(model, part or "decode", "full", torch.bfloat16, "meta"))
    have = {str(s) for s in found}
    if name == "qwen-image":  # one frame: two of three taps multiply zeros, and what is left is 2-D
        have = {text.replace("3x3x3:1x", "3x3:") for text in have}
    assert {str(s) for s in MODELS[name]} <= have
    whole = list(shares(found))
    assert sum(share for share, *_ in whole) == pytest.approx(1)
    assert whole[0][0] == max(share for share, *_ in whole) and whole[0][1] == found[whole[0][2]]


def test_there_are_configs_to_try() -> None:
    for shape in shapes_named("all"):
        found = list(configs(shape, torch.bfloat16))
        assert found and all(conv_taps.Config.of(c.numbers()) == c for c in found)


def _row(shape: str, native: float, taps: float, tuned: float | None = None) -> Row:
    ms = {"native contiguous": native, "taps": taps} | ({} if tuned is None else {"tuned": tuned})
    return Row(shape, 1.0, ms, "native contiguous", "", {"native": 1e-3, "taps": 1e-3}, 800.0)


def test_ratios() -> None:
    slow, fast = _row("8-8:3x3:4x4", 2.0, 4.0), _row(str(MEASURED[3]), 4.0, 2.0, 1.0)
    assert (slow.ratio, fast.ratio) == (0.5, 4.0)
    assert fast.rate("taps") == 500 and fast.share == pytest.approx(1000 / 800)
    lines = summary({Shape.parse(row.shape): row for row in (slow, fast)})
    assert lines[0].startswith("shapes of measurements.md: 4.000x native in the geometric mean of 1, slower in 0")
    assert lines[2].startswith("all: 1.414x native in the geometric mean of 2, slower in 1")
    assert "C = 96: 125 % of the matrix rate" in lines[3]


@pytest.fixture
def tf32_restored() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32_restored")
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, figures = list(KINDS)[:3], tmp_path / "figures.json"
    asked = ["--shapes", ",".join(shapes), "--dtype", "fp32", "--device", "cpu", "--rounds", "2", "--matrix", "32"]
    assert main([*asked, "--json", str(figures)]) == 0
    rows = [Row(**row) for row in json.loads(figures.read_text())["rows"]]
    assert [row.shape for row in rows] == shapes
    for row in rows:
        assert row.ms[row.native] == min(ms for name, ms in row.ms.items() if name.startswith("native"))
        assert 0 < row.error["taps"] < 1e-6 and 0 < row.error["native"] < 1e-6 and row.matrix_tflops > 0
        assert bool(row.unfold) == (row.shape == shapes[0])
        if not conv_taps_runs():
            assert "not the kernel" in row.note
    out = capsys.readouterr().out
    assert all(shape in out for shape in shapes) and "geometric mean of 3" in out


def conv_taps_runs() -> bool:
    """Whether the kernel itself runs here, interpreted."""
    x = torch.zeros(1, 16, 4, 4)
    return conv_taps.refusal(x, torch.zeros(16, 16, 3, 3)) is None


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--shapes", "96-96:3", "--device", "cpu"])
    assert exit.value.code == 2 and "96-96:3x3x3:4x480x832" in capsys.readouterr().err


# --- the tuning store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inner", "padded"),
    [
        (
            "96-96:3x3x3:4x480x832",
            "bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 padding 0.0x1.1x1.1 before 2",
            "bfloat16 1x96x4x482x834 > 96 kernel 3x3x3 before 2",
        ),
        (
            "96-96:3x3:240x416:s2x2:n4",
            "bfloat16 4x96x480x832 > 96 kernel 3x3 padding 0.1x0.1 stride 2x2",
            "bfloat16 4x96x481x833 > 96 kernel 3x3 stride 2x2",
        ),
        (
            "192-192:3x1x1:2x120x208:s2x1x1",
            "bfloat16 1x192x4x120x208 > 192 kernel 3x1x1 stride 2x1x1 before 1",
            "bfloat16 1x192x4x120x208 > 192 kernel 3x1x1 stride 2x1x1 before 1",
        ),
    ],
)
def test_shapes_as_convolutions_of_the_store(text: str, inner: str, padded: str) -> None:
    shape = Shape.parse(text)
    assert str(problem_of(shape, "bfloat16", padded=False)) == inner
    assert str(problem_of(shape, "bfloat16", padded=True)) == padded
    assert problem_of(shape, "bfloat16", padded=True).out_sizes == shape.size
    assert problem_of(shape, "bfloat16", padded=False).flops == shape.flop


MS = {
    "native contiguous": 5.0,
    "native contiguous padded": 4.0,
    "native channels_last": 3.0,
    "native channels_last padded": 2.0,
    "unfold contiguous": 6.0,
    "unfold channels_last": 7.0,
    "taps": 1.0,
    "matrix": 9.0,
}


def test_what_was_measured_by_form() -> None:
    def times(shape: str, **more: object) -> list[dict[str, float | None]]:
        row = {"shape": shape, "ms": MS, "tuned_config": [], **more}
        return [{name: m.ms for name, m in forms.items()} for forms in figures(row, "bfloat16").values()]

    assert times("96-96:3x3x3:4x8x8") == [
        {"native": 5.0, "channels_last": 3.0, "unfold2d": 6.0, "taps": 1.0},
        {"native": 4.0, "channels_last": 2.0, "unfold2d": 6.0, "taps": 1.0},
    ]
    strided, inside = times("96-96:3x3:8x8:s2x2")
    assert strided == inside and strided["channels_last"] == 2.0, "a pad of one side is written beforehand"
    frames = MS | {"frames padded": 1.5}
    assert times("96-96:1x3x3:4x8x8", ms=frames)[0]["frames"] == 1.5
    assert not times("96-96:1x1x1:4x8x8"), "a product of patches"
    (tuned, _) = figures({"shape": "9-9:3x3:8x8", "ms": MS | {"tuned": 0.5}, "tuned_config": [1, 2]}, "tf32").values()
    assert (tuned["taps"].ms, tuned["taps"].config) == (0.5, (1, 2))


def test_the_bench_fills_a_store(tmp_path: Path) -> None:
    store = tmp_path / "store.json"
    main(["--shapes", "8-4:3x3:9x7", "--device", "cpu", "--dtype", "fp32", "--rounds", "1", "--matrix", "64",
          "--store", str(store)])  # fmt: skip
    (table,) = read(store).values()
    assert {str(p) for p in table.convolutions} == {
        "float32 1x8x9x7 > 4 kernel 3x3 padding 1.1x1.1",
        "float32 1x8x11x9 > 4 kernel 3x3",
    }
    assert table.key == ComputeDevice.of(torch.device("cpu"), parse_options({}, {})).key and table.copy > 0
