"""`cudagraphs="on"` on a GPU: the same results as without, whatever changes between calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import pvae
from pvae.backend import PvaeError
from pvae.runtime import cuda_graph
from pvae.tools.zoo import load

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh() -> None:
    pvae.reset()


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    record = cuda_graph.CudaGraphed._record

    def counting(self: Any, *args: Any) -> None:
        made.append(id(self))
        record(self, *args)

    monkeypatch.setattr(cuda_graph.CudaGraphed, "_record", counting)
    return made


@pytest.mark.parametrize(("name", "part"), [("qwen-image-dit", "forward"), ("wan2.1", "decode"), ("kl", "encode")])
@pytest.mark.parametrize("weights", ["live", "frozen"])
def test_replays_compute_what_calls_do(name: str, part: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compilations of one graph may round differently, so both models are compiled alike; one is never recorded."""
    case = load(name, part=part, dtype=torch.bfloat16, device="cuda")
    plain = pvae.compile(copy.deepcopy(case.model), cudagraphs=True, weights=weights)
    graphed = pvae.compile(case.model, cudagraphs=True, weights=weights)
    made = recordings(monkeypatch)

    def called(inputs: Any = None) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graph.CudaGraphed, "__call__", lambda self, given: list(self.run(given)))
            return case.run(plain, inputs)

    for turn in range(4):
        inputs = [x * (1 + turn) / 4 if x.is_floating_point() else x for x in case.inputs]
        assert torch.equal(case.run(graphed, inputs), called(inputs)), turn
    assert made and len(set(made)) == len(made)  # each graph was recorded once
    before = len(made)
    with torch.no_grad():
        for model in (plain, graphed):
            for parameter in model.parameters():
                parameter.mul_(1.125)
    for _ in range(2):
        assert torch.equal(case.run(graphed), called())  # writes are seen
    assert (len(made) > before) == (weights == "frozen")
    for model in (plain, graphed):
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(parameter * 0.5, requires_grad=False))
    for _ in range(3):
        assert torch.equal(case.run(graphed), called())  # and so are other weights


def test_results_are_the_callers_own() -> None:
    case = load("kl", part="decode", device="cuda")
    model = pvae.compile(case.model, cudagraphs=True)
    results = [case.run(model, [case.inputs[0] * k]) for k in (1, 2, 3, 4)]
    copies = [r.clone() for r in results]
    case.run(model)
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))
    assert not torch.equal(results[2], results[3])


def test_what_cannot_be_replayed_is_an_error() -> None:
    case = load("kl", part="decode")
    with pytest.raises(PvaeError, match="not on a GPU"):
        case.run(pvae.compile(case.model, cudagraphs=True))
