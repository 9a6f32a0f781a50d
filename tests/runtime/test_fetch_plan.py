"""The plan of `fetch`, run on row numbers in plain Python, against indexing of the whole."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from pvae.runtime.fetch_plan import Fill, Plan, fetch_plan

ZERO = -1  # stands for a row of zeros


def row_at(index: int, size: int, fill: str) -> int:
    """What `fill` puts at a global index."""
    if 0 <= index < size:
        return index
    match fill:
        case "zeros":
            return ZERO
        case "replicate":
            return 0 if index < 0 else size - 1
        case "reflect":
            return -index if index < 0 else 2 * (size - 1) - index
        case _:
            return index % size


def run(plan: Plan, have: tuple[int, ...]) -> list[list[int]]:
    """Each rank's result, with row r of the whole being the number r."""
    world = len(plan.ranks)
    own = [list(range(have[rank], have[rank + 1])) for rank in range(world)]
    sent = [[[row for a, b in rows for row in own[r][a:b]] for rows in plan.ranks[r].send] for r in range(world)]
    results = []
    for rank, mine in enumerate(plan.ranks):
        if plan.kind == "gather":
            received = [row for piece in own for row in [*piece, *[None] * (plan.longest - len(piece))]]
        else:
            assert [len(sent[r][rank]) for r in range(world)] == list(mine.receive_splits)
            assert [len(rows) for rows in sent[rank]] == list(mine.send_splits)
            assert all(len(set(rows)) == len(rows) for rows in sent[rank]), "a row goes to a rank once"
            received = [row for r in range(world) for row in sent[r][rank]]
        result: list[Any] = []
        for part in mine.parts:
            if part.origin == "zeros":
                result += [ZERO] * (part.stop - part.start)
                continue
            rows = (own[rank] if part.origin == "own" else received)[part.start : part.stop]
            assert len(rows) == part.stop - part.start > 0
            assert part.repeat == 1 or len(rows) == 1
            result += (rows[::-1] if part.flip else rows) * part.repeat
        results.append(result)
    return results


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], Fill]:
    """Pieces of 0 to 5 rows on 1 to 6 ranks; needs anywhere that the fill allows: thin, wide, empty, equal to all."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    have = (0, *accumulate(lengths))
    size = have[-1]
    fill = draw(st.sampled_from(get_args(Fill)))
    reach = {"reflect": max(size - 1, 0), "zeros": size + 4}.get(fill, size + 4 if size else 0)
    anywhere = st.tuples(st.integers(-reach, size + reach), st.integers(-reach, size + reach)).map(sorted).map(tuple)
    halo = draw(st.integers(0, min(reach, 3)))
    shape = draw(st.sampled_from(["any", "halo", "all"]))
    need = []
    for rank in range(len(lengths)):
        match shape:
            case "any":
                need.append(draw(anywhere))
            case "halo":
                need.append((have[rank] - halo, have[rank + 1] + halo))
            case _:
                need.append((-halo, size + halo))
    return have, tuple(need), fill


@given(cases())
def test_plan_is_indexing_of_the_whole(case: tuple[Any, Any, Fill]) -> None:
    have, need, fill = case
    plan = fetch_plan(have, need, fill)
    expected = [[row_at(index, have[-1], fill) for index in range(*interval)] for interval in need]
    assert run(plan, have) == expected
    alien = [
        row != ZERO and not have[rank] <= row < have[rank + 1] for rank, rows in enumerate(expected) for row in rows
    ]
    assert (plan.kind == "local") == (not any(alien))
    assert plan.kind == "gather" or not any(mine.send[rank] for rank, mine in enumerate(plan.ranks))


@pytest.mark.parametrize("fill", get_args(Fill))
def test_fill_is_that_of_torch(fill: Fill) -> None:
    whole = torch.arange(1.0, 7.0)[None, None]  # row r is the number r + 1, zeros are 0
    mode = "constant" if fill == "zeros" else fill
    expected = (pad(whole, (4, 5), mode=mode).flatten().long() - 1).tolist()
    assert run(fetch_plan((0, 6), ((-4, 11),), fill), (0, 6)) == [expected]
    have = (0, 1, 1, 4, 6)
    assert run(fetch_plan(have, ((-4, 11),) * 4, fill), have) == [expected] * 4


def test_kinds() -> None:
    assert fetch_plan((0, 4, 8), ((1, 3), (4, 8))).kind == "local"
    assert fetch_plan((0, 4, 8), ((-1, 5), (3, 9))).kind == "exchange"
    assert fetch_plan((0, 4, 8), ((0, 8), (0, 8))).kind == "gather"
    assert fetch_plan((0, 3, 8), ((0, 8), (-1, 8))).kind == "gather"
    # A broadcast: padded pieces would be three times the data, most of it nothing.
    plan = fetch_plan((0, 0, 8, 8), ((0, 8),) * 3)
    assert plan.kind == "exchange"
    assert [mine.send_splits for mine in plan.ranks] == [(0, 0, 0), (8, 0, 8), (0, 0, 0)]


def test_a_row_wanted_twice_is_sent_once() -> None:
    plan = fetch_plan((0, 4, 4), ((0, 0), (-3, 7)), "reflect")
    assert plan.ranks[0].send == ((), ((0, 4),))
    assert plan is fetch_plan((0, 4, 4), ((0, 0), (-3, 7)), "reflect"), "cached"


@pytest.mark.parametrize(
    ("have", "need", "fill", "says"),
    [
        ((0, 4), ((-4, 4),), "reflect", "4 beyond the 4 rows there are: reflect reaches 3 at most"),
        ((0, 0), ((0, 1),), "reflect", "reflect reaches 0 at most"),
        ((0, 0), ((0, 1),), "replicate", "zeros takes none"),
        ((0, 0), ((-1, 1),), "circular", "zeros takes none"),
        ((0, 4), ((3, 2),), "zeros", "must not stop before it starts"),
        ((0, 4, 8), ((0, 4),), "zeros", "1 intervals; 2 ranks"),
        ((0, 5, 4), ((0, 4), (0, 4)), "zeros", "never decrease"),
        ((1, 4), ((0, 4),), "zeros", "never decrease"),
        ((0, 4), ((0, 4),), "mirror", "none of zeros, replicate, reflect, circular"),
    ],
)
def test_refusals(have: Any, need: Any, fill: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fetch_plan(have, need, fill)
