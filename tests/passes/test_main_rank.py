"""main_rank: a region becomes rank 0's own, its results travel, and the others' graphs lose what only it needed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pvae.lockstep import Traffic, all_meshes, lockstep
from pvae.options import parse_options
from pvae.passes.ir import placeholders
from pvae.passes.main_rank import MARK, MainRankError, has_regions
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.prepare_weights import split_weight_work
from pvae.passes.rule import Context, RewriteCounter
from pvae.passes.shard import collectives
from pvae.runtime.fetch import fetch
from pvae.runtime.main_rank import elsewhere
from pvae.runtime.sharded_tensor import Piece
from pvae.runtime.torch_compat import FakeTensorMode, functional_graph, noting, static_fake
from pvae.testing import capture, structure
from tests.passes.shard_case import GROUP, HAVE, C, H, N, Sharded, W, x_of

torch.fx.wrap("fetch")
aten = torch.ops.aten
ALL = ((0, 2), (0, 2))


def region() -> Any:
    """What `pvae.main_rank()` is while a graph is captured."""
    return noting({MARK: True})


def owned(
    function: Callable[..., Any],
    *args: Any,
    world: int = 2,
    mesh: tuple[int, ...] | None = None,
    weights: int = 0,
    held: Callable[[int], tuple[Piece, ...]] | None = None,
    passes: str | None = "main_rank,shard,inline_main_rank",
    **options: Any,
) -> Sharded:
    """`function(*args)` on every rank of a world, its regions given to rank 0. All ask for the same collectives.

    The first argument arrives as pieces where `held` says which.
    """
    parsed = parse_options(options, {})
    pipeline = parsed.pipeline if passes is None else Pipeline.parse(passes)
    found = Sharded([], [], [])
    meshes = all_meshes(mesh) if mesh else [None] * world
    for line, place in zip(all_meshes((len(meshes),)), meshes, strict=True):
        captured = capture(function, *args)
        assert has_regions(captured.gm.graph)
        names = [n.name for n in placeholders(captured.gm.graph)]
        own = frozenset(names[len(names) - weights :])
        pieces = {names[0]: held(line.rank)} if held else {}
        context = Context(parsed, own, frozenset(), RewriteCounter(), mesh=place, held=pieces, world=line)
        found.reports.append(run_pipeline(captured.gm, pipeline, context))
        found.graphs.append(captured.gm)
        found.contexts.append(context)
    first, *others = [list(collectives(gm.graph)) for gm in found.graphs]
    assert all(other == first for other in others)
    return found


def ops(found: Sharded, rank: int) -> set[str]:
    return {
        getattr(n.target, "__name__", str(n.target)) for n in found.graphs[rank].graph.nodes if n.op == "call_function"
    }


def assert_computes(found: Sharded, before: Callable[..., Any], *args: Any) -> None:
    """Every rank returns what `before` does, in the same strides."""
    wanted = before(*args)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for outputs in found.run(*args):
        for got, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            assert got.stride() == want.stride() or got.numel() == 0


# --- what each rank's graph becomes --------------------------------------------------------------------------------------


def test_rank_0_computes_and_the_others_receive() -> None:
    def before(x: Tensor) -> Tensor:
        with region():
            y = torch.sin(x + 1)
        return y * x

    def first(x: Tensor) -> tuple[Tensor]:
        y = aten.sin.default(aten.add.Tensor(x, 1))
        return (aten.mul.Tensor(fetch(y, 0, (0, 2, 2), ALL, 0, "zeros", "lockstep:0,1"), x),)

    second = Graph()  # by hand: what reads no input is not traced
    x = second.placeholder("x")
    results = second.call_function(elsewhere, ((((0, 3), torch.float64, torch.device("cpu")),),))
    y = second.call_function(operator.getitem, (results, 0))
    y = second.call_function(fetch, (y, 0, (0, 2, 2), ALL, 1, "zeros", "lockstep:0,1"))
    second.output((second.call_function(aten.mul.Tensor, (y, x)),))

    found = owned(before, x_of(2, 3))
    assert structure(found.graphs[0]) == structure(torch.fx.symbolic_trace(first))
    assert structure(found.graphs[1]) == structure(GraphModule(nn.Module(), second))
    traffic = [Traffic(), Traffic()]
    found.run(x_of(2, 3), traffic=traffic)
    assert [(t.sent, t.received) for t in traffic] == [(48, 0), (0, 48)]
    (record,) = found.reports[0][0].matches
    assert record.note == "2 nodes, on rank 0 only; 1 results, 48 bytes for each other rank"


def test_only_what_is_read_outside_travels() -> None:
    def before(x: Tensor) -> tuple[Tensor, Tensor]:
        with region():
            y = torch.exp(x)
            values, places = y.max(1)
            unread = y.sum()
            z = values[:, None] + y
        assert unread.dim() == 0
        return z, x + places[:, None]

    found = owned(before, x_of(4, 3), world=3)
    assert [sum(n.target is fetch for n in gm.graph.nodes) for gm in found.graphs] == [2, 2, 2]
    assert "sum" not in ops(found, 0) and "max.dim" in ops(found, 0) and "max.dim" not in ops(found, 1)
    assert_computes(found, before, x_of(4, 3))


def test_what_only_the_region_reads_is_not_computed_elsewhere() -> None:
    def before(x: Tensor, w: Tensor) -> Tensor:
        ready = torch.tanh(x)
        with region():
            y = F.linear(ready, w)
        return y + x

    found = owned(before, x_of(2, 3), x_of(3, 3), weights=1)
    assert {"tanh.default", "linear.default"} <= ops(found, 0)
    assert ops(found, 1) == {"elsewhere", "getitem", "fetch", "add.Tensor"}
    assert not placeholders(found.graphs[1].graph)[1].users


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.sum(),
        lambda x: x > 0,
        lambda x: (x > 0).any(),
        lambda x: torch.complex(x, x),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.mT,
        lambda x: x[:0],
        lambda x: x[:, :0],
        lambda x: x.argmax(),
    ],
    ids=["scalar", "bool", "bool scalar", "complex", "bfloat16", "transposed", "no rows", "no columns", "integer"],
)
def test_tensors_of_any_kind_travel(make: Callable[[Tensor], Tensor]) -> None:
    def before(x: Tensor) -> tuple[Tensor, Tensor]:
        with region():
            y = make(x.exp())
        return y, x + 1

    assert_computes(owned(before, x_of(2, 3), world=3), before, x_of(2, 3))


def test_writes_inside_a_region() -> None:
    def before(x: Tensor, cache: Tensor) -> Tensor:
        y = x.clone()
        with region():
            y[:, 0] = 2
            cache.add_(y.sum(0))
        return y * cache

    args = x_of(2, 3), x_of(3)
    want, kept = before(args[0], cache := args[1].clone()), cache
    found = owned(before, *args)
    given = [[args[0], args[1].clone()] for _ in range(2)]
    for (got,), (_, cache) in zip(lockstep(found.graphs, given), given, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(cache, kept)


def test_random_numbers_are_drawn_on_rank_0_alone() -> None:
    def before(x: Tensor) -> Tensor:
        with region():
            noise = torch.randn(4)
        return x + noise

    found = owned(before, x_of(4))
    assert "randn.default" in ops(found, 0) and "randn.default" not in ops(found, 1)
    (first,), (second,) = found.run(x_of(4))
    assert torch.equal(first, second)


# --- several regions -----------------------------------------------------------------------------------------------------


def test_regions_that_feed_each_other_keep_what_they_pass() -> None:
    """The first's result goes to the second on rank 0; only what others read travels."""

    def before(x: Tensor) -> tuple[Tensor, Tensor]:
        with region():
            a = x.exp()
            b = a + 1
        c = b * 2
        with region():
            d = (a * c).sum(0)
        return c, d

    found = owned(before, x_of(2, 3), world=3)
    assert len(found.reports[0][0].matches) == 2
    assert [sum(n.target is fetch for n in gm.graph.nodes) for gm in found.graphs] == [2, 2, 2]
    assert ops(found, 2) == {"elsewhere", "getitem", "fetch", "mul.Tensor"}
    assert_computes(found, before, x_of(2, 3))


def test_independent_regions_become_one_where_they_stand_apart() -> None:
    """What one reads comes behind what reads the other: the graph is put in order."""

    def before(x: Tensor) -> Tensor:
        with region():
            a = x.exp()
        b = a * 3
        c = x.cos()
        with region():
            d = a + c
        return b - d

    found = owned(before, x_of(2, 3))
    assert len(found.reports[0][0].matches) == 1
    assert ops(found, 1) == {"elsewhere", "getitem", "fetch", "mul.Tensor", "sub.Tensor"}
    assert_computes(found, before, x_of(2, 3))


def test_a_region_that_reads_nothing() -> None:
    def before(x: Tensor) -> Tensor:
        with region():
            y = torch.arange(3, dtype=torch.float64)
        return x + y

    assert_computes(owned(before, x_of(2, 3)), before, x_of(2, 3))


# --- with sharding -------------------------------------------------------------------------------------------------------


def text_and_picture(x: Tensor, text: Tensor, w: Tensor) -> Tensor:
    """A convolution before and after a region, which reads the whole of the first and gives a number to each channel."""
    y = F.conv2d(x, w, padding=1)
    with region():
        shift = F.group_norm(y, 1).mean((2, 3)) + torch.softmax(text @ text.mT, -1).sum()
    return F.conv2d(torch.tanh(y) + shift[:, :, None, None], w, padding=1)


@pytest.mark.parametrize(("mesh", "dims"), [((3,), "h"), ((2, 2), "hw"), ((1, 3), "hw")], ids=str)
def test_a_region_in_a_sharded_picture(mesh: tuple[int, ...], dims: str) -> None:
    """What it reads is gathered on every rank, because all take part in that; the rest of it is rank 0's."""
    args = x_of(N, C, H, W), x_of(4, 3), x_of(C, C, 3, 3)
    found = owned(text_and_picture, *args, weights=1, mesh=mesh, shard="halo", shard_dims=dims)
    for rank in range(len(found.graphs)):
        assert ("softmax.int" in ops(found, rank)) is (rank == 0)
        assert ("group_norm.default" in ops(found, rank)) is (rank == 0)
    assert_computes(found, text_and_picture, *args)
    whole = owned(text_and_picture, *args, weights=1, mesh=mesh, shard="halo", shard_dims=dims, passes=None)
    assert_computes(whole, text_and_picture, *args)


def test_patches_around_a_region() -> None:
    args = x_of(N, C, H, W), x_of(4, 3), x_of(C, C, 3, 3)
    found = owned(text_and_picture, *args, weights=1, mesh=(3,), shard="patch", shard_dims="h", patch_context=9)
    assert_computes(found, text_and_picture, *args)


def test_a_region_that_reads_pieces() -> None:
    """A cache that comes as pieces is gathered by all for rank 0; no other node of the other ranks reads it whole."""

    def before(cache: Tensor, x: Tensor) -> Tensor:
        with region():
            shift = cache.amax((2, 3), keepdim=True)
        return x * shift + cache

    def rows(rank: int) -> tuple[Piece, ...]:
        return (Piece(2, HAVE, ((0, 3), (3, 6), (6, 9)), GROUP, rank),)

    cache, x = x_of(), x_of()
    found = owned(before, cache, x, mesh=(3,), shard="halo", held=rows)
    (gather, *_) = [n for n in found.graphs[2].graph.nodes if n.target is fetch]
    assert [user.target for user in gather.users] == [elsewhere] and "amax.default" not in ops(found, 2)
    inputs = [[cache[:, :, 3 * rank : 3 * rank + 3], x] for rank in range(3)]
    for (got,) in lockstep(found.graphs, inputs):
        torch.testing.assert_close(got, before(cache, x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x)).transpose(1, 2).flatten(2)


def text_and_tokens(x: Tensor, text: Tensor, w: Tensor) -> Tensor:
    """Joint attention of tokens and words; the words are a region's, and so is a scale that it finds in all of both."""
    with region():
        words = attend(F.layer_norm(text, (8,))).cumsum(1)
    for _ in range(2):
        joint = attend(F.linear(torch.cat([x, words], 1), w))
        with region():
            scale = joint.var((1, 2)).sqrt()
        x = x + joint[:, : x.shape[1]] * scale[:, None, None]
        words = words + joint[:, x.shape[1] :]
    return x


@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=str)
def test_regions_in_a_sequence_of_tokens(mesh: tuple[int, ...]) -> None:
    """The attention inside a region, which only rank 0 has, is no reason to split tokens; its words are split like others."""
    args = x_of(2, 9, 8), x_of(2, 5, 8), x_of(8, 8)
    found = owned(text_and_tokens, *args, weights=1, mesh=mesh, shard="sequence")
    assert len(found.reports[0][0].matches) == 3
    for rank in range(len(found.graphs)):
        assert ("cumsum.default" in ops(found, rank)) is ("var.dim" in ops(found, rank)) is (rank == 0)
    assert_computes(found, text_and_tokens, *args)


def test_the_passes_after_it_are_for_the_region_too() -> None:
    w = torch.randn(C, C, 3, 3, 3, dtype=torch.float64)

    def before(x: Tensor, w: Tensor) -> Tensor:
        with region():
            y = F.conv3d(x, w)
        return y.sum(2)

    x = x_of(1, C, 5, H, W)
    found = owned(before, x, w, weights=1, passes=None, conv3d="unfold2d")
    fired = [{r.name for r in reports if r.matches} for reports in found.reports]
    assert "conv3d_unfold" in fired[0] and "conv3d_unfold" not in fired[1]
    for got in found.run(x, w):
        torch.testing.assert_close(got[0], before(x, w))


def test_results_of_weights_alone_are_sent_in_every_call() -> None:
    """`weights="frozen"` prepares on rank 0 what it computes of them, and leaves the exchange where all ranks have it."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        with region():
            y = (w @ w).exp()
        return x @ y

    args = x_of(2, 3), x_of(3, 3)
    found = owned(before, *args, weights=1)
    for rank, gm in enumerate(found.graphs):
        split = split_weight_work(gm, found.contexts[rank].weights)
        assert (split is None) is (rank > 0)
        assert any(n.target is fetch for n in gm.graph.nodes)
        if split is not None:
            assert not any(n.target is fetch for n in split[0].graph.nodes)


# --- where it does nothing, or refuses -----------------------------------------------------------------------------------


def test_a_world_of_one_changes_nothing() -> None:
    def before(x: Tensor) -> Tensor:
        with region():
            y = x + 1
        return y * 2

    found = owned(before, x_of(2), world=1)
    assert structure(found.graphs[0]) == structure(capture(before, x_of(2)).gm)


def test_a_region_without_its_second_pass_is_right_all_the_same() -> None:
    """The one node that stands for it runs, and is called by its own name."""

    def before(x: Tensor, sign: int) -> Tensor:
        with region():
            y = x.sin() * sign
        return y + x

    names = set()
    for sign in (1, -1):
        found = owned(lambda x, sign=sign: before(x, sign), x_of(2), passes="main_rank")
        names |= {name for name in ops(found, 0) if name.startswith("main_rank_")}
        assert_computes(found, lambda x, sign=sign: before(x, sign), x_of(2))
    assert len(names) == 2


def test_sizes_that_only_values_tell_are_refused() -> None:
    def before(x: Tensor) -> list[Tensor]:
        with region():
            y = x.nonzero()
        return [y]

    mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True), allow_non_fake_inputs=True)
    with mode:
        gm, _ = functional_graph(before, [static_fake(mode, x_of(3))], stack_traces=True)
    context = Context(parse_options({}, {}), world=all_meshes((2,))[0])
    with pytest.raises(MainRankError, match="size is known only when it runs .*pvae.main_rank\\(function\\)"):
        run_pipeline(gm, Pipeline.parse("main_rank"), context)


def test_a_group_of_every_rank_whatever_the_mesh_is() -> None:
    args = x_of(N, C, H, W), x_of(4, 3), x_of(C, C, 3, 3)
    found = owned(text_and_picture, *args, weights=1, mesh=(3,), shard="halo")
    groups = {n.args[6] for n in found.graphs[1].graph.nodes if n.target is fetch and len(n.args[3]) == 3}
    assert groups == {GROUP}
