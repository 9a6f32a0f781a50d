"""Regions of rank 0 in real processes, over gloo: results, who does the work, and what goes wrong. The scenarios are in
`main_rank_gloo.py`; see `test_shard_gloo.py`."""

from __future__ import annotations

from typing import Any

import pytest

from pvae.testing import FLOAT64_BOUND
from tests.pvae.main_rank_gloo import SESSIONS
from tests.pvae.test_shard_gloo import Fared, run

WORLDS = {"functions": 3, "graphs": 2}

# What rank 0 reports, and what all others do.
FACTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data_dependent_length": ({"calls": 3}, {"calls": 0}),
    "sampling_and_leaves_that_are_no_tensors": ({"untouched": False}, {"untouched": True}),
    "methods_and_nesting": ({"calls": 3}, {"calls": 0}),
    "named_submodule_without_weights": ({"owned": [1] * 5}, {"owned": [0] * 5}),
    "by_inductor": ({"owned": 1}, {"owned": 0}),
    "named_in_torch_compile": ({"owned": 1}, {"owned": 0}),
    "data_dependent_in_a_compiled_model": ({"calls": 2}, {"calls": 0}),
    "refusals": ({"said": [True] * 3}, {"said": [True] * 3}),
}


@pytest.fixture(scope="module")
def fared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fared]:
    return run(list(WORLDS), tmp_path_factory.mktemp("main_rank"), "main_rank_gloo.py", WORLDS)


@pytest.mark.parametrize(("session", "name"), [(s, name) for s in WORLDS for name in SESSIONS[s]])
def test_rank_0_works_for_all(fared: dict[str, Fared], session: str, name: str) -> None:
    ranks = fared[session][name]
    assert len(ranks) == WORLDS[session]
    for rank, found in enumerate(ranks):
        assert found and found["raised"] is None, found
        assert found.get("error", 0.0) <= FLOAT64_BOUND, found
        assert found.items() >= FACTS.get(name, ({}, {}))[rank > 0].items(), found
        assert "error" in found or found["alike"] == ranks[0]["alike"], ranks


def test_unknown_names_are_told_with_near_ones(fared: dict[str, Fared]) -> None:
    for found in fared["graphs"]["unknown_name_in_torch_compile"]:
        assert "no node of this graph is of a submodule called 'texts'; did you mean 'text'" in found["said"]
        assert "pvae.compile(model, main_rank=[...])" in found["said"]
