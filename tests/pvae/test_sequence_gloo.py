"""Transformers split by their tokens, in real processes over gloo: results, compiles, and ranks that do not do the same. The
scenarios are in `sequence_gloo.py`; see `test_shard_gloo.py`."""

from __future__ import annotations

from typing import Any

import pytest

from pvae.testing import FLOAT64_BOUND
from tests.pvae.sequence_gloo import SECONDS, SESSIONS
from tests.pvae.test_shard_gloo import Fared, run

pytest.importorskip("diffusers")

WORLDS = {"models": 2, "tokens": 3, "apart": 3, "stops": 3}
AGREEING = ("models", "tokens")
LATEST = 5 * SECONDS  # on a busy machine; a rank that hangs would wait for minutes


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fared]:
    return run(AGREEING, tmp_path_factory.mktemp("agreeing"), "sequence_gloo.py", WORLDS)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fared]:
    return run(["apart", "stops"], tmp_path_factory.mktemp("failing"), "sequence_gloo.py", WORLDS)


# How many kinds of call there are (two blocks of each class, three in the small model), compiles, and graphs that exchange.
FACTS: dict[str, dict[str, Any]] = {
    "wan_whole": {"graphs": 1, "moving": 1},
    "wan_blocks": {"graphs": 2, "compiled": 1, "moving": 2},
    "flux_blocks": {"graphs": 4, "compiled": 2, "moving": 4},
    "guidance_branches": {"graphs": 3, "compiled": 1, "moving": 0},
    # Dynamo compiles for the first block, which is given whole tensors, and for all the others.
    "qwen_image_blocks_by_torch_compile": {"graphs": 2, "moving": 2},
    "inductor_by_torch_compile": {"graphs": 2, "moving": 2},
    "inductor": {"graphs": 3, "compiled": 1},
    "whole_model": {"graphs": 1},
    "whole_model_by_torch_compile": {"graphs": 1},
    "blocks_hand_on_pieces": {
        "pieces": [False, True, True],
        "notes": [["cut before the graph: hidden, texts_0"], [], []],
        "plain": True,
        "graphs": 3,
        "compiled": 1,
    },
    "auto": {"fast forms": ["none"], "slow forms": ["sequence"]},
    "named_inputs": {"cut": [["hidden", "texts_0"]] * 2},
}


@pytest.mark.parametrize(
    ("session", "name"),
    [(s, name) for s in AGREEING for name in SESSIONS[s] if name != "a_name_that_is_not_there"],
)
def test_every_rank_has_the_unsharded_result(agreeing: dict[str, Fared], session: str, name: str) -> None:
    ranks = agreeing[session][name]
    assert len(ranks) == WORLDS[session]
    for fared in ranks:
        assert fared and fared["raised"] is None, fared
        assert fared["error"] <= FLOAT64_BOUND, fared
        assert fared.items() >= FACTS.get(name, {}).items(), fared


def test_pieces_are_uneven(agreeing: dict[str, Fared]) -> None:
    for name, kinds in (("blocks_hand_on_pieces", None), ("results_left_as_pieces", 2)):
        local = [fared["local"] for fared in agreeing["tokens"][name]]
        wanted = [[2, tokens, 24] for tokens in (4, 4, 3)]
        assert local == (wanted if kinds is None else [[shape] * kinds for shape in wanted])


def test_a_name_that_is_not_there(agreeing: dict[str, Fared]) -> None:
    """Every rank says so for itself, and they go on in step."""
    for fared in agreeing["tokens"]["a_name_that_is_not_there"]:
        assert fared["raised"] == "ShardError"
        assert (
            "no tensor argument is called 'image'; this call has hidden [2, 11, 24], texts_0 [2, 5, 24]"
            in fared["text"]
        )


# scenario -> what the ranks are told of rank 2
TOLD = {
    "another_token_count": "shape of input 0: ranks 0, 1 [2,11,6], rank 2 [2,12,6]",
    "another_token_count_block_by_block": "Transformer.blocks.0: the ranks differ (rank 2)",
    "never_calls": f"rank 2 did not call within {SECONDS:g} s; rank ",
    "fails_between_blocks": "Transformer.blocks.1: rank 2 failed: ValueError: boom",
    "fails_before_the_end": "Transformer: rank 2 left no word",
    "stops_after_a_block": "Transformer.blocks.1: rank 2 left no word",
}
OWN = {"fails_between_blocks": "ValueError", "fails_before_the_end": "ValueError", "stops_after_a_block": None}


@pytest.mark.parametrize("name", TOLD)
def test_every_rank_is_told_who_failed(failing: dict[str, Fared], name: str) -> None:
    *others, culprit = next(found[name] for found in failing.values() if name in found)
    for fared in others if name in OWN else [*others, culprit]:
        assert (fared["raised"], fared["ranks"]) == ("RankError", [2]) and TOLD[name] in fared["text"], fared
    for fared in others:
        assert fared["seconds"] < LATEST, fared
    if name in OWN:
        assert culprit["raised"] == OWN[name]


def test_after_an_error_that_all_saw_they_go_on(failing: dict[str, Fared]) -> None:
    for fared in failing["apart"]["all_call_again"]:
        assert fared["raised"] is None and fared["error"] <= FLOAT64_BOUND, fared
