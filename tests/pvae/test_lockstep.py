"""lockstep: what a fetch means, held against `torch.nn.functional.pad`, and an exchange, against slices of the whole; sharded
graphs by hand; what would hang a real world."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pvae.lockstep import LockstepError, Traffic, all_meshes, lockstep, simulated_mesh
from pvae.runtime.exchange import Boxes, exchange
from pvae.runtime.fetch import fetch
from pvae.runtime.mesh import Mesh, make_mesh

HAVE = (0, 3, 4, 4, 9)
HALO = ((-2, 5), (1, 6), (2, 6), (2, 11))


def graph_of(build: Callable[[Callable[..., Node], Node], Any]) -> GraphModule:
    """A graph of one input; `build(call, x)` adds to it by `call(function, *args, **kwargs)` and returns the outputs."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(build(lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), x))
    return GraphModule({}, graph)


def fetching(mesh: Mesh, dim: int, have: Any, need: Any, fill: str = "zeros", **others: Any) -> GraphModule:
    """The graph that fetches its input over axis 0 of the mesh, and no more."""
    given = {"rank": mesh.coordinates[0], "fill": fill, "group": mesh.groups[0], **others}
    return graph_of(lambda call, x: (call(fetch, x, dim, have, need, **given),))


def pieces(whole: Tensor, dim: int, have: Sequence[int]) -> list[list[Tensor]]:
    return [[whole.narrow(dim, a, b - a)] for a, b in pairwise(have)]


def rows_of(whole: Tensor, dim: int, start: int, stop: int, fill: str) -> Tensor:
    """`[start, stop)` of the whole, filled by `torch.nn.functional.pad`."""
    size, low = whole.shape[dim], max(0, -start)
    last = whole.movedim(dim, -1)
    mode = "constant" if fill == "zeros" else fill
    padded = F.pad(last.reshape(1, -1, size), (low, max(0, stop - size)), mode=mode)
    return padded.reshape(*last.shape[:-1], -1).movedim(-1, dim).narrow(dim, start + low, stop - start)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    dim=st.integers(0, 4),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    fill=st.sampled_from(["zeros", "replicate", "reflect", "circular"]),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_rows_are_those_of_pad(
    shape: list[int], dim: int, lengths: list[int], fill: str, channels_last: bool, data: st.DataObject
) -> None:
    have = (0, *accumulate(lengths))
    dim %= len(shape)
    shape[dim] = size = have[-1]
    reach = size - 1 if fill == "reflect" else size
    bound = st.integers(-reach, size + reach)
    need = tuple(tuple(sorted(data.draw(st.tuples(bound, bound)))) for _ in lengths)
    whole = torch.randn(shape)
    graphs = [
        fetching(mesh, dim - len(shape), have, need, fill, channels_last=channels_last)
        for mesh in all_meshes((len(lengths),))
    ]
    for (start, stop), (got,) in zip(need, lockstep(graphs, pieces(whole, dim, have)), strict=True):
        assert torch.equal(got, rows_of(whole, dim, start, stop, fill))


def test_memory_format_of_what_is_received() -> None:
    whole = torch.randn(2, 3, 9, 5)
    for channels_last, expected in ((False, torch.contiguous_format), (True, torch.channels_last)):
        graphs = [fetching(m, 2, HAVE, HALO, channels_last=channels_last) for m in all_meshes((4,))]
        for (got,) in lockstep(graphs, pieces(whole, 2, HAVE)):
            assert got.is_contiguous(memory_format=expected)


def test_a_fetch_that_moves_nothing_meets_nobody() -> None:
    """Not even where other ranks have no such fetch; a part of the piece is a view of it."""
    whole, have = torch.randn(1, 2, 9, 4), (0, 4, 9)
    crop, around = ((1, 3), (5, 9)), ((-2, 4), (4, 9))
    first = simulated_mesh((2,), 0)
    graphs = [fetching(first, 2, have, crop), graph_of(lambda call, x: (x,))]
    traffic = [Traffic(), Traffic()]
    (got,), _ = lockstep(graphs, pieces(whole, 2, have), traffic)
    assert torch.equal(got, whole[:, :, 1:3]) and got.data_ptr() == whole[:, :, 1:].data_ptr()
    (got,), _ = lockstep([fetching(first, 2, have, around, group=None), graphs[1]], pieces(whole, 2, have), traffic)
    assert torch.equal(got, F.pad(whole[:, :, :4], (0, 0, 2, 0)))
    assert traffic == [Traffic(), Traffic()]
    ((got,),) = lockstep([fetching(simulated_mesh((1,), 0), 2, (0, 9), ((-3, 10),), "circular")], [[whole]])
    assert torch.equal(got, F.pad(whole, (0, 0, 3, 1), "circular"))


def test_convolutions_on_a_grid() -> None:
    """3x3 kernels on 2 x 3 ranks, pieces thinner than the halo: two fetches a convolution, in groups along either axis."""
    weight, whole = torch.randn(2, 2, 5, 3, dtype=torch.float64), torch.randn(1, 2, 7, 8, dtype=torch.float64)
    bounds = ((0, 6, 7), (0, 3, 4, 8))

    def graph(mesh: Mesh) -> GraphModule:
        def build(call: Callable[..., Node], x: Node) -> Any:
            for _ in range(2):
                for axis, reach in ((0, 2), (1, 1)):
                    have, rank = bounds[axis], mesh.coordinates[axis]
                    need = tuple((a - reach, b + reach) for a, b in pairwise(have))
                    x = call(fetch, x, axis + 2, have, need, rank, "zeros", mesh.groups[axis])
                x = call(torch.ops.aten.conv2d.default, x, weight)
            return (x,)

        return graph_of(build)

    def piece(x: Tensor, mesh: Mesh) -> Tensor:
        (a, b), (c, d) = (bounds[axis][at : at + 2] for axis, at in enumerate(mesh.coordinates))
        return x[:, :, a:b, c:d]

    meshes, traffic = all_meshes((2, 3)), [Traffic() for _ in range(6)]
    outputs = lockstep([graph(m) for m in meshes], [[piece(whole, m)] for m in meshes], traffic)
    expected = F.conv2d(F.conv2d(whole, weight, padding=(2, 1)), weight, padding=(2, 1))
    for mesh, (got,) in zip(meshes, outputs, strict=True):
        torch.testing.assert_close(got, piece(expected, mesh), rtol=1e-12, atol=1e-12)
    assert all(t.collectives == 4 for t in traffic)
    assert sum(t.sent for t in traffic) == sum(t.received for t in traffic)
    # Rank 0, at rows 0 to 5 and columns 0 to 2, gets 1 row of 3 columns from rank 3 and, of the 10 rows that it then has,
    # 1 column from rank 1; it sends 2 rows and 1 column. Of 2 channels, twice, 8 bytes each.
    assert (traffic[0].received, traffic[0].sent) == (2 * 2 * 8 * (3 + 10), 2 * 2 * 8 * (6 + 10))


def test_each_row_counts_once() -> None:
    """An interval that holds a row twice (reflect) moves it once."""
    have, need = (0, 1, 4), ((-3, 4), (1, 4))
    traffic = [Traffic(), Traffic()]
    graphs = [fetching(m, 0, have, need, "reflect") for m in all_meshes((2,))]
    lockstep(graphs, pieces(torch.arange(4.0), 0, have), traffic)
    assert traffic == [Traffic(1, 0, 12), Traffic(1, 12, 0)]


def test_dead_values_are_freed() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))
        return x + 1

    def graph(mesh: Mesh) -> GraphModule:
        def build(call: Callable[..., Node], x: Node) -> Any:
            for _ in range(6):
                x = call(fetch, call(note, x), 0, (0, 2, 4), ((0, 3), (1, 4)), mesh.rank, "zeros", mesh.groups[0])
                x = call(torch.narrow_copy, x, 0, mesh.rank, 2)
            return (x,)

        return graph_of(build)

    outputs = lockstep([graph(m) for m in all_meshes((2,))], [[torch.zeros(2)] for _ in range(2)])
    assert all(torch.equal(got, torch.full((2,), 6.0)) for (got,) in outputs)
    assert max(alive) <= 4, "of each rank its input, which the caller holds, and the value at hand"


def test_meshes() -> None:
    assert simulated_mesh((1,), 0) == make_mesh()
    names = [mesh.groups for mesh in all_meshes((2, 1, 2))]
    rows, columns = ["lockstep:0,2", "lockstep:1,3"], ["lockstep:0,1", "lockstep:2,3"]
    assert names == [(rows[r % 2], None, columns[r // 2]) for r in range(4)]
    assert [mesh.coordinates for mesh in all_meshes((2, 3))] == [(a, b) for a in range(2) for b in range(3)]
    with pytest.raises(ValueError, match="holds ranks 0 to 3, not 4"):
        simulated_mesh((2, 2), 4)


# --- exchanges -----------------------------------------------------------------------------------------------------------

# Heads x tokens on 4 ranks: by tokens, by heads (rank 3 has none), and some of both; the last of grouped queries
BY_TOKENS = tuple(((0, 4), row) for row in ((0, 3), (3, 4), (4, 4), (4, 9)))
BY_HEADS = (((0, 2), (0, 9)), ((2, 3), (0, 9)), ((3, 4), (0, 9)), ((4, 4), (0, 9)))
BY_BOTH = (((0, 4), (0, 2)), ((0, 1), (2, 9)), ((1, 4), (2, 5)), ((1, 4), (5, 9)))
OVERLAPPING = (((1, 3), (0, 9)), ((0, 4), (2, 6)), ((0, 0), (0, 0)), ((3, 4), (8, 9)))
KEYS = tuple(((0, 2), tokens) for _, tokens in BY_TOKENS), tuple(((min(r, 2), min(r + 1, 2)), (0, 9)) for r in range(4))


def exchanging(mesh: Mesh, have: Boxes, need: Boxes, **others: Any) -> GraphModule:
    """The graph that exchanges its inputs over axis 0 of the mesh, and no more."""
    graph = Graph()
    xs = [graph.placeholder(f"x{i}") for i in range(len(have))]
    given = {"rank": mesh.coordinates[0], "group": mesh.groups[0], **others}
    got = graph.call_function(exchange, (xs, have, need), given)
    graph.output(tuple(graph.call_function(getitem, (got, i)) for i in range(len(have))))
    return GraphModule({}, graph)


def boxes_of(wholes: Sequence[Tensor], have: Boxes, rank: int) -> list[Tensor]:
    return [x[:, slice(*held[rank][0]), slice(*held[rank][1])] for x, held in zip(wholes, have, strict=True)]


@pytest.mark.parametrize(
    ("have", "need"),
    [
        ((BY_TOKENS,) * 3, (BY_HEADS,) * 3),
        ((BY_HEADS,), (BY_TOKENS,)),
        ((BY_TOKENS, KEYS[0], KEYS[0]), (BY_HEADS, KEYS[1], KEYS[1])),
        ((BY_BOTH, BY_TOKENS), (OVERLAPPING, BY_BOTH)),
    ],
    ids=["forth", "back", "grouped queries", "any boxes"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_boxes_are_slices_of_the_whole(dtype: torch.dtype, have: Boxes, need: Boxes) -> None:
    wholes = [torch.randn(2, max(heads[1] for heads, _ in held), 9, 3, dtype=dtype) for held in have]
    traffic = [Traffic() for _ in range(4)]
    graphs = [exchanging(mesh, have, need) for mesh in all_meshes((4,))]
    outputs = lockstep(graphs, [boxes_of(wholes, have, rank) for rank in range(4)], traffic)
    for rank, got in enumerate(outputs):
        assert all(torch.equal(y, x) for y, x in zip(got, boxes_of(wholes, need, rank), strict=True))
    # Heads x tokens that a rank needs and does not hold, counted place by place
    place = 2 * 3 * dtype.itemsize
    for rank, found in enumerate(traffic):
        foreign = 0
        for held, wanted in zip(have, need, strict=True):
            (a, b), (c, d) = wanted[rank]
            (e, f), (g, h) = held[rank]
            foreign += sum(not (e <= i < f and g <= j < h) for i in range(a, b) for j in range(c, d))
        assert (found.collectives, found.received) == (1, foreign * place)
    assert sum(t.sent for t in traffic) == sum(t.received for t in traffic)


def test_attention_over_split_tokens() -> None:
    """Heads for tokens, attention, tokens for heads, on both lines of a 2 x 2 mesh; views of what comes out as of the real."""
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    rows, heads = ((0, 4), (4, 7)), ((0, 2), (2, 4))
    by_tokens, by_heads = tuple(((0, 4), r) for r in rows), tuple((h, (0, 7)) for h in heads)
    graphs, inputs, meshes = [], [], all_meshes((2, 2))
    for mesh in meshes:
        graph, (branch, place) = Graph(), mesh.coordinates
        xs = [graph.placeholder(name) for name in "qkv"]
        got = graph.call_function(exchange, (xs, (by_tokens,) * 3, (by_heads,) * 3, place, mesh.groups[1]))
        qkv = tuple(graph.call_function(getitem, (got, i)) for i in range(3))
        y = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, qkv)
        back = graph.call_function(exchange, ([y], (by_heads,), (by_tokens,), place, mesh.groups[1]))
        y = graph.call_function(torch.transpose, (graph.call_function(getitem, (back, 0)), 1, 2))
        graph.output((graph.call_function(Tensor.view, (y, 1, rows[place][1] - rows[place][0], 32)),))
        graphs.append(GraphModule({}, graph))
        inputs.append([x[branch : branch + 1, :, slice(*rows[place])] for x in (q, k, v)])
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    for mesh, (got,) in zip(meshes, lockstep(graphs, inputs), strict=True):
        branch, place = mesh.coordinates
        torch.testing.assert_close(got, expected[branch : branch + 1, slice(*rows[place])], rtol=1e-12, atol=1e-12)


def test_an_exchange_that_moves_nothing_meets_nobody() -> None:
    whole, inside = torch.randn(1, 4, 9, 2), (((1, 2), (0, 2)), ((0, 0), (3, 4)), ((0, 0), (0, 0)), ((0, 4), (5, 9)))
    graphs = [exchanging(mesh, (BY_TOKENS,), (inside,)) for mesh in all_meshes((4,))]
    graphs[2] = graph_of(lambda call, x: (x,))
    traffic = [Traffic() for _ in range(4)]
    outputs = lockstep(graphs, [boxes_of([whole], (BY_TOKENS,), rank) for rank in range(4)], traffic)
    assert torch.equal(outputs[0][0], whole[:, 1:2, :2]) and outputs[0][0].data_ptr() == whole[:, 1:].data_ptr()
    assert outputs[1][0].shape == (1, 0, 1, 2) and torch.equal(outputs[3][0], whole[:, :, 5:])
    assert traffic == [Traffic()] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"need": ((*BY_HEADS[:3], ((0, 4), (0, 9))),)},
            r"rank 0 at exchange .* and rank 2 at exchange .* differ in need",
        ),
        ({"have": (BY_HEADS,), "need": (BY_TOKENS,)}, r"tensor 0 is \(1, 4, 0, 2\) instead of the box"),
        ({"have": ((BY_TOKENS[0], BY_TOKENS[0], *BY_TOKENS[2:]),)}, "two ranks hold the same place"),
        ({"have": ((BY_TOKENS[0], ((0, 3), (3, 4)), *BY_TOKENS[2:]),)}, "leave a place that no rank holds"),
        ({"need": ((*BY_HEADS[:3], ((3, 5), (0, 9))),)}, "tensor 0 is of 4 heads and 9 tokens"),
        ({"need": (BY_HEADS[:3],)}, "boxes of other numbers of ranks"),
        ({"need": (BY_HEADS,) * 2}, "boxes of 1 and 2 tensors for 1"),
        ({"rank": 4}, "is rank 4 of 4"),
        ({"rank": 1}, r"instead of the box \(\(0, 4\), \(3, 4\)\)"),
        ({"group": "lockstep:0,1,3"}, "is not rank 2 of 4 in that group"),
        ({"group": None}, "needs rows of other ranks and names no group"),
        ({"dtype": torch.float64}, "differ in dtypes"),
        ({"inner": 1}, r"differ in batch and inner sizes: \[\(1, 2\)\] and \[\(1, 1\)\]"),
        ({"fetch": True}, "are at different collectives"),
        ({"end": True}, "waits for rank 2, whose graph has ended"),
    ],
)
def test_rank_2_differs_at_an_exchange(change: dict[str, Any], message: str) -> None:
    whole, meshes = torch.zeros(1, 4, 9, 2), all_meshes((4,))
    inputs = [boxes_of([whole], (BY_TOKENS,), rank) for rank in range(4)]
    asked = {"have": (BY_TOKENS,), "need": (BY_HEADS,)}
    graphs = [exchanging(mesh, **asked) for mesh in meshes]
    if "dtype" in change:
        inputs[2] = [inputs[2][0].to(change["dtype"])]
    elif "inner" in change:
        inputs[2] = [inputs[2][0][..., :1]]
    elif "fetch" in change:
        graphs[2] = fetching(meshes[2], 2, HAVE, HALO)
    elif "end" in change:
        graphs[2] = graph_of(lambda call, x: (x,))
    else:
        graphs[2] = exchanging(meshes[2], **{**asked, **change})
    with pytest.raises(LockstepError, match=message):
        lockstep(graphs, inputs)


# --- what would hang, or be wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"have": (0, 3, 4, 9, 9)}, r"rank 2 at fetch .*: \(1, 1, 0, 4\) has 0 rows instead of 5"),
        ({"need": (*HALO[:3], (2, 12))}, r"rank 0 at fetch .* and rank 2 at fetch .* differ in need"),
        ({"fill": "replicate"}, "differ in fill: zeros and replicate"),
        ({"channels_last": True}, "differ in channels_last: False and True"),
        ({"need": HALO[:3]}, "one more than needs"),
        ({"group": "lockstep:0,1,3"}, "is not rank 2 of 4 in that group"),
        ({"group": "lockstep:0,2,1,3"}, "is not rank 2 of 4 in that group"),
        ({"rank": 3}, "has 0 rows instead of 5"),
        ({"rank": 1}, "has 0 rows instead of 1"),
        ({"rank": 4}, "is rank 4 of 4"),
        ({"group": "world"}, "'world' is none of simulated_mesh"),
        ({"group": None}, "needs rows of other ranks and names no group"),
        ({"fill": "mirror"}, "'mirror' is none of zeros, replicate, reflect, circular"),
        ({"dtype": torch.float64}, "differ in dtype: torch.float32 and torch.float64"),
        ({"columns": 3}, r"differ in sizes of the other dimensions: \(1, 1, -1, 4\) and \(1, 1, -1, 3\)"),
    ],
)
def test_rank_2_differs(change: dict[str, Any], message: str) -> None:
    whole, meshes = torch.zeros(1, 1, 9, 4), all_meshes((4,))
    inputs = pieces(whole, 2, HAVE)
    asked = {"have": HAVE, "need": HALO}
    graphs = [fetching(mesh, 2, **asked) for mesh in meshes]
    if "have" in change:
        graphs[2] = fetching(meshes[2], 2, change["have"], HALO)
    elif "dtype" in change:
        inputs[2] = [inputs[2][0].to(change["dtype"])]
    elif "columns" in change:
        inputs[2] = [inputs[2][0][..., : change["columns"]]]
    else:
        graphs[2] = fetching(meshes[2], 2, **{**asked, **change})
    with pytest.raises(LockstepError, match=message):
        lockstep(graphs, inputs)


def test_out_of_reach() -> None:
    for fill, need in (("reflect", (0, 3)), ("replicate", (0, 0)), ("circular", (0, 0))):
        size = need[1]
        reach = (-size, size + 2)
        graphs = [fetching(mesh, 0, (0, size, size), (reach, reach), fill) for mesh in all_meshes((2,))]
        with pytest.raises(LockstepError, match=f"of {size} rows is out of the reach of fill '{fill}'"):
            lockstep(graphs, [[torch.zeros(size)], [torch.zeros(0)]])


def test_a_rank_ends_early() -> None:
    graphs = [fetching(mesh, 2, (0, 1, 2), ((0, 2), (0, 2))) for mesh in all_meshes((2,))]
    graphs[1] = graph_of(lambda call, x: (x,))
    with pytest.raises(LockstepError, match="rank 0 at fetch .* waits for rank 1, whose graph has ended"):
        lockstep(graphs, pieces(torch.zeros(1, 1, 2, 1), 2, (0, 1, 2)))


def test_fetches_in_another_order() -> None:
    """Two ranks begin with rows, two with columns: 0 waits for 2, that for 3, that for 1, that for 0."""

    def graph(mesh: Mesh) -> GraphModule:
        def build(call: Callable[..., Node], x: Node) -> Any:
            axes = (1, 0) if mesh.rank in (1, 2) else (0, 1)
            return (
                [
                    call(fetch, x, a, (0, 1, 2), ((0, 2), (0, 2)), mesh.coordinates[a], "zeros", mesh.groups[a])
                    for a in axes
                ],
            )

        return graph_of(build)

    with pytest.raises(
        LockstepError,
        match=r"every rank waits for another: rank 0 at fetch .*; rank 1 at fetch .*; rank 2 .*; rank 3 at",
    ):
        lockstep([graph(m) for m in all_meshes((2, 2))], [[torch.zeros(1, 1)] for _ in range(4)])


def test_other_collectives_and_wrong_inputs() -> None:
    gm = graph_of(lambda call, x: (call(torch.ops._c10d_functional.all_reduce.default, x, "sum", "g"),))
    with pytest.raises(LockstepError, match="rank 0: .*all_reduce.* is a collective and no fetch"):
        lockstep([gm], [[torch.zeros(1)]])
    with pytest.raises(LockstepError, match="rank 0: the graph takes 1 inputs, 2 are given"):
        lockstep([gm], [[torch.zeros(1)] * 2])
    with pytest.raises(ValueError, match="1 graphs need the inputs"):
        lockstep([gm], [])
    failing = graph_of(lambda call, x: (call(torch.reshape, x, (3,)),))
    with pytest.raises(RuntimeError, match="shape") as caught:
        lockstep([failing], [[torch.zeros(1)]])
    assert any("on rank 0, at" in note and "reshape" in note for note in caught.value.__notes__)
