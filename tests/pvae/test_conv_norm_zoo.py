"""fuse_conv_norm on the zoo's causal decoders: how many norms and caches it takes, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

import pvae

pytest.importorskip("diffusers")

from pvae.passes.pipeline import Pipeline
from pvae.testing import agreement
from pvae.tools.zoo import load

EVERYWHERE = str(Pipeline.default()).replace("fuse_conv_norm", "fuse_conv_norm{where=any}")
# In the last graph of the tiny decoder: norms taken, results of convolutions that others read too, caches.
DECODERS = {"wan2.1": (20, 9, 13), "qwen-image": (20, 9, 20)}


@pytest.mark.parametrize("name", DECODERS)
def test_in_double_precision_nothing_but_the_order_of_sums_differs(name: str) -> None:
    case = load(name, dtype=torch.float64)
    options = {"engine": "eager", "norm_act": "on", "conv3d": "taps", "strict": "on"}
    model = pvae.compile(copy.deepcopy(case.model), passes=EVERYWHERE, **options)
    found = agreement(case.run(model), case.run(), case.run())
    assert found.ok, str(found)
    (report,) = [r for r in pvae.report(model).graphs[-1].passes if r.name == "fuse_conv_norm"]
    notes = [record.note for record in report.matches]
    counts = (len(notes), sum("argument" in note for note in notes), sum("cache" in note for note in notes))
    assert counts == DECODERS[name]
