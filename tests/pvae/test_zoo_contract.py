"""The numerical contract on every model of the zoo: 1.25 times eager's error, 1e-12 in float64."""

from __future__ import annotations

import pytest
import torch

import pvae
from pvae.testing import agreement
from pvae.tools.zoo import Unsupported, load, names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def check(name: str, part: str, dtype: torch.dtype, engine: str) -> pvae.ModelReport:
    try:
        case = load(name, part=part, dtype=dtype)
    except Unsupported as reason:
        pytest.skip(str(reason))
    with torch.no_grad():
        reference, eager = case.cast(torch.float64).run(), case.run()
        pvae.compile(case.model, engine=engine)
        found = agreement(case.run(), eager, reference)
    assert found.ok, str(found)
    return pvae.report(case.model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("name", names())
def test_contract(name: str, part: str, dtype: str) -> None:
    report = check(name, part, DTYPES[dtype], "eager")
    assert report.graphs
    assert all(graph.passes for graph in report.graphs), "a graph was handed on untouched"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("qwen-image", "decode"), ("kl", "decode"), ("tiny-kl", "encode")])
def test_contract_through_inductor(name: str, part: str) -> None:
    check(name, part, torch.float32, "inductor")
