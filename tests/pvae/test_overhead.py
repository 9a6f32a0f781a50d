"""What pvae itself costs before its first calls and in every later one, beside what torch.compile costs there.

Each bound is a ratio of two figures of one process: seconds alone would test the machine. `pytest -s` shows the figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

import pvae
from pvae.module import CompiledForward, compiled_forwards


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def microseconds(*calls: Callable[[], Any], repeats: int = 100, rounds: int = 6) -> list[float]:
    """The median of each call's best round; the calls take turns, since this machine has other work."""

    def once(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    found = [[statistics.median(once(call) for _ in range(repeats)) for call in calls] for _ in range(rounds)]
    return [min(column) * 1e6 for column in zip(*found, strict=True)]


def without_work(forward: CompiledForward) -> None:
    """Replace every compiled graph by one that hands its first input back for each output."""
    for program in forward.programs:
        outputs = 1 + sum(len(template) for _, template in program.effects)
        object.__setattr__(program, "compiled", lambda inputs, n=outputs: (inputs[0],) * n)


class Guards:
    """A torch.compile backend that leaves only guards and bookkeeping once `skip` is set: torch's `without_work`."""

    skip = False

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        (outputs,) = graph.graph.output_node().args
        assert isinstance(outputs, tuple)
        n = len(outputs)
        return lambda *args: (args[-1],) * n if self.skip else graph(*args)


def test_one_tensor() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x, guards = torch.randn(2, 3), Guards()
    rival = torch.compile(Plus(), backend=guards)
    rival(x)
    guards.skip = True
    model = pvae.compile(Plus(), engine="eager")
    model(x)
    without_work(model.forward)
    ours, torchs = microseconds(lambda: model(x), lambda: rival(x))
    print(f"\none tensor: {ours:.1f} us a call, torch.compile {torchs:.1f}")
    assert ours <= 1.5 * torchs


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.compile breaks this decoder's graph at `cache == 'Rep'`")
def test_wan_decoder_with_its_caches() -> None:
    """The published decoder, narrow: forty caches in a list, two hundred weights, caches that the call replaces."""
    diffusers = pytest.importorskip("diffusers")
    guards = Guards()
    models = [diffusers.AutoencoderKLWan(base_dim=16).eval().requires_grad_(False) for _ in range(2)]
    ours, torchs = decoders = [Decoder(model) for model in models]
    pvae.compile(models[0].decoder, engine="eager")
    models[1].decoder.compile(backend=guards, fullgraph=True, dynamic=False)

    # They share caches of torch's own, so both warm up, and then either is first once.
    for turn in (decoders, decoders, decoders[::-1]):
        for decoder in turn:
            decoder.first_call()
    assert len(pvae.report(models[0]).graphs) == 3
    first_calls = [sum(decoder.seconds[1:]) for decoder in decoders]
    print("\nfirst calls: {:.2f} s of the CPU, torch.compile {:.2f}".format(*first_calls))
    assert first_calls[0] <= 2 * first_calls[1]

    (forward,) = compiled_forwards(models[0])
    without_work(forward)
    guards.skip = True
    kinds = len(forward.programs)
    later_calls = microseconds(ours.later_call, torchs.later_call)
    assert len(forward.programs) == kinds
    assert sum(isinstance(c, torch.Tensor) for c in ours.caches) >= 30
    print("later calls: {:.1f} us, torch.compile {:.1f}".format(*later_calls))
    assert later_calls[0] <= 2.5 * later_calls[1]


class Decoder:
    """Wan's decoder and its caches, called frame by frame; `seconds` of the CPU that each first call of a kind took."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.decoder
        self.caches: list[Any] = [None] * model._cached_conv_counts["decoder"]
        self.x = torch.randn(1, 16, 1, 2, 2)
        self.seconds: list[float] = []

    def first_call(self) -> None:
        start = time.process_time()
        self.decoder(self.x, feat_cache=self.caches, feat_idx=[0], first_chunk=not self.seconds)
        self.seconds.append(time.process_time() - start)

    def later_call(self) -> None:
        self.decoder(self.x, feat_cache=list(self.caches), feat_idx=[0], first_chunk=False)
