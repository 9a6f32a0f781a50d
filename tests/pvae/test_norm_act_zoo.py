"""fuse_norm_act on the zoo's autoencoders: how many norms it takes, and the numerical contract with them."""

from __future__ import annotations

import copy

import pytest
import torch

import pvae

pytest.importorskip("diffusers")

from pvae.testing import agreement
from pvae.tools.zoo import load

# Norms taken in the tiny decoder (all graphs of it), and those with a border. What is left: norms of [N, C, L] in attention.
DECODERS = {
    "qwen-image": (22, 0),
    "hunyuan-video": (21, 21),
    "hunyuan-video-1.5": (26, 25),
    "ltx-video": (17, 15),
    "ltx2-video": (9, 9),
    "cogvideox": (42, 21),
    "mochi": (10, 10),
    "kl": (21, 0),
    "dc": (10, 0),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_norm_is_taken_and_the_contract_holds(name: str) -> None:
    case = load(name, dtype=torch.bfloat16)
    model = pvae.compile(copy.deepcopy(case.model), engine="eager", norm_act="on", strict="on")
    found = agreement(case.run(model), case.run(), case.cast(torch.float64).run())
    assert found.ok, str(found)
    notes = [
        record.note
        for graph in pvae.report(model).graphs
        for report in graph.passes
        if report.name == "fuse_norm_act"
        for record in report.matches
    ]
    assert (len(notes), sum("border" in note for note in notes)) == DECODERS[name]


@pytest.mark.parametrize("name", ["qwen-image", "mochi", "kl"])
def test_in_double_precision_nothing_but_the_order_of_sums_differs(name: str) -> None:
    case = load(name, part="encode" if name == "mochi" else "decode", dtype=torch.float64)
    model = pvae.compile(copy.deepcopy(case.model), engine="eager", norm_act="on", strict="on")
    found = agreement(case.run(model), case.run(), case.run())
    assert found.ok, str(found)
    assert pvae.report(model).matches("fuse_norm_act") > 0
