"""lay_out_outputs: eager's memory for the caller, one rule for what only compiled code reads again, no memory kept alive."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.options import parse_options
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context
from pvae.testing import capture

X, W = torch.randn(2, 4, 5, 8, 8), torch.randn(4, 4, 3, 3, 3)
COMPACT = torch.ops.pvae.compact.default
CACHE = 1


def compiled(function: Any, passes: str, free: bool) -> tuple[torch.fx.GraphModule, int]:
    captured = capture(function, X, W)
    context = Context(parse_options({}, {}), free_strides=frozenset({CACHE}) if free else frozenset())
    reports = run_pipeline(captured.gm, Pipeline.parse(passes), context)
    return captured.gm, reports[-1].counters["outputs_relaid"]


def causal(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = F.conv3d(x, w, padding=1)
    return y, y[:, :, -2:].clone()


def test_untouched_graphs_copy_only_what_eager_copies() -> None:
    gm, relaid = compiled(causal, "canonicalize", free=False)
    assert relaid == 1 and sum(n.target is COMPACT for n in gm.graph.nodes) == 1
    y, cache = gm(X, W)
    assert torch.equal(cache, y[:, :, -2:]) and cache.untyped_storage().nbytes() == cache.numel() * 4


def test_the_caller_gets_eagers_order_of_dimensions() -> None:
    for passes in ("conv3d_unfold{form=unfold2d}", "channels_last{layout=on}"):
        gm, relaid = compiled(causal, passes, free=False)
        assert relaid == 2
        for got, expected in zip(gm(X, W), causal(X, W), strict=True):
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_caches_follow_the_layout_that_the_graph_works_in() -> None:
    for passes, channels_last in (("channels_last{layout=on}", True), ("conv3d_unfold{form=unfold2d}", False)):
        gm, _ = compiled(causal, passes, free=True)
        y, cache = gm(X, W)
        assert cache.is_contiguous(memory_format=torch.channels_last_3d) is channels_last
        assert cache.is_contiguous() is not channels_last
        assert y.is_contiguous()
        assert cache.untyped_storage().nbytes() == cache.numel() * 4


def test_returned_caches_stay_as_they_are_computed() -> None:
    """Channels-last if they are so; not turned over if not, though the graph works channels-last."""

    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.conv3d(x, w, padding=1)
        return y, y[:, :, -2:].clone(), (x + 1).clone()

    captured = capture(two, X, W)
    context = Context(parse_options({}, {}), returned_caches=frozenset({1, 2}))
    run_pipeline(captured.gm, Pipeline.parse("conv_taps{form=taps}"), context)
    y, cache, contiguous = captured.gm(X, W)
    for got, expected in zip((y, cache, contiguous), two(X, W), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous() and contiguous.is_contiguous()
    assert cache.is_contiguous(memory_format=torch.channels_last_3d) and not cache.is_contiguous()
    assert cache.untyped_storage().nbytes() == cache.numel() * 4


def test_inputs_are_handed_back_as_they_are() -> None:
    gm, relaid = compiled(lambda x, w: (x, x.transpose(1, 2)), "channels_last{layout=on}", free=True)
    assert gm(X, W)[0] is X and relaid <= 1
