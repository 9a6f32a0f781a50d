"""placement: on real tensors, held in pieces, views move pieces exactly as the placement says, or it refuses them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pvae.passes.placement import (
    Bounds,
    Dim,
    Factor,
    Misfit,
    Placement,
    canonical,
    clip,
    concatenated,
    even,
    rounded,
    spanning,
)

MESH = (3, 2)
COORDINATES = list(product(*map(range, MESH)))


# --- pieces of real tensors ----------------------------------------------------------------------------------------------


def held_rows(dim: Dim, coordinates: Sequence[int]) -> Tensor:
    """The indices of a dimension that a rank holds, in order: outer factors vary slowest."""
    rows = torch.zeros(1, dtype=torch.int64)
    for f in dim:
        own = (0, f.size) if f.axis is None else f.spans[coordinates[f.axis]]
        rows = (rows[:, None] * f.size + torch.arange(*own)).flatten()
    return rows


def piece(whole: Tensor, placement: Placement, coordinates: Sequence[int]) -> Tensor:
    """What the rank at these coordinates holds of `whole`."""
    for d, dim in enumerate(placement.dims):
        whole = whole.index_select(d, held_rows(dim, coordinates))
    return whole


def numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape)).view(tuple(shape))


def check_pieces(placement: Placement, local: Sequence[Tensor], whole: Tensor) -> None:
    assert placement.shape == tuple(whole.shape)
    for coordinates, got in zip(COORDINATES, local, strict=True):
        assert placement.local(coordinates) == tuple(got.shape)
        assert torch.equal(got, piece(whole, placement, coordinates))


# --- strategies ----------------------------------------------------------------------------------------------------------


@st.composite
def bounds_of(draw: st.DrawFn, size: int, world: int, multiple: int = 1) -> Bounds:
    cuts = [multiple * draw(st.integers(0, size // multiple)) for _ in range(world - 1)]
    return (0, *sorted(cuts), size)


@st.composite
def factors(draw: st.DrawFn, axis: int | None) -> Factor:
    size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    if axis is None:
        return Factor(size)
    bounds = draw(bounds_of(size, MESH[axis], draw(st.sampled_from([1, 2]))))
    context: list[tuple[int, int]] = []
    if draw(st.booleans()):
        context = [(draw(st.integers(0, lo)), draw(st.integers(0, size - hi))) for lo, hi in pairwise(bounds)]
    return Factor(size, axis, bounds, tuple(context) if any(map(any, context)) else ())


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Up to six factors, each axis of the mesh in one of them at most, in up to four dimensions."""
    axes = draw(st.permutations([0, 1, None, None]))[: draw(st.integers(1, 4))]
    drawn = [draw(factors(axis)) for axis in axes]
    assume(math.prod(f.size for f in drawn) <= 600)
    cuts = sorted(draw(st.sets(st.integers(1, len(drawn) - 1))) if len(drawn) > 1 else ())
    return Placement(tuple(canonical(drawn[a:b]) for a, b in pairwise([0, *cuts, len(drawn)])))


def shapes_of(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of as many elements."""

    @st.composite
    def build(draw: st.DrawFn) -> tuple[int, ...]:
        rest, shape = size, []
        for _ in range(draw(st.integers(0, 4))):
            shape.append(draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
            rest //= shape[-1]
        return (*shape, rest)

    return build()


# --- factors -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5))
def test_even(size: int, world: int, multiple: int) -> None:
    bounds = even(size, world, multiple)
    assert (len(bounds), bounds[0], bounds[-1]) == (world + 1, 0, size)
    assert all(b % multiple == 0 or b == size for b in bounds)
    units = [math.ceil((hi - lo) / multiple) for lo, hi in pairwise(bounds)]
    assert units == sorted(units, reverse=True) and units[0] - units[-1] <= 1


@given(st.integers(-9, 20), st.integers(0, 20), st.integers(0, 12))
def test_clip(lo: int, length: int, size: int) -> None:
    (a, b), (front, back) = clip((lo, lo + length), size)
    assert 0 <= a <= b <= size and min(front, back) >= 0
    inside = [row if 0 <= row < size else None for row in range(lo, lo + length)]
    assert [None] * front + list(range(a, b)) + [None] * back == inside


@given(st.data(), st.integers(0, 40), st.integers(1, 6))
def test_rounded(data: st.DataObject, size: int, multiple: int) -> None:
    bounds = data.draw(bounds_of(size, 4))
    found = rounded(bounds, multiple)
    assert (found[0], found[-1], len(found)) == (0, size, 5) and list(found) == sorted(found)
    assert all(b % multiple == 0 or b == size for b in found)
    assert all(2 * abs(b - old) <= multiple for b, old in zip(found, bounds, strict=True))
    assert rounded(found, multiple) == found


def test_spanning() -> None:
    assert spanning(9, 0, (0, 4, 9), [(0, 4), (4, 9)]) == Factor(9, 0, (0, 4, 9))
    factor = spanning(9, 1, (0, 4, 9), [(0, 6), (1, 9)])
    assert factor == Factor(9, 1, (0, 4, 9), ((0, 2), (3, 0))) and factor.spans == ((0, 6), (1, 9))
    assert [factor.held((5, r)) for r in range(2)] == [6, 8]
    with pytest.raises(ValueError, match="do not cover"):
        spanning(9, 0, (0, 4, 9), [(0, 3), (4, 9)])


@given(factors(0), st.integers(1, 5))
def test_times_and_over(factor: Factor, k: int) -> None:
    more = factor.times(k)
    assert more.size == k * factor.size and more.over(k) == factor
    assert [more.held((r,)) for r in range(3)] == [k * factor.held((r,)) for r in range(3)]


def test_over_refuses_what_falls_between() -> None:
    assert Factor(12, 0, (0, 5, 12)).over(2) is None
    assert Factor(12, 0, (0, 4, 12), ((0, 1), (2, 0))).over(2) is None
    assert Factor(12, 0, (0, 4, 12), ((0, 2), (2, 0))).over(2) == Factor(6, 0, (0, 2, 6), ((0, 1), (1, 0)))


def test_canonical() -> None:
    split = Factor(6, 0, (0, 3, 6))
    assert canonical([]) == canonical([Factor(1), Factor(1)]) == (Factor(1),)
    assert canonical([Factor(2), Factor(1), Factor(3)]) == (Factor(6),)
    assert canonical([split, Factor(2)]) == (Factor(12, 0, (0, 6, 12)),)
    assert canonical([Factor(2), split, Factor(2), Factor(5)]) == (Factor(2), Factor(60, 0, (0, 30, 60)))
    assert canonical([Factor(1, 0, (0, 0, 1))]) == (Factor(1, 0, (0, 0, 1)),)  # one row, which one rank has


# --- placements ----------------------------------------------------------------------------------------------------------


def test_what_a_placement_says() -> None:
    rows = Factor(5, 0, (0, 2, 4, 5))
    x = Placement(((Factor(2),), (rows,), (Factor(3), Factor(4, 1, (0, 1, 4)))))
    assert (x.shape, x.ndim, x.axes, x.is_whole) == ((2, 5, 12), 3, {0, 1}, False)
    assert x.local((2, 0)) == (2, 1, 3) and x.local((0, 1)) == (2, 2, 9)
    assert [x.splits(d) for d in range(3)] == [False, True, True]
    assert [x.one(d) for d in range(3)] == [None, rows, None]
    assert x.permuted((1, 2, 0)).shape == (5, 12, 2)
    assert x.with_dim(1, [Factor(2), Factor(3)]).dims[1] == (Factor(6),)
    assert Placement.whole((2, 5)) == Placement(((Factor(2),), (Factor(5),))) and Placement.whole((2, 5)).is_whole


@given(placements())
def test_local_shapes_of_all_ranks_add_up(x: Placement) -> None:
    """Without context, every element is held by one rank; or by each along the axes that split nothing."""
    whole = numbered(x.shape)
    held = torch.cat([piece(whole, x, c).flatten() for c in COORDINATES])
    times = torch.bincount(held, minlength=whole.numel())
    copies = math.prod(n for axis, n in enumerate(MESH) if axis not in x.axes)
    if any(f.context for dim in x.dims for f in dim):
        assert times.min() >= copies
    else:
        assert (times == copies).all()
    assert [piece(whole, x, c).numel() for c in COORDINATES] == [math.prod(x.local(c)) for c in COORDINATES]


@given(st.data(), placements())
def test_reshape(data: st.DataObject, x: Placement) -> None:
    """There, the pieces are what the placement says; back again, it is the same placement."""
    whole, shape = numbered(x.shape), data.draw(shapes_of(math.prod(x.shape)))
    try:
        y = x.reshaped(shape)
    except Misfit as misfit:
        check_misfit(x, shape, misfit)
        return
    local = [piece(whole, x, c).reshape(y.local(c)) for c in COORDINATES]
    check_pieces(y, local, whole.view(shape))
    back = y.reshaped(x.shape)
    check_pieces(back, [p.reshape(back.local(c)) for p, c in zip(local, COORDINATES, strict=True)], whole)
    assert back == x or any(
        f.size == 1 for dim in x.dims for f in dim if f.axis is not None
    )  # it may change dimensions


def check_misfit(x: Placement, shape: Sequence[int], misfit: Misfit) -> None:
    """With bounds at the named multiple, it is not this factor that is cut, unless its context is."""
    assert misfit.axis in x.axes
    if misfit.multiple is None:
        return
    dim, at, factor = next(
        (d, i, f) for d, dim in enumerate(x.dims) for i, f in enumerate(dim) if f.axis == misfit.axis
    )
    assert factor.over(misfit.multiple) is None
    better = Factor(factor.size, factor.axis, rounded(factor.bounds, misfit.multiple))
    mended = x.with_dim(dim, [better if i == at else f for i, f in enumerate(x.dims[dim])])
    try:
        mended.reshaped(shape)
    except Misfit as other:
        assert (other.axis, other.multiple) != (misfit.axis, misfit.multiple)


@given(st.data(), placements())
def test_views_of_pieces_are_the_pieces_of_the_view(data: st.DataObject, x: Placement) -> None:
    """A reshape, a permutation, a slice of a whole dimension and another reshape, rank by rank."""
    whole = numbered(x.shape)
    local = [piece(whole, x, c) for c in COORDINATES]

    def reshape(x: Placement, whole: Tensor, local: list[Tensor]) -> tuple[Placement, Tensor, list[Tensor]]:
        shape = data.draw(shapes_of(whole.numel()), "shape")
        try:
            y = x.reshaped(shape)
        except Misfit:
            assume(False)
        return y, whole.reshape(shape), [p.reshape(y.local(c)) for p, c in zip(local, COORDINATES, strict=True)]

    x, whole, local = reshape(x, whole, local)
    order = data.draw(st.permutations(range(x.ndim)), "order")
    x, whole, local = x.permuted(order), whole.permute(order), [p.permute(order) for p in local]
    for d in range(x.ndim):
        if not x.splits(d) and x.shape[d] > 1 and data.draw(st.booleans()):
            start = data.draw(st.integers(0, x.shape[d] - 1))
            x, whole = x.with_dim(d, [Factor(x.shape[d] - start)]), whole.narrow(d, start, x.shape[d] - start)
            local = [p.narrow(d, start, p.shape[d] - start) for p in local]
    x, whole, local = reshape(x, whole, local)
    check_pieces(x, local, whole)


def refusals() -> Iterator[tuple[Placement, tuple[int, ...], int | None]]:
    rows = Factor(12, 0, (0, 5, 8, 12))
    yield Placement(((rows,),)), (4, 3), 3  # 5 and 8 are no multiples of 3
    yield Placement(((rows,),)), (3, 4), 4
    yield Placement(((rows,), (Factor(2),))), (4, 6), 3  # rows of 2 each: 10 and 16 are no multiples of 6
    yield Placement(((rows,),)), (2, 6), 6
    yield Placement(((Factor(2),), (rows,))), (8, 3), 3
    yield Placement(((Factor(2),), (rows,))), (3, 8), None  # cuts across
    yield Placement(((Factor(4),), (Factor(1, 0, (0, 0, 1)),))), (4,), None  # one row, of which only a rank has it


@pytest.mark.parametrize(("x", "shape", "multiple"), list(refusals()))
def test_misfits_and_the_multiple_that_would_fit(x: Placement, shape: tuple[int, ...], multiple: int | None) -> None:
    with pytest.raises(Misfit) as caught:
        x.reshaped(shape)
    assert (caught.value.axis, caught.value.multiple) == (0, multiple)


def test_a_reshape_that_is_none() -> None:
    with pytest.raises(ValueError, match="does not reshape"):
        Placement.whole((4,)).reshaped((5,))


@given(st.data(), st.integers(2, 9), st.integers(1, 3))
def test_pixel_shuffle(data: st.DataObject, n: int, r: int) -> None:
    """(b, c r r, h, w) -> (b, c, r, r, h, w) -> (b, c, h, r, w, r) -> (b, c, h r, w r), split along h and w, and back."""
    rows, columns = Factor(n, 0, data.draw(bounds_of(n, 3))), Factor(5, 1, data.draw(bounds_of(5, 2)))
    x = Placement(((Factor(1),), (Factor(2 * r * r),), (rows,), (columns,)))
    apart = x.reshaped((1, 2, r, r, n, 5)).permuted((0, 1, 4, 2, 5, 3))
    assert apart.dims[2] == (rows,) and apart.dims[4] == (columns,)
    shuffled = apart.reshaped((1, 2, n * r, 5 * r))
    assert shuffled == Placement(((Factor(1),), (Factor(2),), (rows.times(r),), (columns.times(r),)))
    back = shuffled.reshaped((1, 2, n, r, 5, r)).permuted((0, 1, 3, 5, 2, 4)).reshaped(x.shape)
    assert back == x


def test_tokens_of_frames_and_back() -> None:
    """[b, t, h, w, c] -> [b, t * h * w, c]: the tokens are (t, h w split), and nothing moves."""
    x = Placement(((Factor(2),), (Factor(3),), (Factor(4, 0, (0, 1, 2, 4)),), (Factor(5),), (Factor(6),)))
    tokens = x.reshaped((2, 60, 6))
    assert tokens.dims[1] == (Factor(3), Factor(20, 0, (0, 5, 10, 20)))
    assert tokens.reshaped((6, 20, 6)).dims[0] == (Factor(6),) and tokens.reshaped(x.shape) == x


def segmented() -> Factor:
    text, image = Factor(3, 0, (0, 1, 2, 3)), Factor(7, 0, (0, 3, 5, 7))
    return concatenated([text, image])


def test_a_concatenation_of_split_dimensions_leaves_every_rank_its_pieces() -> None:
    both = segmented()
    assert both == Factor(10, 0, (0, 4, 7, 10), parts=((0, 1, 2, 3), (0, 3, 5, 7)))
    assert [both.pieces(r) for r in range(3)] == [[(0, 1), (3, 6)], [(1, 2), (6, 8)], [(2, 3), (8, 10)]]
    held = [i for r in range(3) for lo, hi in both.pieces(r) for i in range(lo, hi)]
    assert sorted(held) == list(range(10))
    assert [held[i] for lo, hi in both.in_order for i in range(lo, hi)] == list(range(10))
    again = concatenated([both, Factor(3, 0, (0, 1, 2, 3))])
    assert again.parts == (*both.parts, (0, 1, 2, 3)) and again.size == 13
    assert concatenated([Factor(3, 0, (0, 1, 2, 3))]) == Factor(3, 0, (0, 1, 2, 3))


def test_segments_scale_and_are_no_single_split() -> None:
    both = segmented()
    assert both.times(2).over(2) == both and both.times(2).pieces(1) == [(2, 4), (12, 16)]
    assert both.times(2).over(4) is None  # the parts' bounds fall between
    placement = Placement.whole((2, 10)).with_dim(1, [both])
    assert placement.one(1) is None and placement.segments(1) == both
    assert placement.local((2,)) == (2, 3)
    heads = placement.reshaped((2, 10, 1))
    assert heads.segments(1) == both
    with pytest.raises(Misfit):
        placement.reshaped((2, 5, 2))
