"""resample: a weighted gather of rows, made of global coordinates, is torch's own interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pvae.passes.index_map import Resample
from pvae.runtime.resample import weighted_rows
from pvae.testing import relative_error

Taps = tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]


def taps_of(mode: Any, n: int, out: int, align: bool = False) -> Taps:
    """Linear ones are two even where one would do: that is what a piece may get."""
    rows = Resample(mode, out, None, align).sources(np.arange(out), n)[0]
    below, above = np.floor(rows).astype(int), np.ceil(rows).astype(int)
    if mode != "linear":
        return ((tuple(below.tolist()), (1.0,) * out),)
    lower = tuple(below.tolist()), tuple((1 - (rows - below)).tolist())
    return lower, (tuple(above.tolist()), tuple((rows - below).tolist()))


def interpolated(x: Tensor, dim: int, out: int, mode: str, align: bool) -> Tensor:
    last = x.movedim(dim, -1)
    options = {"align_corners": align} if mode == "linear" else {}
    y = F.interpolate(last.reshape(1, -1, last.shape[-1]), size=out, mode=mode, **options)
    return y.reshape(*last.shape[:-1], out).movedim(-1, dim)


@given(
    n=st.integers(1, 12),
    out=st.integers(1, 30),
    dim=st.integers(-3, 2),
    mode=st.sampled_from(["linear", "nearest", "nearest-exact"]),
    align=st.booleans(),
    channels_last=st.booleans(),
)
def test_is_torchs_interpolation(n: int, out: int, dim: int, mode: str, align: bool, channels_last: bool) -> None:
    shape = [2, 3, 4]
    shape[dim] = n
    x = torch.randn(shape, dtype=torch.float64)
    x = x.movedim(-1, 1).contiguous().movedim(1, -1) if channels_last else x
    got = weighted_rows(x, dim, taps_of(mode, n, out, align))
    expected = interpolated(x, dim, out, mode, align)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if mode != "linear":
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    """To the nearest number, or as near as the products in float32 come; torch's own kernels are not always as near."""
    x = torch.randn(2, 3, 40).to(dtype)
    got = weighted_rows(x, 2, taps_of("linear", 40, 70))
    exact = interpolated(x.double(), 2, 70, "linear", False)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((got.double() - exact).abs() <= ulp * 1.001 + 1e-6).all()
    assert relative_error(got, exact) <= 1.25 * relative_error(interpolated(x, 2, 70, "linear", False), exact)


def test_a_single_tap_copies() -> None:
    """Also what no sum would keep: integers, infinities, a bfloat16's every bit."""
    for x in (torch.arange(6), torch.tensor([1.0, float("inf"), -0.0]), torch.randn(5).bfloat16()):
        got = weighted_rows(x, 0, (((2, 0, 2), (1.0, 1.0, 1.0)),))
        assert got.dtype == x.dtype and torch.equal(got, x[[2, 0, 2]])


def test_no_rows_and_no_taps() -> None:
    assert weighted_rows(torch.randn(2, 3), 1, (((), ()), ((), ()))).shape == (2, 0)
    with pytest.raises(AssertionError, match="no taps"):
        weighted_rows(torch.randn(2, 3), 1, ())
