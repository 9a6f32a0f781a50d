"""channels_last: convolution weights are re-laid where that was measured to pay, or where asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import pvae
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, video_models

aten = torch.ops.aten
X, W = torch.randn(2, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"passes": "channels_last", "options": {"channels_last": "on"}},
        {"passes": "channels_last{layout=on}"},
        {"passes": "channels_last", "options": {"conv3d": "channels_last"}},
    ],
)
def test_weights_of_two_and_three_dimensions(options: dict[str, Any]) -> None:
    def before(x: Tensor, w: Tensor, w2: Tensor) -> Tensor:
        return F.conv3d(x, w, padding=1).sum() + F.conv2d(x[:, :, 0], w2).sum()

    def expected(x: Tensor, w: Tensor, w2: Tensor) -> Any:
        lay = torch.ops.pvae.channels_last.default
        a = aten.sum.default(aten.conv3d.default(x, lay(w), None, [1, 1, 1], [1, 1, 1]))
        frame = aten.select.int(x, 2, 0)
        return (aten.add.Tensor(a, aten.sum.default(aten.conv2d.default(frame, lay(w2)))),)

    assert_rewrites_to(before, expected, X, W, W[:, :, 0].contiguous(), **options)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, ["no gain measured on cpu"]),
        ({"channels_last": "off"}, []),
        ({"conv3d": "native"}, []),
    ],
)
def test_left_alone(options: dict[str, str], reasons: list[str]) -> None:
    _, reports = rewrite(F.conv3d, X, W, passes="channels_last", options=options)
    assert not reports[0].matches and refusals(reports) == reasons


def test_auto_on_cuda_is_for_half_precision() -> None:
    for dtype, reasons in (
        (torch.bfloat16, []),
        (torch.float16, []),
        (torch.float32, ["no gain measured for torch.float32"]),
    ):
        with new_fake_mode():
            x, w = (torch.empty(t.shape, device="cuda", dtype=dtype) for t in (X, W))
        _, reports = rewrite(F.conv3d, x, w, passes="channels_last")
        assert refusals(reports) == reasons and len(reports[0].matches) == 1 - len(reasons)


def test_already_so_or_of_one_dimension() -> None:
    laid = W.to(memory_format=torch.channels_last_3d)
    for args in ((F.conv3d, X, laid), (F.conv1d, X[:, :, 0, 0], W[:, :, 0, 0])):
        _, reports = rewrite(*args, passes="channels_last{layout=on}")
        assert not reports[0].matches and not refusals(reports)


def test_the_caller_gets_eagers_layout() -> None:
    conv = nn.Conv3d(4, 6, 3, padding=1)
    compiled = torch.compile(conv, backend="pvae", options={"engine": "eager", "channels_last": "on"}, dynamic=False)
    with torch.no_grad():
        for x in (X, X.to(memory_format=torch.channels_last_3d)):
            expected, got = conv(x), compiled(x)
            assert got.stride() == expected.stride() and conv.weight.is_contiguous()
            torch.testing.assert_close(got, expected)
    assert [g.matches("channels_last") for g in pvae.report(conv).graphs] == [1, 1]


def test_in_place_compile_lays_out_the_weights_themselves() -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, 3), nn.Conv3d(6, 4, 1), nn.GroupNorm(2, 4))
    weights = [p for p in model.parameters() if p.dim() == 5]
    values = [w.detach().clone() for w in weights]
    with torch.no_grad():
        expected = model(X)
        pvae.compile(model, engine="eager", channels_last="on")
        torch.testing.assert_close(model(X), expected)
    for weight, before in zip(weights, values, strict=True):
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(weight, before)
    assert model[0].weight is weights[0] and not weights[0].is_contiguous()
    assert pvae.report(model).matches("channels_last") == 0


@given(video_models())
def test_property_models(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    dtypes = (torch.float64, torch.float32, torch.float16)
    assert_equivalent(model, (x,), dtypes=dtypes, options={"channels_last": "on", "conv3d": "channels_last"})
