"""fold_pad: what both sides of a pad share moves into the convolution; anything but zeros stays where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite, video_models

aten = torch.ops.aten
X, W, B = torch.randn(1, 4, 5, 8, 8), torch.randn(6, 4, 3, 3, 3), torch.randn(6)


def test_whole_pad() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return (aten.conv3d.default(x, w, b, [1, 1, 1], [1, 2, 3], [1, 1, 1], 1),)

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (3, 3, 2, 2, 1, 1)), w, b)

    assert_rewrites_to(before, expected, X, W, B, passes="fold_pad{where=any}")


def test_causal_pad_leaves_the_frames_in_front() -> None:
    def expected(x: Tensor, w: Tensor, b: Tensor) -> Any:
        x = aten.pad.default(x, [0, 0, 0, 0, 2, 0])
        return (aten.conv3d.default(x, w, b, [1, 2, 2], [0, 1, 1], [1, 1, 1], 1),)

    def before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), w, b, stride=(1, 2, 2))

    assert_rewrites_to(before, expected, X, W, B, passes="fold_pad{where=any}")


def test_uneven_pad_is_split_and_own_padding_added_to() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        return (aten.conv2d.default(aten.pad.default(x, [0, 1, 3, 0]), w, None, [1, 1], [4, 3], [1, 1], 1),)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 5, 2), value=0.0), w, padding=(2, 2))

    assert_rewrites_to(before, expected, X[:, :, 0], W[:, :, 0], passes="fold_pad{where=any}")


def test_constant_pad_nd_and_one_dimension() -> None:
    def expected(x: Tensor, w: Tensor) -> Any:
        return (aten.conv1d.default(x, w, None, [2], [3], [2], 2),)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv1d(aten.constant_pad_nd.default(x, [2, 2], 0), w, None, 2, 1, 2, 2)

    assert_rewrites_to(before, expected, torch.randn(2, 4, 9), torch.randn(4, 2, 3), passes="fold_pad{where=any}")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (
            lambda x, w: F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), w),
            "pads replicate, the convolution pads with zeros",
        ),
        (lambda x, w: F.conv3d(F.pad(x, (1,) * 6, mode="reflect"), w), "pads reflect"),
        (lambda x, w: F.conv3d(F.pad(x, (1,) * 6, mode="circular"), w), "pads circular"),
        (lambda x, w: F.conv3d(F.pad(x, (1,) * 6, value=0.5), w), "pads by 0.5, the convolution pads with zeros"),
        (lambda x, w: F.conv3d(F.pad(x[:, :2], (1,) * 8), w), "pads the batch or channel dimension"),
        (lambda x, w: F.conv3d(F.pad(x, (1,) * 6), w[..., :2], padding="same"), "padding='same' with an uneven total"),
        (lambda x, w: F.conv3d(F.pad(x, (-1, 1, 1, 1, 1, 1)), w), "the pad crops (negative width)"),
        (lambda x, w: F.conv3d(F.pad(x, (0, 0, 0, 1, 2, 0)), w), "the pad is one-sided"),
        (lambda x, w: F.conv3d(x, w, padding=1), None),
    ],
)
def test_refusals(before: Any, reason: str | None) -> None:
    _, reports = rewrite(before, X, W, passes="fold_pad{where=any}")
    assert not reports[0].matches
    assert refusals(reports)[0].startswith(reason) if reason else not refusals(reports)


@given(video_models())
def test_property_models(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    dtypes = (torch.float64, torch.float32, torch.float16)
    assert_equivalent(model, (x,), dtypes=dtypes, options={"passes": "fold_pad{where=any}"})


def test_a_slow_conv3d_of_the_cpu_keeps_its_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's takes longer to pad itself than `pad` does; what oneDNN computes does not (bf16, on processors with AVX-512)."""

    def padded(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1)), w, b)

    monkeypatch.setattr("pvae.passes.fold_pad.conv_backend", lambda *_: "Slow3d")
    _, (slow,) = rewrite(padded, X, W, B, passes="fold_pad")
    assert "slower when it pads itself" in slow.refusals[0].note and not slow.matches
    monkeypatch.setattr("pvae.passes.fold_pad.conv_backend", lambda *_: "Mkldnn")
    _, (fast,) = rewrite(padded, X, W, B, passes="fold_pad")
    assert fast.matches
