"""index_map: pieces made from nothing but the rows that it asks for are those of the op on the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pvae.passes.index_map import (
    Flip,
    IndexMap,
    Local,
    Pool,
    Repeat,
    Resample,
    Transposed,
    Window,
    cat_bounds,
    cat_needs,
    follow,
    locals_of,
    pad,
    slicing,
)
from pvae.passes.placement import Bounds, Interval, clip, even

aten = torch.ops.aten
DIM = 2  # the split dimension of every tensor below
SIZES = st.integers(1, 24)


@st.composite
def bounds_of(draw: st.DrawFn, size: int) -> Bounds:
    cuts = draw(st.lists(st.integers(0, size), max_size=4))
    return (0, *sorted(cuts), size)


def is_partition(bounds: Bounds, size: int) -> bool:
    return bounds[0] == 0 and bounds[-1] == size and all(lo <= hi for lo, hi in pairwise(bounds))


def activation(n: int, channels: int = 2) -> Tensor:
    return torch.randn(1, channels, n, 5, dtype=torch.float64)


def take(x: Tensor, need: Interval, fill: str = "constant") -> Tensor:
    """What `pvae::fetch` gives: the rows `need` of `x`, filled outside."""
    n, at = x.shape[DIM], torch.arange(*need)
    if fill == "constant":
        inside = ((at >= 0) & (at < n)).to(x.dtype)
        shape = [1] * x.dim()
        shape[DIM] = len(at)
        return x.index_select(DIM, at.clamp(0, n - 1)) * inside.view(shape)
    if fill == "circular":
        return x.index_select(DIM, at % n)
    if fill == "reflect":
        at = at.abs()
        at = torch.where(at >= n, 2 * (n - 1) - at, at)
    return x.index_select(DIM, at.clamp(0, n - 1))


def gather(x: Tensor, todo: Local, *_: int) -> Tensor:
    def weights(tap: Any) -> Tensor:
        return torch.tensor(tap.weight, dtype=x.dtype).view([-1 if d == DIM else 1 for d in range(x.dim())])

    return sum((x.index_select(DIM, torch.tensor(t.index)) * weights(t) for t in todo.taps), torch.zeros(()))


def check(
    data: st.DataObject,
    op: IndexMap,
    x: Tensor,
    whole: Tensor,
    local: Callable[[Tensor, Local, int], Tensor],
    fill: str = "constant",
    tight: bool = True,
) -> None:
    """Each rank's piece, made by `local` from the rows it needs, for bounds that follow the input's and any others.

    `tight`: the outermost of these rows are indeed read.
    """
    n, m = x.shape[DIM], whole.shape[DIM]
    have = data.draw(bounds_of(n), "have")
    assert op.size(n) == m
    followed = follow(op, have)
    assert is_partition(followed, m)
    if m == n:
        assert followed == have
    else:
        for (first, last), (lo, hi) in zip(pairwise(have), pairwise(followed), strict=True):
            assert all(first <= min(max(op.home(j, n), 0), n - 1) < last for j in range(lo, hi))
    for want in (followed, data.draw(bounds_of(m), "want")):
        pieces = []
        for todo, (lo, hi) in zip(locals_of(op, n, want), pairwise(want), strict=True):

            def piece(y: Tensor, todo: Local = todo, rows: int = hi - lo) -> Tensor:
                result = local(y, todo, rows)
                return result.narrow(DIM, todo.crop[0], result.shape[DIM] - sum(todo.crop))

            y = take(x, todo.need, fill)
            pieces.append(piece(y))
            assert min(todo.crop) >= 0 and pieces[-1].shape[DIM] == hi - lo
            for end in (0, y.shape[DIM] - 1) if tight and lo < hi else ():
                if 0 <= todo.need[0] + end < n:
                    poisoned = y.clone()
                    poisoned[:, :, end] = math.nan
                    assert piece(poisoned).isnan().any()
        torch.testing.assert_close(torch.cat(pieces, DIM), whole, rtol=1e-12, atol=1e-12)


@given(st.data(), SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6))
def test_convolution(data: st.DataObject, n: int, k: int, s: int, d: int, front: int, back: int) -> None:
    op = Window(k, s, d, (front, back))
    assume(op.size(n) > 0 and n + front + back >= op.span)
    x, w, b = activation(n), torch.randn(3, 2, k, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = F.conv2d(F.pad(x, (0, 0, front, back)), w, b, (s, 1), (0, 1), (d, 1))
    check(data, op, x, whole, lambda y, todo, _: F.conv2d(y, w, b, (s, 1), (todo.padding[0], 1), (d, 1)))


@given(st.data(), SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_max_pool(data: st.DataObject, n: int, k: int, s: int, d: int, p: int, ceil_mode: bool) -> None:
    op = Pool(k, s, d, (p, p), ceil_mode)
    assume(p <= k // 2 and n + 2 * p >= op.span)
    x = activation(n) - 5  # padding by zeros would show
    whole = F.max_pool2d(x, (k, 1), (s, 1), (p, 0), (d, 1), ceil_mode)
    check(
        data,
        op,
        x,
        whole,
        lambda y, t, _: F.max_pool2d(y, (k, 1), (s, 1), (t.padding[0], 0), (d, 1), ceil_mode),
        tight=False,
    )


@given(st.data(), SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.booleans(), st.booleans())
def test_avg_pool(data: st.DataObject, n: int, k: int, s: int, p: int, ceil_mode: bool, count: bool) -> None:
    op = Pool(k, s, 1, (p, p), ceil_mode)
    assume(p <= k // 2 and n + 2 * p >= k)
    x = activation(n)

    def pool(y: Tensor, padding: int) -> Tensor:
        return F.avg_pool2d(y, (k, 1), (s, 1), (padding, 0), ceil_mode, count)

    check(data, op, x, pool(x, p), lambda y, todo, _: pool(y, todo.padding[0]), tight=False)
    if count and not ceil_mode:  # then the padding is plain zeros
        check(data, Window(k, s, 1, (p, p)), x, pool(x, p), lambda y, todo, _: pool(y, todo.padding[0]))


@given(st.data(), SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(0, 3))
def test_transposed_convolution(data: st.DataObject, n: int, k: int, s: int, d: int, p: int, extra: int) -> None:
    op = Transposed(k, s, d, p, extra)
    assume(extra < max(s, d) and op.size(n) > 0)
    x, w, b = activation(n), torch.randn(2, 3, k, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = F.conv_transpose2d(x, w, b, (s, 1), (p, 1), (extra, 0), 1, (d, 1))
    check(
        data,
        op,
        x,
        whole,
        lambda y, *_: F.conv_transpose2d(y, w, b, (s, 1), (0, 1), 0, 1, (d, 1)),
        tight=d == 1 and k >= s,
    )


@given(
    st.data(),
    SIZES,
    st.integers(-3, 6),
    st.integers(-3, 6),
    st.sampled_from(["constant", "replicate", "reflect", "circular"]),
)
def test_pad(data: st.DataObject, n: int, front: int, back: int, fill: str) -> None:
    assume(n + front + back > 0 and n + min(front, back) > 0)
    assume(fill != "reflect" or max(front, back) < n)
    assume(fill != "circular" or (max(front, back) <= n and min(front, back) >= 0))
    x = activation(n)
    check(data, pad(front, back), x, F.pad(x, (0, 0, front, back), mode=fill), lambda y, *_: y, fill)


@given(st.data(), SIZES, st.integers(0, 6), st.integers(0, 6))
def test_pad_by_another_constant(data: st.DataObject, n: int, front: int, back: int) -> None:
    x, op = activation(n), pad(front, back)
    want = data.draw(bounds_of(op.size(n)))
    pieces = []
    for todo, (lo, hi) in zip(locals_of(op, n, want), pairwise(want), strict=True):
        (a, b), around = clip(todo.need, n)
        pieces.append(F.pad(x[:, :, a:b], (0, 0, *around), value=7.0)[:, :, : hi - lo])
    assert torch.equal(torch.cat(pieces, DIM), F.pad(x, (0, 0, front, back), value=7.0))


@given(st.data(), SIZES, st.integers(1, 5))
def test_slice(data: st.DataObject, n: int, step: int) -> None:
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)), "slice"))
    x = activation(n)
    check(data, slicing(n, start, stop, step), x, x[:, :, start:stop:step], lambda y, *_: y[:, :, ::step])


@given(st.data(), SIZES, st.integers(1, 4))
def test_flip_and_repeats(data: st.DataObject, n: int, times: int) -> None:
    x = activation(n)
    check(data, Flip(), x, x.flip(DIM), lambda y, *_: y.flip(DIM))
    check(data, Repeat(times), x, x.repeat(1, 1, times, 1), gather)
    inner = x.repeat_interleave(times, DIM)
    check(data, Resample("nearest", times * n), x, inner, lambda y, *_: y.repeat_interleave(times, DIM))


UPSAMPLE: dict[tuple[str, int], Any] = {
    ("nearest", 2): aten.upsample_nearest2d.default,
    ("nearest", 3): aten.upsample_nearest3d.default,
    ("nearest-exact", 2): aten._upsample_nearest_exact2d.default,
    ("nearest-exact", 3): aten._upsample_nearest_exact3d.default,
    ("linear", 2): aten.upsample_bilinear2d.default,
    ("linear", 3): aten.upsample_trilinear3d.default,
}
FACTORS = st.sampled_from([1.0, 2.0, 3.0, 4.0, 8.0, 1.5, 2.5, 4 / 3, 0.5, 0.25, 1.1, 2.3]) | st.floats(0.2, 5)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
@pytest.mark.parametrize("dims", [2, 3])
@given(
    data=st.data(),
    n=SIZES,
    factor=FACTORS,
    given_scale=st.booleans(),
    align=st.booleans(),
    channels_last=st.booleans(),
    channels=st.integers(1, 3),
)
def test_resample(
    data: st.DataObject,
    mode: Any,
    dims: int,
    n: int,
    factor: float,
    given_scale: bool,
    align: bool,
    channels_last: bool,
    channels: int,
) -> None:
    out = math.floor(n * factor)
    assume(out > 0)
    op = Resample(mode, out, factor if given_scale else None, align and mode == "linear")
    other = (7, 3)[: dims - 1]
    x = torch.randn(1, channels, n, 5, 2, dtype=torch.float64) if dims == 3 else activation(n, channels)
    x = x.to(memory_format=torch.channels_last_3d if dims == 3 else torch.channels_last) if channels_last else x
    flags = (op.align_corners,) if mode == "linear" else ()
    no_scales = (None,) * (dims - 1)

    def call(y: Tensor, size: int, scale: float | None) -> Tensor:
        return UPSAMPLE[mode, dims](y, [size, *other], *flags, scale, *no_scales)

    def local(y: Tensor, todo: Local, rows: int) -> Tensor:
        if todo.taps:
            y = gather(y, todo)
            return call(y, y.shape[DIM], None)  # the op still does the other dimensions
        return call(y, rows + sum(todo.crop), op.scale)

    sure = len({tuple(at) for at in op.sources(np.arange(out), n)}) == 1  # else everything is needed
    check(data, op, x, call(x, out, op.scale), local, tight=sure)


def test_the_example_of_the_module() -> None:
    conv, have = Window(kernel=3, stride=2, padding=(1, 1)), even(17, 3)
    want = follow(conv, have)
    assert (have, want) == ((0, 6, 12, 17), (0, 3, 6, 9))
    assert locals_of(conv, have[-1], want)[1] == Local((5, 12))


def test_pooling_begins_at_the_last_possible_multiple_of_the_stride() -> None:
    assert locals_of(Pool(3, 2, padding=(1, 1)), 16, (0, 4, 8))[1] == Local((6, 16), (1, 1), (1, 0))
    assert locals_of(Pool(2, 2), 16, (0, 4, 8))[1] == Local((8, 16))


@pytest.mark.parametrize(
    ("op", "n", "bounds", "rank", "expected"),
    [
        (Pool(3, 2, ceil_mode=True), 4, (0, 1, 2), 1, Local((0, 4), (0, 0), (1, 0))),  # backwards, by a stride
        (Pool(4, 1, padding=(2, 2)), 8, (0, 1, 9), 0, Local((0, 4), (2, 2), (0, 4))),  # forwards
        (Pool(3, 1, padding=(1, 1)), 2, (0, 1, 2), 0, Local((0, 2), (1, 1), (0, 1))),  # there is no more
    ],
    ids=["backwards", "forwards", "all"],
)
def test_pools_of_thin_pieces_reach_as_far_as_the_kernel(
    op: Pool, n: int, bounds: Bounds, rank: int, expected: Local
) -> None:
    """torch refuses to pool an input smaller than the kernel."""
    assert locals_of(op, n, bounds)[rank] == expected


@given(st.data(), SIZES, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_pools_never_see_less_than_the_kernel(data: st.DataObject, n: int, k: int, s: int, ceil_mode: bool) -> None:
    op = Pool(k, s, 1, (k // 2, k // 2), ceil_mode)
    for todo in locals_of(op, n, data.draw(bounds_of(op.size(n)))):
        assert min(k, n) <= todo.need[1] - todo.need[0] and 0 <= todo.need[0] <= todo.need[1] <= n


def test_whole_factors_need_no_taps() -> None:
    modes: list[Any] = ["nearest", "nearest-exact", "linear"]
    for mode, factor, scaled in product(modes, (1, 2, 3, 4, 8, 16), (False, True)):
        op = Resample(mode, 30 * factor, float(factor) if scaled else None)
        todo = locals_of(op, 30, (0, 10 * factor, 30 * factor))[1]
        halo = mode == "linear" and factor > 1
        assert not todo.taps and todo.need == (9 if halo else 10, 30)


def test_aligned_corners_stay_inside() -> None:
    for n, out in product(range(1, 60), range(1, 120)):
        last = locals_of(Resample("linear", out, align_corners=True), n, (0, out - 1, out))[1]
        assert last.need[1] <= n


def test_taps_where_the_scale_is_not_the_sizes() -> None:
    assert [len(t.taps) for t in locals_of(Resample("linear", 6, 2.3), 3, (0, 3, 6))] == [2, 2]
    assert [len(t.taps) for t in locals_of(Resample("nearest", 9), 6, (0, 3, 9))] == [1, 1]


def test_rows_that_kernels_disagree_on_are_computed_from_the_whole() -> None:
    """Out of 2 rows by 1.25 make 2; torch's channels-last kernel copies them, its other one takes the first twice."""
    assert locals_of(Resample("nearest", 2, 1.25), 2, (0, 1, 2)) == (
        Local((0, 2), crop=(0, 1)),
        Local((0, 2), crop=(1, 0)),
    )


@given(st.data(), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 5))
def test_cat(data: st.DataObject, sizes: list[int], world: int) -> None:
    xs = [activation(n) for n in sizes]
    whole = torch.cat(xs, DIM)
    want = cat_bounds([even(n, world) for n in sizes])
    assert is_partition(want, whole.shape[DIM])
    for bounds in (want, data.draw(bounds_of(sum(sizes)))):
        pieces = [
            torch.cat([x[:, :, a:b] for x, (a, b) in zip(xs, cat_needs(sizes, lo, hi), strict=True)], DIM)
            for lo, hi in pairwise(bounds)
        ]
        assert torch.equal(torch.cat(pieces, DIM), whole)
        assert all(a <= b for lo, hi in pairwise(bounds) for a, b in cat_needs(sizes, lo, hi))


def test_cat_keeps_a_large_operand_in_place() -> None:
    assert cat_bounds([even(2, 4), even(40, 4)]) == (0, 12, 22, 32, 42)
    assert cat_bounds([even(40, 4), even(40, 4)]) == even(80, 4)
