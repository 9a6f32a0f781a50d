"""The sharding rules of ops: each family as a graph before and after, what moves nothing, what is computed whole and why.

That sharded models compute what unsharded ones do is the subject of `test_shard_property.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.passes.ir import value
from pvae.runtime.fetch import fetch
from pvae.runtime.resample import weighted_rows
from pvae.testing import structure
from tests.passes.shard_case import GROUP, HAVE, C, H, N, W, assert_same, assert_shards_to, shard, x_of

torch.fx.wrap("fetch")
torch.fx.wrap("weighted_rows")
aten = torch.ops.aten


def cut(x: Any) -> Any:
    """Rank 1's rows, as all graphs below begin."""
    return aten.slice.Tensor(x, 2, 3, 6)


def halo(x: Any, need: Any, dim: int = 2, have: Any = HAVE, fill: str = "zeros") -> Any:
    return fetch(x, dim, have, need, 1, fill, GROUP)


def gather(x: Any, dim: int = 2, have: Any = HAVE) -> Any:
    return (halo(x, ((0, have[-1]),) * 3, dim, have),)


# --- one graph a family of rule ------------------------------------------------------------------------------------------


def test_convolutions_fetch_their_halo_once() -> None:
    """Two that read the same rows share the fetch; the padding of the split dimension is what is fetched as zeros."""
    w = torch.randn(C, C, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1) + F.conv2d(x, w, stride=1, padding=1, groups=1)

    def expected(x: Any, w: Any) -> Any:
        rows = halo(cut(x), ((-1, 4), (2, 7), (5, 10)))
        a, b = (aten.conv2d.default(rows, w, None, [1, 1], [0, 1], [1, 1], 1) for _ in range(2))
        return gather(aten.add.Tensor(a, b))

    assert_shards_to(before, expected, x_of(), w, weights=1)


def test_the_encoders_downsampling() -> None:
    """One row of zeros behind and stride 2: one fetch brings a row of halo to the rank in front, and the last its zeros."""
    w = torch.randn(C, C, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2)

    def expected(x: Any, w: Any) -> Any:
        rows = aten.slice.Tensor(x, 2, 4, 8)
        rows = halo(rows, ((0, 5), (4, 9), (8, 11)), 2, (0, 4, 8, 10))
        padded = aten.pad.default(rows, [0, 1, 0, 0], "constant", 0.0)
        return gather(aten.conv2d.default(padded, w, None, [2, 2], [0, 0], [1, 1], 1), 2, (0, 2, 4, 5))

    assert_shards_to(before, expected, x_of(N, C, 10, W), w, weights=1)


def test_pooling_keeps_its_padding_and_crops() -> None:
    def expected(x: Any) -> Any:
        rows = halo(cut(x), ((0, 4), (2, 7), (5, 9)))
        pooled = aten.max_pool2d.default(rows, [3, 3], [1, 1], [1, 1])
        return gather(aten.slice.Tensor(pooled, 2, 1, 4))

    assert_shards_to(lambda x: F.max_pool2d(x, 3, 1, 1), expected, x_of())


def test_interpolation() -> None:
    """Nearest by two moves nothing; linear by two takes a halo and crops; by 1.5 it is a weighted gather of rows."""

    def nearest(x: Any) -> Any:
        return gather(aten.upsample_nearest2d.vec(cut(x), None, [2.0, 2.0]), 2, (0, 6, 12, 18))

    assert_shards_to(lambda x: F.interpolate(x, scale_factor=2.0), nearest, x_of())

    def linear(x: Any) -> Any:
        up = aten.upsample_bilinear2d.vec(halo(cut(x), ((0, 4), (2, 7), (5, 9))), None, False, [2.0, 2.0])
        return gather(aten.slice.Tensor(up, 2, 2, 8), 2, (0, 6, 12, 18))

    assert_shards_to(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), linear, x_of())

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(12, 4), mode="bilinear")

    found = shard(resized, x := x_of())
    (node,) = [n for n in found.graphs[1].graph.nodes if n.target is weighted_rows]
    assert len(node.args[2]) == 2 and value(node).shape[2] == 4
    assert_same(found, resized, x)


def test_transposed_convolution_crops_what_it_pads() -> None:
    w = torch.randn(C, C, 4, 4, dtype=torch.float64)

    def expected(x: Any, w: Any) -> Any:
        rows = halo(cut(x), ((-1, 4), (2, 7), (5, 10)))
        up = aten.conv_transpose2d.input(rows, w, None, [2, 2], [0, 1], [0, 0], 1, [1, 1])
        return gather(aten.slice.Tensor(up, 2, 3, 9), 2, (0, 6, 12, 18))

    assert_shards_to(lambda x, w: F.conv_transpose2d(x, w, None, 2, 1), expected, x_of(), w, weights=1)


def test_reflected_padding_is_fetched() -> None:
    def expected(x: Any) -> Any:
        rows = halo(cut(x), ((-2, 3), (3, 6), (6, 10)), fill="reflect")
        padded = aten.pad.default(rows, [1, 1, 0, 0], "reflect", None)
        return gather(padded, 2, (0, 5, 8, 12))

    assert_shards_to(lambda x: F.pad(x, (1, 1, 2, 1), "reflect"), expected, x_of())


def test_views_have_their_sizes_derived_anew() -> None:
    """Sizes burnt into the graph are those of the piece; pixel shuffle, tokens and back move nothing."""

    def expected(x: Any) -> Any:
        x = aten.reshape.default(cut(x), [1, 1, 2, 3, 4])
        x = aten.permute.default(x, [0, 1, 3, 2, 4])
        x = aten.clone.default(x, memory_format=torch.contiguous_format)
        return gather(aten.reshape.default(x, [1, 1, 6, 4]), 2, (0, 6, 12, 18))

    assert_shards_to(lambda x: x.reshape(1, 1, 2, 9, 4).permute(0, 1, 3, 2, 4).reshape(1, 1, 18, 4), expected, x_of())
    found = shard(lambda x: F.pixel_shuffle(x, 2).flatten(2).transpose(1, 2).unflatten(1, (18, 8)), x_of(1, 4, 9, 4))
    assert found.fetches == {"gather": 1}


def test_rows_of_a_patch_that_a_bound_cuts_are_moved_first() -> None:
    """Bounds 0, 3, 6, 8 become multiples of 2, the rows of a patch."""

    def expected(x: Any) -> Any:
        moved = halo(cut(x), ((0, 4), (4, 6), (6, 8)), 2, (0, 3, 6, 8))
        return gather(aten.reshape.default(moved, [1, 2, 1, 2, 4, 1]), 2, (0, 2, 3, 4))

    assert_shards_to(lambda x: x.reshape(1, 2, 4, 2, 4, 1), expected, x_of(N, C, 8, W))


def test_slices_and_rolls_are_intervals() -> None:
    def sliced(x: Any) -> Any:
        rows = halo(cut(x), ((1, 3), (3, 6), (6, 8)))
        return gather(aten.neg.default(rows), 2, (0, 2, 5, 7))

    assert_shards_to(lambda x: -x[:, :, 1:8], sliced, x_of())

    def rolled(x: Any) -> Any:
        return gather(halo(cut(x), ((-2, 1), (1, 4), (4, 7)), fill="circular"))

    assert_shards_to(lambda x: x.roll(2, 2), rolled, x_of())

    def flipped(x: Any) -> Any:
        return gather(aten.flip.default(halo(cut(x), ((6, 9), (3, 6), (0, 3))), [2]))

    found = shard(lambda x: x.flip(2), x_of())
    assert structure(found.graphs[0]) != structure(found.graphs[2])  # rank 1's piece is its own mirror
    assert_shards_to(lambda x: x.flip(2), flipped, x_of())


def test_cat_along_the_rows_keeps_the_larger_operand_in_place() -> None:
    row = x_of(N, C, 1, W)

    def expected(x: Any, row: Any) -> Any:
        # The row is on the last rank already, as far as that is concerned; rank 1 takes none of it.
        return gather(aten.cat.default([cut(x), aten.slice.Tensor(row, 2, 0, 0)], 2), 2, (0, 3, 6, 10))

    assert_shards_to(lambda x, row: torch.cat([x, row], 2), expected, x_of(), row, weights=1)


def test_group_norm_exchanges_moments_only() -> None:
    w, b = torch.rand(2, C, dtype=torch.float64)

    def expected(x: Any, w: Any, b: Any) -> Any:
        x = aten.reshape.default(cut(x), [1, 2, 12])
        both = aten.var_mean.correction(x, [2], correction=0, keepdim=True)
        variance, mean = operator.getitem(both, 0), operator.getitem(both, 1)
        stacked = aten.unsqueeze.default(aten.stack.default([mean, variance]), 0)
        pairs = fetch(stacked, 0, (0, 1, 2, 3), ((0, 3),) * 3, 1, "zeros", GROUP)
        parts = [aten.select.int(pairs, 0, r) for r in range(3)]
        means = [aten.select.int(p, 0, 0) for p in parts]
        variances = [aten.select.int(p, 0, 1) for p in parts]

        def weighted(terms: list[Any]) -> Any:
            first, *rest = [aten.mul.Tensor(t, 3 / 9) for t in terms]
            for term in rest:
                first = aten.add.Tensor(first, term)
            return first

        mean = weighted(means)
        off = [aten.sub.Tensor(m, mean) for m in means]
        variance = weighted([aten.add.Tensor(v, aten.mul.Tensor(d, d)) for v, d in zip(variances, off, strict=True)])
        scale = aten.rsqrt.default(aten.add.Tensor(variance, 1e-05))
        y = aten.reshape.default(aten.mul.Tensor(aten.sub.Tensor(x, mean), scale), [1, 2, 3, 4])
        y = aten.mul.Tensor(y, aten.reshape.default(w, [1, 2, 1, 1]))
        return gather(aten.add.Tensor(y, aten.reshape.default(b, [1, 2, 1, 1])))

    found = shard(lambda x, w, b: F.group_norm(x, 2, w, b), x_of(), w, b, weights=2)
    assert found.fetches == {"partial sums": 1, "gather": 1}
    assert [r.rule for r in found.report.matches] == ["cut", "partial sums", "gather"]
    got, want = (sorted(structure(g)) for g in (found.graphs[1], torch.fx.symbolic_trace(expected)))
    assert [line.split(" ")[:2] for line in got] == [line.split(" ")[:2] for line in want]
    assert_same(found, lambda x, w, b: F.group_norm(x, 2, w, b), x_of(), w, b)


def test_moments_do_not_cancel() -> None:
    """A mean of a million beside a deviation of one, in float64: the sum of squares would lose twelve digits."""
    x = x_of() + 1e6
    for (output,) in shard(lambda x: F.group_norm(x, 1), x).run(x):
        torch.testing.assert_close(output, F.group_norm(x, 1), rtol=0, atol=1e-9)


def test_reductions_add_up_partial_sums() -> None:
    def expected(x: Any) -> Any:
        partial = aten.sum.dim_IntList(cut(x), [2], False, dtype=torch.float64)
        parts = fetch(aten.unsqueeze.default(partial, 0), 0, (0, 1, 2, 3), ((0, 3),) * 3, 1, "zeros", GROUP)
        return (aten.div.Tensor(aten.sum.dim_IntList(parts, [0]), 9),)

    assert_shards_to(lambda x: x.mean(2), expected, x_of())


def test_attention_keeps_its_queries_and_fetches_keys_and_values() -> None:
    def before(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    def expected(x: Any) -> Any:
        tokens = aten.transpose.int(aten.reshape.default(cut(x), [1, 2, 12]), 1, 2)
        everything = halo(tokens, ((0, 36),) * 3, 1, (0, 12, 24, 36))
        attended = aten.scaled_dot_product_attention.default(tokens, everything, everything)
        return gather(attended, 1, (0, 12, 24, 36))

    assert_shards_to(before, expected, x_of())


def test_a_fetch_that_two_ops_share_is_placed_for_neither() -> None:
    """On a grid, a padded picture and a convolution that pads by itself fetch the same rows; what reads the picture next
    must not take it for the convolution's operand."""
    w = torch.randn(C, C, 1, 1, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        padded, y = F.pad(x, (0, 0, 1, 1)), F.conv2d(x, w, padding=(1, 0))
        return padded.mean((2, 3), keepdim=True) * y

    args = x_of(), w
    found = shard(before, *args, mesh=(2, 2), shard_dims="hw", weights=1)
    assert [n.args[3] for n in found.graphs[0].graph.nodes if n.target is fetch].count(((-1, 5), (5, 10))) == 1
    assert_same(found, before, *args)


ROWS = torch.rand(C, dtype=torch.float64)
LOCAL: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "pointwise": (lambda x: torch.where(x > 0, F.silu(x), 0.1 * x).to(torch.float32), ()),
    "broadcast": (lambda x, r: x * (1 + r[None, :, None, None]) - r.sum(), (ROWS,)),
    "batch norm": (lambda x, r: F.batch_norm(x, r, r + 1, r, r), (ROWS,)),
    "layer norm": (lambda x, r: F.layer_norm(x.movedim(1, -1), (C,), r, r).movedim(-1, 1), (ROWS,)),
    "rms norm": (lambda x, r: F.rms_norm(x.movedim(1, -1), (C,), r), (ROWS,)),
    "wan's norm": (lambda x: F.normalize(x, dim=1), ()),
    "softmax": (lambda x: x.softmax(1) + x.cumsum(3), ()),
    "max": (lambda x: x.amax((1, 3), keepdim=True), ()),
    "linear": (lambda x, w: F.linear(x, w), (torch.randn(3, W).double(),)),
    "heads": (lambda x: torch.bmm(x.flatten(0, 1).transpose(0, 1), x.flatten(0, 1).permute(1, 2, 0)), ()),
    "swap": (lambda x: x.transpose(2, 3).flip(2).roll(1, 2), ()),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1).repeat_interleave(2, 2), ()),
    "stack": (lambda x: torch.stack([x, x + 1], 3).flatten(2, 3), ()),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), ()),
    "scatter": (lambda x: torch.slice_scatter(x, x[:, :1], 1, 1, 2), ()),
    "like": (lambda x: x + torch.zeros_like(x) + x.new_ones(H, W) + torch.full_like(x, 2.0), ()),
}


@pytest.mark.parametrize("name", LOCAL)
def test_what_moves_nothing_but_the_result(name: str) -> None:
    function, more = LOCAL[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more), passes="canonicalize,shard")
    assert not found.report.refusals and found.fetches == {"gather": 1}
    assert_same(found, function, *args)


def rows_of(x: Tensor) -> Tensor:
    """[W, C, H]: the columns are a batch, the rows a length."""
    return x.permute(0, 3, 1, 2).flatten(0, 1)


PRODUCT = torch.randn(C, W, 3).double(), torch.randn(C, 1, 3).double()
ANY: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "mean": (lambda x: x.mean() + x.sum(), ()),
    "bfloat16": (lambda x: x.bfloat16().sum((2, 3)).double(), ()),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=2) + torch.linalg.vector_norm(x, 1, (2, 3), True)[..., 0], ()),
    "amin": (lambda x: x.amin((1, 3)), ()),
    "prod": (lambda x: x.prod(2), ()),
    "logsumexp": (lambda x: x.logsumexp((2,), True), ()),
    "var": (lambda x: x.var(2) + x.std((2,), correction=0), ()),
    "any": (lambda x: (x > 1).any(2), ()),
    "argmax": (lambda x: x.argmax(2) + x.argmin(3).sum(), ()),
    "log_softmax": (lambda x: x.log_softmax(2) + x.softmax(3), ()),
    "mm": (lambda x: x[0, 0].t() @ x[0, 1], ()),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x[0], w, beta=2, alpha=0.5), PRODUCT),
    "no baddbmm": (lambda x, w, b: torch.baddbmm(b * torch.nan, x[0], w, beta=0), PRODUCT),
    "squeeze": (lambda x: x.squeeze(0).unsqueeze(-1).squeeze(), ()),
    "slice_scatter": (lambda x: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 5, 7), ()),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(rows_of(x), w, None, 2, 1, 1),
        (torch.randn(C, 3, 4).double(),),
    ),
    "conv1d same": (lambda x, w: F.conv1d(rows_of(x), w, padding="same"), (torch.randn(3, C, 3).double(),)),
    "pool1d": (lambda x: F.avg_pool1d(rows_of(x), 3, 2, 1) + F.max_pool1d(rows_of(x), 3, 2, 1), ()),
    "nearest1d": (lambda x: F.interpolate(rows_of(x), scale_factor=1.5) + F.interpolate(rows_of(x), 13), ()),
    "linear1d": (lambda x: F.interpolate(rows_of(x), 13, mode="linear", align_corners=True), ()),
    "exact": (lambda x: F.interpolate(x, (13, 3), mode="nearest-exact").mT + F.interpolate(x, (3, 13)), ()),
    "trilinear": (lambda x: F.interpolate(x.unsqueeze(2), (2, 18, 7), mode="trilinear"), ()),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=(1.5, 2.0), mode="bilinear"), ()),
    "constant": (lambda x: F.pad(x, (1, 2, -1, 3, 0, 1), value=7.0), ()),
    "replicate": (lambda x: F.pad(x, (1, 2, 3, 0), "replicate"), ()),
    "unshuffle": (lambda x: F.pixel_unshuffle(x[:, :, 1:], 2), ()),
    "mask": (lambda x, m: F.scaled_dot_product_attention(x, x, x, m), (torch.randn(1, 1, H, H).double(),)),
}


@pytest.mark.parametrize(("mesh", "dims"), [((4,), "h"), ((2, 2), "hw")], ids=str)
@pytest.mark.parametrize("name", ANY)
def test_the_result_of(name: str, mesh: tuple[int, ...], dims: str) -> None:
    """What random models seldom have."""
    function, more = ANY[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more), mesh=mesh, shard_dims=dims, passes="canonicalize,shard")
    assert not found.report.refusals
    assert_same(found, function, *args)


# --- what is computed whole ----------------------------------------------------------------------------------------------

VECTOR, KERNEL, MEAN = torch.randn(4).double(), torch.randn(1, 9, 1, 1).double(), torch.rand(9).double()
WHOLE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str, str]] = {
    "unknown": (lambda x: x.sort(2).values, (), "sort.default", "no rule for this op"),
    "conv": (
        lambda x, w: F.conv2d(x.transpose(1, 2), w),
        (KERNEL,),
        "conv2d.default",
        "its channel dimension is split",
    ),
    "pool": (lambda x: F.avg_pool2d(x.transpose(1, 2), 2), (), "avg_pool2d.default", "its channel dimension is split"),
    "group norm": (
        lambda x: F.group_norm(x.transpose(1, 2), 3),
        (),
        "group_norm.default",
        "its channel dimension is split",
    ),
    "rms norm": (
        lambda x: F.rms_norm(x, x.shape[1:]),
        (),
        "rms_norm.default",
        "it normalises over a split dimension",
    ),
    "roll": (lambda x: x.roll(3), (), "roll.default", "roll without dimensions flattens"),
    "repeats": (
        lambda x: x.repeat_interleave(2),
        (),
        "repeat_interleave.self_int",
        "repeat_interleave without a dimension flattens",
    ),
    "everything": (lambda x: torch.var(x), (), "var.correction", "it reduces everything"),
    "vector": (lambda x, v: x @ v, (VECTOR,), "matmul.default", "an operand is a vector"),
    "causal": (
        lambda x: F.scaled_dot_product_attention(x[0], x[0], x[0], is_causal=True),
        (),
        "scaled_dot_product_attention.default",
        "causal attention over a split token dimension",
    ),
    "within": (
        lambda x: F.avg_pool1d(x.flatten(2).reshape(1, 1, -1), 2),
        (),
        "avg_pool1d.default",
        "a dimension that it works along is split",
    ),
    "batch norm": (
        lambda x, m, v: F.batch_norm(x.transpose(1, 2), m, v),
        (MEAN, MEAN + 1),
        "_native_batch_norm_legit_no_training.default",
        "its channel dimension is split",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_computed_whole_and_why(name: str) -> None:
    function, more, op, reason = WHOLE[name]
    args = x_of(), *more
    found = shard(function, *args, weights=len(more))
    refused = found.whole
    assert refused.get(op, "").startswith(reason), refused
    assert all("bytes gathered" in r.note for r in found.report.refusals)
    assert_same(found, function, *args)
