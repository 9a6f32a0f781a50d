"""split_cache: the frames of a causal cache are made apart; what else reads the norm, or is no cache, keeps it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.kernels.channel_norm_act import OP as NORM
from pvae.kernels.conv_taps import OP as TAPS
from pvae.passes.ir import aten
from pvae.testing import agreement, assert_rewrites_to, refusals, rewrite

X, CACHE = torch.randn(1, 8, 4, 5, 6), torch.randn(1, 8, 2, 5, 6)
W, G = torch.randn(8, 8, 3, 3, 3), torch.randn(8)
CONV = (None, None, [1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1], False, "none", [])
LIKE = ("l2", 1e-12, 8**0.5, "silu")
SPLIT = "split_cache"


def norm(x: Tensor, g: Tensor) -> Tensor:
    return NORM(x, g, None, *LIKE)


def block(x: Tensor, cache: Tensor, w: Tensor, g: Tensor) -> Any:
    z = norm(x, g)
    return TAPS(z, cache, w, *CONV), z[:, :, -2:].clone()


def test_before_and_expected() -> None:
    def expected(x: Tensor, cache: Tensor, w: Tensor, g: Tensor) -> Any:
        first = norm(aten.slice.Tensor(x, 2, 0, 2), g)
        last = norm(aten.slice.Tensor(x, 2, 2, 4), g)
        return TAPS(first, cache, w, *CONV, last), last

    assert_rewrites_to(block, expected, X, CACHE, W, G, passes=SPLIT)


def test_a_cache_of_all_frames_is_the_activation() -> None:
    def whole(x: Tensor, cache: Tensor, w: Tensor, g: Tensor) -> Any:
        z = norm(x, g)
        return TAPS(z, cache, w, *CONV), z.clone()

    def expected(x: Tensor, cache: Tensor, w: Tensor, g: Tensor) -> Any:
        z = norm(x, g)
        return TAPS(z, cache, w, *CONV), z

    assert_rewrites_to(whole, expected, X[:, :, :2], CACHE, W, G, passes=SPLIT)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, c, w, g: (TAPS(norm(x, g), c, w, *CONV), norm(x, g)[:, :, 1:3].clone()),  # not the last frames
        lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV), z[:, :, -2:].clone(), z.relu()))(norm(x, g)),
        lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV) + TAPS(z, c, w, *CONV), z[:, :, -2:]))(norm(x, g)),
        lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV), z[:, :, -2:].clone().relu()))(norm(x, g)),
        lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV), z[:, 4:].clone()))(norm(x, g)),
        lambda x, c, w, g: (TAPS(norm(x, g), c, w, *CONV),),  # no cache
    ],
)
def test_stays_whole(change: Any) -> None:
    _, (report,) = rewrite(change, X, CACHE, W, G, passes=SPLIT)
    assert not report.matches


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV), z[:, :, -2:], z[:, :, -1:]))(norm(x, g)),
            "caches of several lengths",
        ),
        (
            lambda x, c, w, g: (lambda z: (TAPS(z, c, w, *CONV), z[:, :, -2:]))(
                NORM(x, g, None, *LIKE, scale=torch.ones_like(x))
            ),
            "the norm has a border, scale or shift",
        ),
    ],
)
def test_refusals(function: Any, reason: str) -> None:
    _, reports = rewrite(function, X, CACHE, W, G, passes=SPLIT)
    assert not reports[0].matches and refusals(reports) == [reason]


def test_two_videos_stay_whole() -> None:
    x, cache = torch.cat([X, X]), torch.cat([CACHE, CACHE])
    _, reports = rewrite(block, x, cache, W, G, passes=SPLIT)
    assert refusals(reports) == ["more than one video"]


class Causal(torch.nn.Module):
    """A causal convolution with its cache in a list, as Wan's."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.conv = torch.nn.Conv3d(8, 8, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        x = torch.nn.functional.silu(torch.nn.functional.normalize(x, dim=1) * 8**0.5 * self.gamma)
        kept = x[:, :, -2:].clone()
        y = self.conv(torch.cat([cache[0], x], 2))
        cache[0] = kept
        return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_caches_over_several_calls(frames: int, dtype: torch.dtype) -> None:
    """Three chunks; the compiled module's cache is a tensor of its own, and eager's."""
    model = Causal().to(dtype)
    fast = pvae.compile(Causal().to(dtype), engine="eager", conv3d="taps", norm_act="on", strict="on")
    fast.load_state_dict(model.state_dict())
    exact = Causal().to(torch.float64)
    exact.load_state_dict(model.state_dict())
    start = torch.randn(1, 8, 2, 5, 6, dtype=torch.float64).to(dtype)
    caches = [[start.to(torch.float64)], [start.clone()], [start.clone()]]
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 8, frames, 5, 6, dtype=torch.float64).to(dtype)
            reference, eager, ours = (m(x.to(c[0].dtype), c) for m, c in zip((exact, model, fast), caches, strict=True))
            found = agreement((ours, caches[2][0]), (eager, caches[1][0]), (reference, caches[0][0]))
            assert found.ok, str(found)
            assert caches[2][0].untyped_storage().nbytes() == caches[2][0].nbytes
    assert pvae.report(fast).matches("split_cache") >= 1
