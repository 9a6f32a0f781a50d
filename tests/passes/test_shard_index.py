"""The sharding rules of indexing, einsum and complex numbers: graphs before and after, what is gathered, what is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.passes.shard_index import einsum_labels
from pvae.runtime.fetch import fetch
from tests.passes.shard_case import ALL, GROUP, HAVE, C, H, N, W, assert_same, assert_shards_to, shard, x_of

torch.fx.wrap("fetch")
aten = torch.ops.aten

ROWS = torch.tensor([8, 0, 3, 3, 1, 5, 0, 6, 2])
PICKED = torch.randint(H, (N, C, H, W), generator=torch.Generator().manual_seed(0))
INTO = torch.stack([torch.stack([torch.randperm(H) for _ in range(W)], 1) for _ in range(C)])[None]
TABLE = torch.randn(7, 5).double()


def cut(x: Any, lo: int = 3, hi: int = 6) -> Any:
    """Rank 1's rows, as all graphs below begin."""
    return aten.slice.Tensor(x, 2, lo, hi)


def put(x: Tensor, *where: Tensor | None, values: Tensor | None = None, accumulate: bool = False) -> Tensor:
    return aten.index_put(x, list(where), x.new_ones(()) if values is None else values, accumulate)


def gather(x: Any, dim: int = 2, have: Any = HAVE) -> Any:
    return fetch(x, dim, have, ALL, 1, "zeros", GROUP)


# --- one graph a family of rule ------------------------------------------------------------------------------------------


def test_rotary_embedding_in_complex_numbers() -> None:
    """The table is whole and is sliced where it meets the tokens."""
    table = torch.polar(torch.ones(H, 2).double(), torch.randn(H, 2).double())

    def before(x: Tensor, table: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(N, C, H, 2, 2)) * table
        return torch.view_as_real(turned).flatten(3)

    def expected(x: Any, table: Any) -> Any:
        pairs = aten.view_as_complex.default(aten.reshape.default(cut(x), [1, 2, 3, 2, 2]))
        turned = aten.mul.Tensor(pairs, aten.slice.Tensor(table, 0, 3, 6))
        return (gather(aten.reshape.default(aten.view_as_real.default(turned), [1, 2, 3, 4])),)

    assert_shards_to(before, expected, x_of(), table, weights=1)


def test_an_index_of_other_dimensions_moves_nothing() -> None:
    def expected(x: Any, rows: Any) -> Any:
        return (gather(aten.index.Tensor(cut(x), [None, None, None, rows])),)

    assert_shards_to(lambda x, rows: x[..., rows], expected, x_of(N, C, H, 9), ROWS, weights=1)

    def selected(x: Any, rows: Any) -> Any:
        return (gather(aten.index_select.default(cut(x), 3, rows)),)

    assert_shards_to(lambda x, rows: x.index_select(3, rows), selected, x_of(N, C, H, 9), ROWS, weights=1)


def test_rows_that_an_index_may_point_to_are_gathered() -> None:
    def expected(x: Any, rows: Any) -> Any:
        return (aten.index.Tensor(gather(cut(x)), [None, None, rows]),)

    assert_shards_to(lambda x, rows: x[:, :, rows], expected, x_of(), ROWS, weights=1)


def test_an_index_that_is_split_picks_for_its_own_rows() -> None:
    """Such as the class of every token, which picks from a table: the table is whole, and no row of the result moves."""

    def before(x: Tensor, table: Tensor) -> Tensor:
        return -(F.embedding((x > 0).long(), table) + table[(x > 1).long()])[..., 0]

    def expected(x: Any, table: Any) -> Any:
        rows = cut(x)
        embedded = aten.embedding.default(table, aten._to_copy.default(aten.gt.Scalar(rows, 0), dtype=torch.int64))
        picked = aten.index.Tensor(table, [aten._to_copy.default(aten.gt.Scalar(rows, 1), dtype=torch.int64)])
        return (gather(aten.neg.default(aten.select.int(aten.add.Tensor(embedded, picked), 4, 0))),)

    assert_shards_to(before, expected, x_of(), TABLE, weights=1, passes="canonicalize,shard")


def test_index_put_writes_the_rows_of_every_rank() -> None:
    def before(x: Tensor, rows: Tensor) -> Tensor:
        return put(x, None, rows, values=-x[:, rows])

    def expected(x: Any, rows: Any) -> Any:
        mine = cut(x)
        written = aten.neg.default(aten.index.Tensor(mine, [None, rows]))
        return (gather(aten.index_put.default(mine, [None, rows], written, False)),)

    assert_shards_to(before, expected, x_of(), torch.tensor([1]), weights=1)


def test_rows_are_written_by_those_who_hold_them() -> None:
    """Such as the rotation of the image tokens of text and image: the write moves no row (the slice moves one, to an empty piece)."""

    def expected(x: Any) -> Any:
        mine = cut(x)
        rows = aten.sin.default(fetch(mine, 2, HAVE, ((3, 4), (3, 6), (6, 8)), 1, "zeros", GROUP))
        return (gather(aten.slice_scatter.default(mine, aten.slice.Tensor(rows, 2, 0, 3), 2, 0, 3)),)

    assert_shards_to(lambda x: x.slice_scatter(x[:, :, 3:8].sin(), 2, 3, 8), expected, x_of())


def test_einsum_over_a_split_dimension_adds_up_partial_sums() -> None:
    def expected(x: Any, w: Any) -> Any:
        plane = aten.select.int(aten.select.int(cut(x), 0, 0), 0, 0)
        partial = aten.einsum.default("hw,hk->wk", [plane, aten.slice.Tensor(w, 0, 3, 6)])
        parts = fetch(aten.unsqueeze.default(partial, 0), 0, (0, 1, 2, 3), ((0, 3),) * 3, 1, "zeros", GROUP)
        return (aten.sum.dim_IntList(parts, [0]),)

    w = torch.randn(H, 5).double()
    found = assert_shards_to(lambda x, w: torch.einsum("hw,hk->wk", x[0, 0], w), expected, x_of(), w, weights=1)
    assert found.fetches == {"partial sums": 1}


def test_partial_sums_of_an_einsum_are_rounded_once() -> None:
    x, w = x_of().bfloat16(), torch.randn(H, 5).bfloat16()
    found = shard(lambda x, w: torch.einsum("nchw,hk->nckw", x, w), x, w, weights=1)
    products = [n for n in found.graphs[0].graph.nodes if n.target is aten.einsum.default]
    assert [n.meta["val"].dtype for n in products] == [torch.float32]
    (first,), *_ = found.run(x, w)
    exact = torch.einsum("nchw,hk->nckw", x.double(), w.double())
    assert first.dtype is torch.bfloat16
    torch.testing.assert_close(first.double(), exact, rtol=2**-8, atol=2**-8)


def test_unpatchify_is_a_permutation() -> None:
    def expected(x: Any) -> Any:
        patches = aten.reshape.default(cut(x), [1, 1, 2, 3, 2, 2])
        turned = aten.reshape.default(aten.einsum.default("nfchpq->nchpfq", [patches]), [1, 2, 6, 2])
        return (fetch(turned, 2, (0, 6, 12, 18), ((0, 18),) * 3, 1, "zeros", GROUP),)

    assert_shards_to(
        lambda x: torch.einsum("nfchpq->nchpfq", x.reshape(1, 1, 2, 9, 2, 2)).reshape(1, 2, 18, 2), expected, x_of()
    )


def test_topk_of_a_whole_dimension_moves_nothing() -> None:
    def before(x: Tensor) -> Tensor:
        values, indices = x.topk(2, 3)
        return values + x.gather(3, indices)

    def expected(x: Any) -> Any:
        mine = cut(x)
        both = aten.topk.default(mine, 2, 3)
        values, indices = operator.getitem(both, 0), operator.getitem(both, 1)
        return (gather(aten.add.Tensor(values, aten.gather.default(mine, 3, indices))),)

    assert_shards_to(before, expected, x_of())


# --- any of them on any mesh ------------------------------------------------------------------------------------------------


SQUARE = torch.randn(W, W).double()
LOCAL: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "polar": (lambda x: torch.view_as_real(torch.polar(x.abs(), x)), ()),
    "complex": (lambda x: torch.complex(x, -x).conj().abs() + torch.complex(x, x * 2).imag, ()),
    "real": (lambda x: torch.view_as_complex(torch.stack([x, x.sin()], -1)).real, ()),
    "fill": (lambda x: torch.where(x > 0, 1.0, x).masked_fill(x < -1, torch.tensor(3.0).double()), ()),
    "masks": (lambda x: ((x > 0) & (x < 1) | (x < -1)).double() + torch.floor_divide(x, 0.3), ()),
    "one hot": (lambda x: F.one_hot((x > 0).long(), 3), ()),
    "topk last": (lambda x: x.topk(3).indices, ()),
    "index behind": (lambda x, rows: x[:, [1, 0]][..., rows % 4], (ROWS,)),
    "index apart": (lambda x, rows: x[rows % 1, :, :, rows % 4], (ROWS,)),
    "split index": (lambda x, t: t[(x[:, :1] > 0).long(), torch.tensor([1, 0])[:, None, None]], (TABLE,)),
    "split select": (lambda x, t: t.index_select(1, (x[0, 0, :, 0] > 0).long()).T + x[0, 0, :, :1], (TABLE,)),
    "gather": (lambda x, at: x.gather(3, at % 4) + x.gather(1, at % 2), (PICKED,)),
    "smaller gather": (lambda x, at: x.gather(3, at[:, :1, :, :3] % 4), (PICKED,)),
    "index copy": (
        lambda x: x.index_copy(1, torch.tensor([1]), x[:, :1]).index_add(3, torch.arange(4), x, alpha=2),
        (),
    ),
    "scatter": (lambda x, at: x.scatter(3, at[..., :1] % 4, x) + x.scatter(3, at[..., :1] % 4, 2.0), (PICKED,)),
    "scatter add": (lambda x, at: x.scatter_add(3, at % 4, x).scatter_reduce(3, at % 4, x, "amax"), (PICKED,)),
    "put": (lambda x: put(x, None, torch.tensor([1, 0]), values=x.sin()), ()),
    "put more": (lambda x: put(x, None, None, None, torch.tensor([1, 1]), values=x[..., :1], accumulate=True), ()),
    "select scatter": (lambda x: x.select_scatter(x[:, 0] * 2, 1, 1), ()),
    "einsum": (lambda x, w: torch.einsum("...w,wv->...v", x, w) + torch.einsum("nchw,nchv->nchw", x, x), (SQUARE,)),
    "implicit": (
        lambda x, w: torch.einsum("nchw,wa", x, w) + torch.einsum("hw,nc", x[0, 0], x[:, :, 0, 0]).mT.sum(),
        (SQUARE,),
    ),
    "outer": (lambda x: torch.outer(x[0, 0, :, 0], x[0, 1, :, 0]), ()),
    "addmm": (lambda x, w: torch.addmm(x[0, 1], x[0, 0], w, beta=2, alpha=0.5), (SQUARE,)),
    "sequences": (lambda x: torch.nn.utils.rnn.pad_sequence([x[0, 0], x[0, 1]], batch_first=True), ()),
    "sequences of": (lambda x: torch.nn.utils.rnn.pad_sequence([x[0, 0], x[0, 1].mT.mT]), ()),
    "vstack": (lambda x: torch.vstack([x, x + 1]), ()),
}
GATHERS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "index": (lambda x, rows: x[:, :, rows] + x.index_select(2, rows), (ROWS,)),
    "gather": (lambda x, at: x.gather(2, at), (PICKED,)),
    "scatter": (lambda x, at: x.scatter(2, at, x.sin()), (INTO,)),
    "put": (lambda x, rows: put(x, None, None, rows[:3], values=x[:, :, :3]), (ROWS,)),
    "rows from elsewhere": (lambda x: x.slice_scatter(x[:, :, :4].sin(), 2, 5, 9), ()),
    "copy": (lambda x: x.index_copy(2, torch.arange(4), x[:, :, 4:8]), ()),
    "select scatter": (lambda x: x.select_scatter(x[:, :, 0] * 2, 2, 8), ()),
    "argsort": (lambda x: x.argsort(2), ()),
    "topk": (lambda x: x.topk(2, 2).values, ()),
    "pairs": (
        lambda x: torch.view_as_complex(
            x.transpose(2, 3).flatten(2)[..., :36].reshape(1, 2, 4, 9).mT[..., :2].contiguous()
        ),
        (),
    ),
}


@pytest.mark.parametrize(("mesh", "dims"), [((4,), "h"), ((2, 2), "hw"), ((11,), "h")], ids=str)
@pytest.mark.parametrize("name", LOCAL)
def test_the_result_of(name: str, mesh: tuple[int, ...], dims: str) -> None:
    function, more = LOCAL[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more), mesh=mesh, shard_dims=dims, passes="canonicalize,shard")
    assert not found.report.refusals
    assert_same(found, function, *args)


@pytest.mark.parametrize("name", GATHERS)
def test_what_gathers_a_dimension(name: str) -> None:
    function, more = GATHERS[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more), mesh=(4,), passes="canonicalize,shard")
    assert not found.report.refusals and found.fetches["gather"] >= 1
    assert_same(found, function, *args)


# --- what is computed whole ----------------------------------------------------------------------------------------------

WHOLE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str, str]] = {
    "mask": (
        lambda x, mask: x.index_put((mask,), torch.tensor(2.0).double()),
        (torch.tensor([True]),),
        "index_put.default",
        "it indexes by a mask, whose values say how many rows there are",
    ),
    "lengths": (
        lambda x: torch.nn.utils.rnn.pad_sequence([x[0, 0], x[0, 1, :5]]),
        (),
        "pad_sequence.default",
        "the sequences have different lengths, and are padded at their ends",
    ),
    "stacked rows": (
        lambda x: torch.vstack([x[0, 0, :, 0], x[0, 1, :, 0]]),
        (),
        "vstack.default",
        "an operand is a vector",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_computed_whole_and_why(name: str) -> None:
    function, more, op, reason = WHOLE[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more))
    assert found.whole == {op: reason}
    assert all("bytes gathered" in r.note for r in found.report.refusals)
    assert_same(found, function, *args)


def test_letters_of_an_einsum() -> None:
    assert einsum_labels("ij,jk->ik", [2, 2]) == (["ij", "jk"], "ik")
    assert einsum_labels("ba, cb", [2, 2]) == (["ba", "cb"], "ac")
    assert einsum_labels("...i,ij->...j", [3, 2]) == (["ABi", "ij"], "ABj")
    assert einsum_labels("b...,...a", [3, 2]) == (["bAB", "Ba"], "ABab")
