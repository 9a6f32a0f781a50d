"""conv_rules and conv_figures: times of convolutions that nobody measured, by rates, by tiles, and from those alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.options import parse_options
from pvae.passes.conv_figures import Knowledge, nearest
from pvae.passes.conv_problem import ConvProblem
from pvae.passes.conv_rules import START_MS, no_gain
from pvae.passes.tuning_store import shipped
from tests.passes.conv_choices import NO_STORE, choices, conv, on_gpu


@pytest.fixture(autouse=True)
def no_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)


def test_a_last_wave_of_few_tiles_costs_as_much_as_a_full_one() -> None:
    def ms(form: str, height: int, width: int) -> float:
        x, w = on_gpu((1, 192, height, width), (192, 192, 3, 3))
        (choice,) = choices(conv, x, w)
        return (next(f.ms for f in choice.alternatives if f.name == form) or 0) - START_MS

    # cuDNN by tiles of 128 positions on 132 multiprocessors; pvae's by rectangles of whole rows or columns of 64
    assert ms("channels_last", 1, 132 * 128) == pytest.approx(ms("channels_last", 1, 128))
    assert ms("channels_last", 1, 133 * 128) == pytest.approx(2 * ms("channels_last", 1, 128))
    assert ms("taps", 450, 450) > 1.05 * ms("taps", 448, 448)
    assert ms("taps", 512, 450) < 1.05 * ms("taps", 512, 448), "columns of 64"


@pytest.mark.parametrize(
    ("shape", "out", "kernel", "form"),
    [
        ((1, 512, 5, 60, 90), 512, (3, 3, 3), "channels_last"),  # 485 TFLOP/s against 721: tiles that do not fit
        ((1, 1024, 9, 15, 22), 1024, (3, 3, 3), "channels_last"),
        ((4, 192, 480, 832), 96, (3, 3), "taps"),
        ((1, 384, 3, 128, 128), 384, (3, 3, 3), "taps"),
        ((1, 128, 1024, 1024), 128, (3, 3), "channels_last"),
    ],
)
def test_by_the_table_and_by_rule_alike(
    shape: tuple[int, ...], out: int, kernel: tuple[int, ...], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the table the rates decide alike where the gain or loss is clear."""
    x, w = on_gpu(shape, (out, shape[1], *kernel))
    for _ in range(2):
        (choice,) = choices(same, x, w)
        assert choice.form == form, str(choice)
        monkeypatch.setattr("pvae.passes.conv_figures.shipped", lambda: ())


def same(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(x, w, padding=(0, 1, 1)) if x.dim() == 5 else F.conv2d(x, w, padding=1)


def test_the_shipped_table_is_asked_after_the_store_and_nearby_figures_after_that() -> None:
    (table,) = [t for t in shipped() if t.name == "NVIDIA H200"]
    options = parse_options(NO_STORE, {})
    knowledge = Knowledge.of(torch.device("cuda"), options)
    problem = ConvProblem.parse("bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 padding 0.0x1.1x1.1 before 2")
    found = knowledge.figures(problem)
    assert (found.source, found.sure) == ("table of NVIDIA H200", "measured")
    other = ConvProblem.parse(str(problem).replace("4x480x832", "4x400x832"))
    near = knowledge.figures(other)
    assert near.sure == "near" and near.source == f"table of NVIDIA H200, at {problem}"
    assert near.forms["native"].ms == pytest.approx((found.forms["native"].ms or 0) * 400 / 480)
    share = (near.forms["taps"].ms or 0) / (found.forms["taps"].ms or 1)
    assert 400 / 480 < share < 400 / 480 + 0.03, "400 rows are 66 2/3 of its tiles"
    other = ConvProblem.parse(str(problem).replace("0.0x", "2.0x").removesuffix(" before 2"))
    alike = knowledge.figures(other)
    assert (alike.sure, alike.forms) == ("measured", found.forms), "zero frames cost what cached ones do"
    assert nearest(ConvProblem.parse(str(problem).replace("kernel 3x3x3", "kernel 3x3x5")), table.convolutions) is None
    assert nearest(ConvProblem.parse(str(problem).replace("4x480x832", "4x48x83")), table.convolutions) is None
    assert Knowledge.of(torch.device("cuda"), parse_options({**NO_STORE, "machine": "a100"}, {})).brought == ()


def test_fp32_goes_like_half_precision_where_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = on_gpu((1, 96, 4, 256, 256), (96, 96, 3, 3, 3), dtype=torch.float32)
    monkeypatch.setattr("pvae.passes.conv_rules.is_hopper", lambda device: True)
    for tf32, expected in ((True, ("taps", "channels_last")), (False, ("native", "contiguous"))):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            (choice,) = choices(conv, x, w)
            assert (choice.form, choice.layout) == expected
            assert (no_gain(w) is None) == tf32
