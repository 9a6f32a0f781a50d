"""Sharded models in real processes, over gloo: what `pvae.compile` and `torch.compile` return on every rank, and how ranks
fail that do not do the same. The scenarios are in `shard_gloo.py`; a session is one start of its processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pvae.testing import FLOAT64_BOUND
from tests.pvae.shard_gloo import SECONDS, SESSIONS
from tests.ranks import run_script

pytest.importorskip("diffusers")

WORLDS = {"zoo": 2, "ways": 3, "disagree": 3, "dies": 3}
LATEST = SECONDS + 3.0  # twice the grace that a failing rank gives the others, and a second for a busy machine
Fared = dict[str, list[dict[str, Any]]]


def run(
    sessions: Sequence[str], folder: Path, script: str = "shard_gloo.py", worlds: Mapping[str, int] = WORLDS
) -> dict[str, Fared]:
    """How each rank fared in each scenario that it lived to report. The sessions run side by side."""
    asked = [f"{name}={worlds[name]}" for name in sessions]
    run_script(Path(__file__).with_name(script), str(folder), *asked, seconds=240)
    found: dict[str, Fared] = {}
    for name in sessions:
        files = [folder / f"{name}{rank}.json" for rank in range(worlds[name])]
        ranks = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        scenarios = dict.fromkeys(scenario for rank in ranks for scenario in rank)
        found[name] = {scenario: [rank.get(scenario, {}) for rank in ranks] for scenario in scenarios}
    return found


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fared]:
    return run(["zoo", "ways"], tmp_path_factory.mktemp("agreeing"))


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fared]:
    return run(["disagree", "dies"], tmp_path_factory.mktemp("failing"))


CAUSAL = {"kept": 3}  # every cache of the three convolutions stays a piece
FACTS: dict[tuple[str, str], dict[str, Any]] = {
    ("zoo", "wan_decode"): {"graphs": 3},
    ("zoo", "wan_encode_keeps_the_contract_in_bfloat16"): {"ok": True},
    ("zoo", "torch_compile_of_kl"): {"graphs": 1},
    ("zoo", "inductor"): {"ok": True, "kept": 1},
    ("zoo", "inductor_by_torch_compile"): {"kept": 1},
    ("ways", "causal_caches"): CAUSAL,
    ("ways", "results_left_as_pieces"): {"shape": [1, 3, 14, 10]},
    ("ways", "patches"): {"exchanges": 0, "gathers": 1, "alike": True},
    ("ways", "torch_compile"): {"graphs": 1},
    ("ways", "torch_compile_with_caches"): {"graphs": 2, **CAUSAL},
}


@pytest.mark.parametrize(("session", "scenario"), [(s, name) for s in ("zoo", "ways") for name in SESSIONS[s]])
def test_every_rank_has_the_unsharded_result(agreeing: dict[str, Fared], session: str, scenario: str) -> None:
    for fared in agreeing[session][scenario]:
        assert fared and fared["raised"] is None, fared
        assert fared.get("error", 0.0) <= FLOAT64_BOUND, fared
        assert fared.items() >= FACTS.get((session, scenario), {}).items(), fared
        assert "error" in fared or "ok" in fared


def test_pieces_and_traffic(agreeing: dict[str, Fared]) -> None:
    assert [fared["local"][2] for fared in agreeing["ways"]["results_left_as_pieces"]] == [6, 4, 4]
    for fared in agreeing["zoo"]["wan_decode"]:  # the picture, and keys and values of the attention; no cache
        assert fared["exchanges"] > 20 and fared["gathers"] == 2  # keys with values, and the frame
    for fared in agreeing["ways"]["patches"]:
        assert 1e-6 < fared["error of little context"] < 0.5


# scenario -> what every living rank that it befalls is told of rank 2
TOLD = {
    "never_calls": f"rank 2 did not call within {SECONDS:g} s; rank ",
    "calls_with_another_shape": "shape of input 0: ranks 0, 1 [1,4,7,5], rank 2 [1,4,7,6]",
    "calls_another_model": "model: ranks 0, 1 Autoencoder.decoder, rank 2 Autoencoder.encoder",
    "calls_with_other_values": "values of input 0: ranks 0, 1 hash ",
    "fails_to_compile": "rank 2 failed: PvaeError: Autoencoder.decoder: pass 'conv3d_unfold' was expected to match 1 times",
    "raises_while_traced": "rank 2 failed: ValueError: boom",
    "stops_calling": "rank 2 left no word",
    "dies_within_a_decode": "rank 2 left no word",
}
OWN = {"fails_to_compile": "PvaeError", "raises_while_traced": "ValueError", "stops_calling": None}


@pytest.mark.parametrize("scenario", TOLD)
def test_every_living_rank_is_told_who_failed(failing: dict[str, Fared], scenario: str) -> None:
    *others, culprit = failing["dies" if scenario.startswith("dies") else "disagree"][scenario]
    told = others if scenario in OWN or scenario.startswith("dies") else [*others, culprit]
    for fared in told:
        assert (fared["raised"], fared["ranks"]) == ("RankError", [2]) and TOLD[scenario] in fared["text"], fared
    for fared in others:
        assert fared["seconds"] < LATEST, fared
    if scenario in OWN:
        assert culprit["raised"] == OWN[scenario]
    if scenario.startswith("dies"):
        assert not culprit


@pytest.mark.parametrize("scenario", ["other_values_unchecked", "all_call_again"])
def test_no_rank_fails_otherwise(failing: dict[str, Fared], scenario: str) -> None:
    """A check that is off costs nothing and says nothing; and after errors that all saw, the ranks can go on."""
    ranks = failing["disagree"][scenario]
    assert all(fared["raised"] is None for fared in ranks)
    assert all(fared.get("error", 0.0) <= FLOAT64_BOUND for fared in ranks)
    assert len({fared.get("sum") for fared in ranks}) == 1
