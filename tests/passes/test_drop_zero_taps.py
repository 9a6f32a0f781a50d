"""drop_zero_taps: taps that only ever read padding go, in any dimension; nothing else does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.passes.drop_zero_taps import Taps, live_taps
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, video_models

aten = torch.ops.aten
X, W, B = torch.randn(1, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3), torch.randn(6)
FRAME = X[:, :, :1]


def test_single_frame_of_a_causal_convolution() -> None:
    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w, b)

    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        w = aten.slice.Tensor(w, 2, 2, 3)
        return (aten.conv3d.default(x, w, b, [1, 1, 1], [0, 1, 1], [1, 1, 1], 1),)

    reports = assert_rewrites_to(before, expected, FRAME, W, B, passes="drop_zero_taps")
    assert reports[0].matches[0].note == "3x3x3 -> 1x3x3"


def test_own_padding_keeps_the_middle_tap() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        w = aten.slice.Tensor(w, 2, 1, 2)
        return (aten.conv3d.default(x, w, b, [1, 1, 1], [0, 1, 1], [1, 1, 1], 1),)

    assert_rewrites_to(lambda x, w, b: F.conv3d(x, w, b, padding=1), expected, FRAME, W, B, passes="drop_zero_taps")


def test_dilation_keeps_what_is_still_read() -> None:
    """Two frames, dilation 2, padding 2: taps at -2, 0 and 2 frames; the outer ones see nothing."""

    def expected(x: Tensor, w: Tensor) -> Any:
        w = aten.slice.Tensor(w, 2, 1, 2)
        return (aten.conv1d.default(x, w, None, [1], [0], [2], 1),)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(x, w, padding=2, dilation=2)

    assert_rewrites_to(before, expected, torch.randn(1, 4, 2), torch.randn(6, 4, 3), passes="drop_zero_taps")


def test_uneven_rest_stays_a_pad() -> None:
    """One row, three rows in front and none behind: two outputs, of which the first reads nothing."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 0, 3, 0)), w)

    def expected(x: Tensor, w: Tensor) -> Any:
        w = aten.slice.Tensor(w, 2, 2, 3)
        x = aten.pad.default(x, [0, 0, 1, 0])
        return (aten.conv2d.default(x, w, None, [1, 1], [0, 0], [1, 1], 1),)

    args = torch.randn(1, 4, 1, 5), torch.randn(6, 4, 3, 1)
    reports = assert_rewrites_to(before, expected, *args, passes="drop_zero_taps")
    assert len(reports[0].matches) == 1


@pytest.mark.parametrize(
    "before",
    [
        lambda x, w: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), value=1.0), w),
        lambda x, w: F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate"), w),
        lambda x, w: F.conv3d(F.pad(x[:, :3], (0, 0, 0, 0, 2, 0, 1, 0)), w),
        lambda x, w: F.conv3d(x.expand(-1, -1, 3, -1, -1), w),
    ],
)
def test_other_pads_drop_nothing(before: Any) -> None:
    _, reports = rewrite(before, FRAME, W, passes="drop_zero_taps")
    assert not reports[0].matches and not refusals(reports)


def test_window_of_nothing_but_padding_is_refused() -> None:
    _, reports = rewrite(
        lambda x, w: F.conv1d(x, w, padding=3, stride=4), torch.randn(1, 4, 1), W[:, :, 0, 0], passes="drop_zero_taps"
    )
    assert refusals(reports) == ["no tap reads any input"]


def test_a_cropping_pad_is_not_merged_with_padding() -> None:
    """A column cropped and then padded again is zeros, not the column."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(4, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, (-1, 0)))

    assert_equivalent(Model(), (FRAME,), dtypes=(torch.float64,), options={"expect": {"drop_zero_taps": 1}})


def test_symbolic_time_drops_nothing() -> None:
    conv = nn.Conv3d(4, 6, 3, padding=1)
    with torch.no_grad():
        compiled = torch.compile(conv, backend="pvae", dynamic=True, options={"engine": "eager"})
        torch.testing.assert_close(compiled(X), conv(X))
        torch.testing.assert_close(compiled(X[:, :, :2]), conv(X[:, :, :2]))
    assert pvae.report(None).matches("drop_zero_taps") == 0


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    size, kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dilation, front, back = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(0, 5))
    if size + front + back < dilation * (kernel - 1) + 1:
        front += dilation * (kernel - 1)
    return size, kernel, stride, dilation, front, back


@given(windows())
def test_property_live_taps(window: tuple[int, int, int, int, int, int]) -> None:
    """What is dropped changes no bit, and a kept end tap does read something."""
    size, kernel, stride, dilation, front, back = window
    taps = live_taps(*window)
    x, w = torch.randn(1, 1, size, dtype=torch.float64), torch.randn(1, 1, kernel, dtype=torch.float64)
    y = F.conv1d(F.pad(x, (front, back)), w, None, stride, 0, dilation)
    if taps is None:
        assert not y.any()
        return
    assert isinstance(taps, Taps)
    kept = w[..., taps.first : taps.last + 1]
    torch.testing.assert_close(
        F.conv1d(F.pad(x, (taps.front, taps.back)), kept, None, stride, 0, dilation), y, rtol=1e-12, atol=1e-12
    )
    for end in (taps.first, taps.last):
        single = torch.zeros_like(w)
        single[..., end] = 1
        assert F.conv1d(F.pad(torch.ones_like(x), (front, back)), single, None, stride, 0, dilation).any()


@given(video_models(), st.sampled_from([1, 2]))
def test_property_models_of_few_frames(drawn: tuple[nn.Module, Tensor], frames: int) -> None:
    model, x = drawn
    x = x[:, :, :frames]
    try:
        copy.deepcopy(model)(x)
    except RuntimeError:
        return  # the model was drawn for more frames
    dtypes = (torch.float64, torch.float32, torch.float16)
    assert_equivalent(model, (x,), dtypes=dtypes, options={"passes": "canonicalize,drop_zero_taps"})
