"""layout_cut: the minimum cut finds what trying every assignment finds, and its own cost formula is the one meant."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvae.passes.layout_cut import CHANNELS_LAST, CONTIGUOUS, IMPOSSIBLE, LayoutProblem

LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)


@st.composite
def problems(draw: st.DrawFn) -> LayoutProblem:
    """Up to eight values in a random order of reading; costs are small whole numbers, so that ties are frequent."""
    count = draw(st.integers(1, 8))
    problem = LayoutProblem()
    for value in range(count):
        costs = [draw(st.integers(0, 5)), draw(st.one_of(st.integers(0, 5), st.just(IMPOSSIBLE)))]
        if draw(st.booleans()):
            costs.reverse()
        problem.add(value, *costs)
    for value in range(count - 1):
        readers = draw(st.lists(st.integers(value + 1, count - 1), max_size=3))
        conversion = draw(st.integers(0, 4))
        for reader in readers:
            problem.read(value, reader, conversion)
    return problem


def every_assignment(problem: LayoutProblem) -> list[dict[object, str]]:
    values = list(problem.costs)
    return [dict(zip(values, layouts, strict=True)) for layouts in itertools.product(LAYOUTS, repeat=len(values))]


@given(problems())
def test_property_no_assignment_costs_less(problem: LayoutProblem) -> None:
    found = problem.solve()
    cheapest = min(map(problem.cost, every_assignment(problem)))
    assert set(found) == set(problem.costs) and problem.cost(found) == cheapest < IMPOSSIBLE
    fewest = [a for a in every_assignment(problem) if problem.cost(a) == cheapest]
    last = [value for value, layout in found.items() if layout == CHANNELS_LAST]
    assert all(set(last) <= {v for v, layout in a.items() if layout == CHANNELS_LAST} for a in fewest)


def chain(conversion: float) -> LayoutProblem:
    """input, contiguous -> convolution, 3 faster in channels_last -> norm, 1 slower so -> result, contiguous."""
    problem = LayoutProblem()
    problem.add("input", 0, IMPOSSIBLE)
    problem.add("convolution", 5, 2)
    problem.add("norm", 1, 2)
    problem.add("result", 0, IMPOSSIBLE)
    for value, reader in (("input", "convolution"), ("convolution", "norm"), ("norm", "result")):
        problem.read(value, reader, conversion)
    return problem


@pytest.mark.parametrize(
    ("conversion", "layouts", "cost"),
    [
        (0.5, (CONTIGUOUS, CHANNELS_LAST, CONTIGUOUS, CONTIGUOUS), 4.0),  # there and back for the convolution alone
        (2.0, (CONTIGUOUS, CONTIGUOUS, CONTIGUOUS, CONTIGUOUS), 6.0),
    ],
)
def test_conversions_only_where_they_pay(conversion: float, layouts: tuple[str, ...], cost: float) -> None:
    problem = chain(conversion)
    found = problem.solve()
    assert tuple(found[v] for v in ("input", "convolution", "norm", "result")) == layouts
    assert problem.cost(found) == cost


def test_several_readers_share_one_conversion() -> None:
    problem = LayoutProblem()
    problem.add("x", 0, IMPOSSIBLE)
    for reader in ("a", "b", "c"):
        problem.add(reader, 1, 0)
        problem.read("x", reader, 2)
    found = problem.solve()
    assert {found[r] for r in ("a", "b", "c")} == {CHANNELS_LAST} and problem.cost(found) == 2
    del problem.reads["x"][0][2], problem.costs["c"]  # two readers do not make up for it
    assert set(problem.solve().values()) == {CONTIGUOUS}


def test_costs_add_up() -> None:
    problem = LayoutProblem()
    problem.add("x", 1, 2)
    problem.add("x", 3, IMPOSSIBLE)
    assert problem.costs["x"] == (4, IMPOSSIBLE) and problem.solve() == {"x": CONTIGUOUS}
