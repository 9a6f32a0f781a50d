"""What pvae itself costs: seconds a graph to compile, microseconds a call to run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pvae
from pvae.module import CompiledForward
from pvae.tools.zoo import load


def microseconds(call: Callable[[], Any], calls: int = 300) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def without_graphs(forward: CompiledForward) -> None:
    """Replace every compiled graph by a function that hands back its inputs: what is left is the wrapper."""
    for program in forward.programs:
        count = 1 + sum(len(template) for _, template in program.effects)
        object.__setattr__(program, "compiled", lambda *flat, count=count: (flat[0],) * count)


def test_one_tensor_costs_at_most_30_us() -> None:
    model = pvae.compile(nn.Conv2d(3, 3, 1).requires_grad_(False), engine="eager")
    x = torch.randn(1, 3, 4, 4)
    model(x)
    without_graphs(model.forward)
    assert microseconds(lambda: model.forward(x)) <= 30


def test_wans_caches_cost_at_most_200_us(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("wan2.1")
    pvae.compile(case.model, engine="eager")
    forward = case.model.decoder.forward
    calls: list[tuple[Any, dict[str, Any]]] = []
    plain = CompiledForward.__call__

    def spy(self: CompiledForward, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        calls.append((args, {k: list(v) if isinstance(v, list) else v for k, v in kwargs.items()}))
        return result

    monkeypatch.setattr(CompiledForward, "__call__", spy)
    case.run()
    monkeypatch.undo()
    args, kwargs = calls[-1]
    caches = [c for c in kwargs["feat_cache"] if isinstance(c, torch.Tensor)]
    assert len(caches) > 20
    without_graphs(forward)
    call = lambda: forward(*args, feat_cache=list(kwargs["feat_cache"]), feat_idx=[0])  # noqa: E731
    assert microseconds(call) * 40 / len(caches) <= 200


@pytest.mark.slow
def test_wans_full_decoder_takes_at_most_3_s_a_graph() -> None:
    """Re-trace, passes and verifier of the full configuration; the weights are real, the picture is small."""
    case = load("wan2.1", preset="full", size=(9, 32, 48))
    pvae.compile(case.model, engine="eager")
    case.run()
    graphs = pvae.report(case.model).graphs
    assert len(graphs) == 3
    assert max(g.capture_seconds + g.pass_seconds for g in graphs) <= 3
