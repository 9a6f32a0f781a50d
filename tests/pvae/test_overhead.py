"""What pvae itself costs: seconds before the first call of a kind, microseconds in every later one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pvae
from pvae.module import CompiledForward, compiled_forwards


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def microseconds(call: Callable[[], Any], calls: int = 300) -> float:
    """The median of the better of two rounds: this machine has other work."""

    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(statistics.median(once() for _ in range(calls)) for _ in range(2)) * 1e6


def without_work(forward: CompiledForward) -> None:
    """Replace every compiled graph by one that hands its first input back for each output."""
    for program in forward.programs:
        outputs = 1 + sum(len(template) for _, template in program.effects)
        object.__setattr__(program, "compiled", lambda *args, n=outputs: (args[0],) * n)


def test_one_tensor() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model, x = pvae.compile(Plus(), engine="eager"), torch.randn(2, 3)
    model(x)
    without_work(model.forward)
    assert microseconds(lambda: model.forward(x)) <= 30


def test_wan_decoder_with_its_caches() -> None:
    """The whole published model: forty caches in a list, two hundred weights, caches that the call replaces."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKLWan().eval().requires_grad_(False)
    pvae.compile(model.decoder, engine="eager")
    (forward,) = compiled_forwards(model)
    x = torch.randn(1, 16, 1, 2, 2)
    caches: list[Any] = [None] * model._cached_conv_counts["decoder"]
    for chunk in range(3):
        model.decoder(x, feat_cache=caches, feat_idx=[0], first_chunk=chunk == 0)
    graphs = pvae.report(model).graphs
    assert len(graphs) == 3
    for graph in graphs:
        assert graph.capture_seconds + graph.pass_seconds <= 3.0, "seconds of pvae's own before a first call"
    without_work(forward)
    used = sum(isinstance(c, torch.Tensor) for c in caches)
    assert used >= 30
    kinds = len(forward.programs)
    spent = microseconds(lambda: forward(x, feat_cache=list(caches), feat_idx=[0], first_chunk=False))
    assert len(forward.programs) == kinds
    assert spent <= 200, f"{spent:.0f} us a call with {used} caches"
