"""`exchange` on tensors: ranks as threads of this process, then traced, then three real gloo processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from pvae.passes.ir import Builder, aten, derive
from pvae.runtime.exchange import Box, Boxes, exchange, exchanged_like, is_local, movement
from pvae.runtime.mesh import make_mesh
from pvae.runtime.torch_compat import new_fake_mode, static_fake
from tests.ranks import on_threads, run_script


def cut(whole: Tensor, box: Box) -> Tensor:
    (a, b), (c, d) = box
    return whole[:, a:b, c:d]


def check(wholes: Sequence[Tensor], have: Boxes, need: Boxes) -> None:
    """Exchange on a world of threads, held against the same boxes of the whole tensors; and against its fake."""

    def pieces(rank: int) -> list[Tensor]:
        return [cut(whole, boxes[rank]) for whole, boxes in zip(wholes, have, strict=True)]

    def run(rank: int) -> list[Tensor]:
        return exchange(pieces(rank), have, need, rank, make_mesh().groups[0])

    for rank, got in enumerate(on_threads(len(have[0]), run)):
        mode = new_fake_mode()
        with mode:
            fakes = exchanged_like([static_fake(mode, x) for x in pieces(rank)], have, need, rank, "group")
        for y, fake, whole, boxes in zip(got, fakes, wholes, need, strict=True):
            expected = cut(whole, boxes[rank])
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype) == (fake.shape, fake.dtype)
            assert torch.equal(y, expected)
            assert not y.numel() or y.stride(3) == 1 or y.shape[3] == 1 or is_local(have, need)
            assert not y.numel() or strides(y) == strides(fake)


def strides(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def whole_like(draw: Any, heads: int, tokens: int, dtype: torch.dtype, batch: int, inner: int) -> Tensor:
    """Numbers that are all different (bf16 apart), in any memory order."""
    order = draw(st.permutations(range(4)))
    shape = (batch, heads, tokens, inner)
    x = torch.randn([shape[d] for d in order], dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return x.permute([order.index(d) for d in range(4)])


def bounds(draw: Any, size: int, world: int) -> list[tuple[int, int]]:
    """Uneven and empty pieces."""
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=world - 1, max_size=world - 1)))
    return list(pairwise([0, *cuts, size]))


def tiling(draw: Any, heads: int, tokens: int, world: int) -> list[Box]:
    """Boxes that tile heads x tokens, one a rank in any order: cut again and again, not along one dimension."""
    boxes: list[Box] = [((0, heads), (0, tokens))]
    while len(boxes) < world:
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, 1))
        at = draw(st.integers(*box[dim]))
        halves = ((box[dim][0], at), (at, box[dim][1]))
        boxes += [(half, box[1]) if dim == 0 else (box[0], half) for half in halves]
    return draw(st.permutations(boxes))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


@given(world=st.integers(1, 4), dtype=st.sampled_from(DTYPES), count=st.integers(1, 3), data=st.data())
def test_any_tiling_to_any_boxes(world: int, dtype: torch.dtype, count: int, data: st.DataObject) -> None:
    draw = data.draw
    wholes, have, need = [], [], []
    for _ in range(count):
        if wholes and draw(st.booleans(), "like the one before"):
            wholes.append(torch.rand_like(wholes[-1]))
            have.append(have[-1])
            need.append(need[-1])
            continue
        heads, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 6))
        wholes.append(whole_like(draw, heads, tokens, dtype, draw(st.integers(1, 3)), draw(st.integers(1, 2))))
        have.append(tuple(tiling(draw, heads, tokens, world)))
        interval = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).map(tuple) for n in (heads, tokens)]
        need.append(tuple(draw(st.tuples(*interval)) for _ in range(world)))
    check(wholes, tuple(have), tuple(need))


@given(
    world=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    heads=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    tokens=st.integers(1, 9),
    batch=st.integers(1, 3),
    same=st.booleans(),
    data=st.data(),
)
def test_heads_for_tokens_and_back(
    world: int, dtype: torch.dtype, heads: list[int], tokens: int, batch: int, same: bool, data: st.DataObject
) -> None:
    """q, k, v with one number of heads or with different ones (grouped queries): forth is in one array, whatever the split."""
    draw = data.draw
    heads = heads[:1] * 3 if same else heads
    wholes = [whole_like(draw, h, tokens, dtype, batch, 2) for h in heads]
    rows = bounds(draw, tokens, world)
    shares = [bounds(draw, heads[0], world)] * 3 if same else [bounds(draw, h, world) for h in heads]
    by_tokens = tuple(tuple(((0, h), row) for row in rows) for h in heads)
    by_heads = tuple(tuple((share, (0, tokens)) for share in mine) for mine, _ in zip(shares, heads, strict=False))
    check(wholes, by_tokens, by_heads)
    check(wholes, by_heads, by_tokens)


# Some ranks of a head share its queries, and each needs all of its keys: 2 groups of heads by 2 parts of the tokens.
ROWS = [(0, 3), (3, 4), (4, 4), (4, 9)]
SPLIT = tuple(((0, 4), row) for row in ROWS)
QUERIES = (((0, 2), (0, 5)), ((0, 2), (5, 9)), ((2, 4), (0, 5)), ((2, 4), (5, 9)))
KEYS = (((0, 2), (0, 9)),) * 2 + (((2, 4), (0, 9)),) * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_over_part_of_the_ranks(batch: int) -> None:
    q, k, v = torch.randn(3, batch, 4, 9, 5, dtype=torch.float64)
    check([q, k, v], (SPLIT,) * 3, (QUERIES, KEYS, KEYS))
    check([q], (QUERIES,), (SPLIT,))
    for i in (0, 1):  # each alone, and the groups in turn: the same shares of heads are sent again and again
        turns = tuple((QUERIES, KEYS)[i][r] for r in (0, 2, 1, 3))
        check([q], (SPLIT,), (turns,))
        if i == 0:
            check([q], (turns,), (SPLIT,))


def test_keys_of_other_tokens() -> None:
    """Cross attention: two bundles in one exchange."""
    q, k = torch.randn(2, 8, 9, 5), torch.randn(2, 8, 6, 5)
    keys = tuple(((0, 8), row) for row in [(0, 1), (1, 3), (3, 5), (5, 6)])
    rows = tuple(((0, 8), row) for row in [(0, 3), (3, 4), (4, 5), (5, 9)])
    check([q, k, k + 1], (rows, keys, keys), (heads_of(8), heads_of(8, 6), heads_of(8, 6)))


@pytest.mark.parametrize("to", [0, 3])
def test_one_rank_alone_needs_something(to: int) -> None:
    need = tuple(((0, 4), (0, 9)) if rank == to else ((0, 0), (0, 0)) for rank in range(4))
    check([torch.randn(1, 4, 9, 5)], (SPLIT,), (need,))
    one = tuple(((0, 4), (0, 9)) if rank == 3 - to else ((0, 0), (0, 0)) for rank in range(4))
    check([torch.randn(2, 4, 9, 5)], (one,), (need,))


def test_a_tiling_that_no_straight_cut_divides() -> None:
    """Five boxes around each other, as a pinwheel."""
    wheel = (((0, 2), (0, 1)), ((2, 3), (0, 2)), ((1, 3), (2, 3)), ((0, 1), (1, 3)), ((1, 2), (1, 2)))
    check([torch.randn(2, 3, 3, 4)], (wheel,), ((((0, 3), (0, 3)),) * 5,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.bool], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 2, (1, 4, 9, 3)).to(dtype)
    check([whole], (SPLIT,), (KEYS,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"xs": [torch.zeros(1, 4, 2, 3)]},
            r"tensor 0 is \(1, 4, 2, 3\); rank 0 holds .*, that is \[batch, 4, 3, inner\]",
        ),
        ({"xs": [torch.zeros(4, 3, 3)]}, "tensor 0 is"),
        ({"xs": []}, "0 tensors, and boxes of 1"),
        ({"rank": 4}, "rank must be 0 to 3, not 4"),
        ({"group": None}, "4 ranks exchange boxes: name their process group"),
        ({"need": (KEYS[:3],)}, "of each of as many ranks"),
        ({"need": ()}, "of each of as many ranks"),
        ({"need": ((((0, 5), (0, 9)), *KEYS[1:]),)}, r"must lie within \(\(0, 4\), \(0, 9\)\)"),
        ({"need": ((((2, 1), (0, 9)), *KEYS[1:]),)}, r"\(first, last \+ 1\)"),
        ({"have": ((SPLIT[0], ((0, 4), (2, 4)), *SPLIT[2:]),)}, "must tile .* each place once"),
        ({"have": ((SPLIT[0], ((0, 3), (3, 4)), *SPLIT[2:]),)}, "must tile .* each place once"),
    ],
)
@pytest.mark.parametrize("function", [exchange, exchanged_like])
def test_mistakes_say_what_would_be_right(function: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    given = {"xs": [torch.zeros(1, 4, 3, 3)], "have": (SPLIT,), "need": (KEYS,), "rank": 0, "group": "group"}
    with pytest.raises(ValueError, match=message):
        function(**{**given, **change})


def test_dtypes_do_not_mix() -> None:
    with pytest.raises(ValueError, match="must have one dtype"):
        xs = [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3, dtype=torch.float64)]
        exchange(xs, (SPLIT,) * 2, (KEYS,) * 2, 0, "group")


def test_where_nothing_moves() -> None:
    """One rank, or ranks that need no more than they hold: views, and no group is needed."""
    x = torch.randn(2, 4, 9, 3)
    (got,) = exchange([x], ((((0, 4), (0, 9)),),), ((((1, 3), (2, 7)),),))
    assert torch.equal(got, x[:, 1:3, 2:7]) and got.data_ptr() == x[:, 1:, 2:].data_ptr()
    (got,) = exchange(
        [x[:, :, 4:]], (SPLIT,), ((((0, 1), (1, 2)), ((0, 0), (0, 0)), ((3, 3), (4, 4)), ((1, 4), (6, 9))),), 3
    )
    assert torch.equal(got, x[:, 1:, 6:])
    assert movement([x[:, :, 4:]], (SPLIT,), (SPLIT,), 3).messages == 0


# What is copied ----------------------------------------------------------------------------------------------------------


def heads_of(heads: int, tokens: int = 9) -> tuple[Box, ...]:
    """All tokens of the heads of each of 4 ranks."""
    return tuple(((r * heads // 4, (r + 1) * heads // 4), (0, tokens)) for r in range(4))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [(4, 4, 4), (8, 4, 4), (5, 5, 5)], ids=str)
def test_what_arrives_is_in_order_and_what_goes_back_is_too(batch: int, heads: tuple[int, ...]) -> None:
    """Views of one buffer, tokens outermost, whatever the split; a result laid out like that is sent as it is."""
    have, need = tuple(tuple(((0, h), row) for row in ROWS) for h in heads), tuple(map(heads_of, heads))
    wholes = [torch.randn(batch, h, 9, 5) for h in heads]
    check(wholes, have, need)
    check(wholes, need, have)
    check(wholes[:1], need[:1], have[:1])
    with new_fake_mode():
        xs = [torch.empty(batch, 3, h, 5).transpose(1, 2) for h in heads]
        forth = exchanged_like(xs, have, need, 0, "group")
        rows = sum(y.shape[1] for y in forth)
        assert len({y.untyped_storage()._cdata for y in forth}) == 1
        assert all(
            strides(y) == strides(torch.empty(9, batch, rows, 5)[:, :, : y.shape[1]].permute(1, 2, 0, 3)) for y in forth
        )
        assert not movement(xs, have, need, 0).assembles
        attended = torch.empty(9, batch, forth[0].shape[1], 5).permute(1, 2, 0, 3)
        assert not movement([attended], need[:1], have[:1], 0).packs
        assert movement([attended.contiguous()], need[:1], have[:1], 0).packs == (forth[0].shape[1] > 1 or batch > 1)
        (back,) = exchanged_like([attended], need[:1], have[:1], 0, "group")
        assert back.transpose(1, 2).is_contiguous(), "what a model does next costs nothing"


@pytest.fixture(params=range(4))
def fake_rank(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def targets(graph: Graph) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx(fake_rank: int, mode: str) -> None:
    """One collective, which outlives dead-code elimination on the rank that gets nothing; three operands in the packing."""
    group, tokens = make_mesh().groups[0], ROWS[fake_rank][1] - ROWS[fake_rank][0]
    xs = [torch.randn(2, 4, tokens, 5) for _ in range(3)]

    def run(*xs: Tensor) -> list[Tensor]:
        return exchange(xs, (SPLIT,) * 3, (heads_of(4),) * 3, fake_rank, group)

    gm = make_fx(run, pre_dispatch=True, tracing_mode=mode)(*xs)
    gm.graph.eliminate_dead_code()
    found = targets(gm.graph)
    assert [t for t in found if "c10d" in t] == [f"_c10d_functional.{t}" for t in ("all_to_all_single", "wait_tensor")]
    cats = gm.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [len(node.args[0]) for node in cats] == ([3] if tokens else [])
    (output,) = gm.graph.find_nodes(op="output")
    assert [node.meta["val"].shape for node in output.args[0]] == [(2, 1, 9, 5)] * 3


def test_dynamo_makes_one_graph(fake_rank: int) -> None:
    group, graphs = make_mesh().groups[0], []
    x = torch.randn(1, 4, ROWS[fake_rank][1] - ROWS[fake_rank][0], 5)

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm.graph)
        (output,) = gm.graph.find_nodes(op="output")
        shapes = [value.meta["val"].shape for value in output.args[0]]
        return lambda *_: [torch.empty(shape) for shape in shapes]  # a fake group refuses to receive for nothing sent

    @torch.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    def run(x: Tensor) -> Tensor:
        q, k = exchange([x * 2, x * 3], (SPLIT,) * 2, (QUERIES, KEYS), fake_rank, group)
        return q.sum() + k

    with torch.no_grad():
        run(x)
    assert [sum("all_to_all" in t for t in targets(graph)) for graph in graphs] == [1]


def test_a_node_of_a_graph() -> None:
    """What passes write: a node for the list, one for each of its items, and the fakes of both."""
    graph, mode = Graph(), new_fake_mode()
    x = graph.placeholder("x")
    x.meta["val"] = static_fake(mode, torch.randn(2, 4, 3, 5))
    build = Builder(graph.output((x,)))
    both = build(exchange, [x, x], (SPLIT, SPLIT), (KEYS, QUERIES), 0, "group")
    items = [build(getitem, both, i) for i in range(2)]
    assert [node.meta["val"].shape for node in items] == [(2, 2, 9, 5), (2, 2, 5, 5)]
    assert [y.stride() for y in derive(both)] == [node.meta["val"].stride() for node in items]


@pytest.mark.slow
def test_gloo_processes(tmp_path: Path) -> None:
    run_script(Path(__file__).with_name("exchange_gloo.py"), "3", str(tmp_path / "store"), seconds=500)
