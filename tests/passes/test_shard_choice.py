"""The chooser: which candidates there are, the memory cap, the margin for the simpler one, and that it says why."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pvae.passes.cost import Cost
from pvae.passes.machine import H200
from pvae.passes.shard_choice import NONE, Candidate, Choice, candidates, choose, mesh_shapes

H2, H4, W4 = Candidate("halo", "h", (2,)), Candidate("halo", "h", (4,)), Candidate("halo", "w", (4,))
HW4, PATCH4 = Candidate("halo", "hw", (2, 2)), Candidate("patch", "h", (4,))
GIB = 2**30


def decide(seconds: Mapping[Candidate, float], gib: Mapping[Candidate, int] | None = None) -> Choice:
    costs = {c: Cost(arithmetic=s, peak=(gib or {}).get(c, 1) * GIB) for c, s in seconds.items()}
    return choose(list(seconds), costs.__getitem__, H200)


def test_candidates_of_four_ranks() -> None:
    names = list(map(str, candidates(4)))
    assert names == ["none", "halo h 2", "halo w 2", "halo h 4", "halo w 4", "halo hw 2x2"]
    assert [str(c) for c in candidates(4, approximate=True)][-3:] == ["patch h 4", "patch w 4", "patch hw 2x2"]
    assert all(c.form != "patch" for c in candidates(8))
    assert candidates(4, form="halo", dims="h", fewer=False) == [H4]
    assert candidates(4, mesh=(2, 2), form="halo") == [HW4]
    assert candidates(1, form="halo") == candidates(8, form="none") == [NONE]


def test_meshes_are_as_square_as_can_be() -> None:
    assert mesh_shapes(12, "hw") == [(3, 4), (4, 3)]
    assert mesh_shapes(9, "hw") == [(3, 3)]
    assert mesh_shapes(7, "hw") == []
    assert mesh_shapes(7, "w") == [(7,)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"form": "tile"}, "auto, none, halo, patch"),
        ({"dims": "x"}, "auto, h, w, hw"),
        ({"mesh": (3,)}, "not one of 5 ranks"),
        ({"form": "halo", "dims": "hw"}, "no grid"),
    ],
)
def test_what_there_is_not(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        candidates(5, **arguments)


def test_the_fastest_wins_by_more_than_the_margin() -> None:
    choice = decide({NONE: 1.0, H2: 0.6, H4: 0.4, W4: 0.45, HW4: 0.5})
    assert choice.candidate == H4
    assert "fastest" in choice.reason and "2.50x" in choice.reason
    assert {str(c.candidate): c.verdict for c in choice.considered} == {
        "none": "slower",
        "halo h 2": "slower",
        "halo h 4": "chosen",
        "halo w 4": "slower",
        "halo hw 2x2": "slower",
    }


def test_a_gain_below_the_margin_goes_to_the_simpler_one() -> None:
    assert decide({NONE: 1.0, H4: 0.40, W4: 0.39, HW4: 0.385}).candidate == H4
    assert decide({NONE: 1.0, H2: 0.41, H4: 0.40}).candidate == H2
    assert decide({NONE: 1.0, H2: 0.43, H4: 0.40}).candidate == H4
    small = decide({NONE: 1.0, H4: 0.96})
    assert small.candidate == NONE and "too small to gain" in small.reason
    tie = decide({HW4: 0.5, W4: 0.5, H4: 0.5, PATCH4: 0.5, NONE: 1.0})
    assert tie.candidate == H4


def test_too_small_stays_whole_and_says_so() -> None:
    choice = decide({NONE: 1.0, H2: 1.5, H4: 1.3})
    assert choice.candidate == NONE
    assert "too small to gain" in choice.reason and "1300.00 ms" in choice.reason


def test_memory_rules_out() -> None:
    cap = int(H200.capacity / GIB)
    choice = decide({NONE: 1.0, H2: 1.2, H4: 1.5}, {NONE: 2 * cap, H2: cap + 1, H4: cap - 1})
    assert choice.candidate == H4 and "only halo h 4 fits" in choice.reason
    assert "needs" in next(c.verdict for c in choice.considered if c.candidate == NONE)
    nothing = decide({NONE: 1.0, H4: 1.5}, {NONE: 4 * cap, H4: 2 * cap})
    assert nothing.candidate == H4 and "nothing fits" in nothing.reason


def test_impossible_candidates_are_left_out_and_said() -> None:
    choice = choose([NONE, H2], lambda c: "no picture" if c == H2 else Cost(arithmetic=1.0), H200)
    assert choice.candidate == NONE
    assert choice.considered[1].verdict == "impossible: no picture" and choice.considered[1].cost is None
    with pytest.raises(ValueError, match="no picture"):
        choose([H2], lambda c: "no picture", H200)
