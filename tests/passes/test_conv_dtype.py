"""conv_dtype: convolutions in bf16 under fp32 activations, only when asked for; the bias is added in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import pvae
from pvae.testing import assert_rewrites_to, refusals, relative_error, rewrite, video_models

aten = torch.ops.aten
BF16 = {"conv_dtype": "bf16"}
X, W, B = torch.randn(1, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3), torch.randn(6)


def test_with_bias() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        x, w = aten.to.dtype(x, torch.bfloat16), aten.to.dtype(w, torch.bfloat16)
        y = aten.to.dtype(aten.conv3d.default(x, w, None, [2, 2, 2], [1, 1, 1]), torch.float32)
        return (aten.add.Tensor(y, aten.reshape.default(b, [-1, 1, 1, 1])),)

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(x, w, b, stride=2, padding=1)

    assert_rewrites_to(before, expected, X, W, B, passes="conv_dtype", options=BF16)


def test_without_bias_in_two_dimensions() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        x, w = aten.to.dtype(x, torch.bfloat16), aten.to.dtype(w, torch.bfloat16)
        return (aten.to.dtype(aten.conv2d.default(x, w, None), torch.float32),)

    assert_rewrites_to(F.conv2d, expected, X[:, :, 0], W[:, :, 0], passes="conv_dtype", options=BF16)


def test_off_unless_asked_for() -> None:
    _, reports = rewrite(F.conv3d, X, W, passes="conv_dtype")
    assert not reports[0].matches and not reports[0].refusals


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_activations_are_refused(dtype: torch.dtype) -> None:
    _, reports = rewrite(F.conv3d, X.to(dtype), W.to(dtype), passes="conv_dtype", options=BF16)
    assert refusals(reports) == [f"the activation is {dtype}, not float32"]


def test_bias_is_not_rounded() -> None:
    conv = nn.Conv2d(4, 4, 1)
    nn.init.zeros_(conv.weight)
    exact = conv.bias.detach().clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    with torch.no_grad():
        y = pvae.compile(conv, engine="eager", **BF16)(torch.randn(1, 4, 3, 3))
    assert torch.equal(y[0, :, 0, 0], exact)


@given(video_models())
def test_property_models(drawn: tuple[nn.Module, Tensor]) -> None:
    """fp32 in, fp32 out, and one bf16 rounding a convolution."""
    model, x = drawn
    with torch.no_grad():
        expected = model(x)
        convs = sum(isinstance(m, nn.Conv3d) for m in model.modules())
        got = pvae.compile(model, engine="eager", **BF16)(x)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert pvae.report(model).matches("conv_dtype") == convs
    if got.numel() >= 64 and not any(isinstance(m, nn.GroupNorm) for m in model.modules()):
        assert relative_error(got, expected) < 0.03 * convs
