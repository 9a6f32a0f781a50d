"""The cost model: FLOPs, traffic and fusion, memory, exchanges, and whole decoders against what was measured."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from pvae.passes.cost import Cost, CostError, graph_cost
from pvae.passes.ir import Builder, output_node, placeholders
from pvae.passes.machine import H200, MACHINES, MachineError, machine_named
from pvae.runtime.exchange import Box, exchange
from pvae.runtime.fetch import fetch
from pvae.testing import capture, rewrite
from pvae.tools.model_run import Request
from pvae.tools.plan import rank_graphs

F32 = 4
MIB = 2**20
X, Y = torch.randn(2, 1, 8, 4, 16, 16)


def cost_of(function: Callable[..., Any], *args: Tensor) -> Cost:
    return graph_cost(capture(function, *args).gm.graph, H200)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (F.linear, [(10, 32), (64, 32)], 2 * 10 * 32 * 64),
        (torch.matmul, [(3, 10, 32), (32, 5)], 2 * 3 * 10 * 32 * 5),
        (F.conv2d, [(2, 8, 9, 9), (4, 8, 3, 3)], 2 * 2 * 4 * 7 * 7 * 8 * 9),
        (lambda x, w: F.conv2d(x, w, stride=2, groups=2), [(1, 8, 9, 9), (4, 4, 3, 3)], 2 * 4 * 4 * 4 * 4 * 9),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(1, 8, 5, 5), (8, 4, 2, 2)], 2 * 25 * 8 * 4 * 4),
        (F.scaled_dot_product_attention, [(1, 2, 12, 16)] * 3, 2 * 2 * 12 * 12 * (16 + 16)),
        (lambda q, k: torch.einsum("bic,bjc->bij", q, k), [(2, 6, 8), (2, 5, 8)], 2 * 2 * 6 * 5 * 8),
        (torch.add, [(10, 32), (10, 32)], 0),
    ],
)
def test_flops(function: Callable[..., Any], shapes: list[tuple[int, ...]], flops: int) -> None:
    assert cost_of(function, *(torch.randn(s) for s in shapes)).flops == flops


def test_the_unfold_is_the_same_convolution_with_a_copy() -> None:
    x, w = X, torch.randn(6, 8, 3, 3, 3)
    plain, _ = rewrite(F.conv3d, x, w, passes="canonicalize")
    unfolded, _ = rewrite(F.conv3d, x, w, passes="conv3d_unfold{form=unfold2d}")
    before, after = graph_cost(plain.graph, H200), graph_cost(unfolded.graph, H200)
    assert after.flops == before.flops
    assert after.bytes > before.bytes + 2 * x.numel() * F32


def test_small_products_leave_units_idle() -> None:
    large, small = torch.randn(1, 64, 512, 512), torch.randn(1, 64, 16, 16)
    w = torch.randn(64, 64, 3, 3)
    slow = cost_of(F.conv2d, small, w)
    fast = cost_of(F.conv2d, large, w)
    assert slow.flops / slow.arithmetic < 0.2 * fast.flops / fast.arithmetic


# --- traffic and fusion ----------------------------------------------------------------------------------------------


def test_a_pointwise_chain_is_one_kernel() -> None:
    found = cost_of(lambda x: F.silu(x + 1).double().sin().float() * 2, X)
    assert found.kernels == 1
    assert found.bytes == 2 * X.numel() * F32
    assert found.traffic == pytest.approx(found.bytes / H200.memory)


def test_what_a_convolution_reads_is_written_first() -> None:
    x, w = torch.randn(1, 8, 32, 32), torch.randn(8, 8, 1, 1)
    found = cost_of(lambda x, w: F.silu(F.conv2d(F.silu(x), w)), x, w)
    assert found.kernels == 3
    assert found.bytes == (6 * x.numel() + w.numel()) * F32


def test_views_are_free() -> None:
    found = cost_of(lambda x: x.permute(0, 2, 1, 3, 4).reshape(4, 8, 16, 16).unsqueeze(0)[:, 1:], X)
    assert (found.kernels, found.bytes, found.peak) == (0, 0, 0)


def test_a_kernel_reads_no_more_than_it_uses() -> None:
    found = cost_of(lambda x, y: torch.cat([x[:, :, -1:], y], 2), X, Y)
    assert found.bytes == (2 * (X.numel() + X.numel() // 4)) * F32
    upsampled = cost_of(lambda x: F.interpolate(x, scale_factor=2.0), X)
    assert upsampled.bytes == 9 * X.numel() * F32


def test_a_sum_that_two_read_is_written_and_a_cast_is_not() -> None:
    def shared_sum(x: Tensor, y: Tensor) -> list[Tensor]:
        s = x + y
        return [s.sin(), s.cos()]

    def shared_cast(x: Tensor, y: Tensor) -> list[Tensor]:
        s = x.double()
        return [s.sin().float(), s.cos().float()]

    assert cost_of(shared_sum, X, Y).kernels == 3
    assert cost_of(shared_cast, X, Y).kernels == 2


def test_long_rows_are_read_twice() -> None:
    x = torch.randn(1, 8, 64, 64)
    short = cost_of(lambda x: F.layer_norm(x, [64]), x)
    long = cost_of(lambda x: F.group_norm(x, 2), x)
    assert short.bytes == 2 * x.numel() * F32
    assert long.bytes == 3 * x.numel() * F32


# --- memory ----------------------------------------------------------------------------------------------------------


def test_peak_of_a_chain_and_of_a_residual() -> None:
    x, w = torch.randn(1, 8, 32, 32), torch.randn(8, 8, 1, 1)
    size = x.numel() * F32

    def chain(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(F.conv2d(x, w), w), w)

    def residual(x: Tensor, w: Tensor) -> Tensor:
        first = F.conv2d(x, w)
        return first + F.conv2d(F.conv2d(first, w), w)

    assert cost_of(chain, x, w).peak == 2 * size
    assert cost_of(residual, x, w).peak == 3 * size
    found = graph_cost(capture(chain, x, w).gm.graph, H200, {placeholders(capture(chain, x, w).gm.graph)[1].name})
    assert (found.weights, found.inputs) == (w.numel() * F32, size)
    assert found.memory == found.weights + found.inputs + found.peak


def test_costs_add_up_and_memory_does_not() -> None:
    one, two = cost_of(torch.sin, X), cost_of(lambda x: F.silu(torch.cat([x, x])), X)
    both = one.times(3) + two
    assert both.seconds == pytest.approx(3 * one.seconds + two.seconds)
    assert both.kernels == 3 * one.kernels + two.kernels
    assert both.memory == two.memory > one.memory
    assert Cost.total([one, one, one, two]).seconds == pytest.approx(both.seconds)


# --- exchanges -------------------------------------------------------------------------------------------------------

BOUNDS = (0, 6, 11, 16)
HALO = ((-1, 7), (5, 12), (10, 17))
WHOLE = ((0, 16),) * 3


def fetching(rank: int, need: tuple[tuple[int, int], ...], have: tuple[int, ...] = BOUNDS) -> Graph:
    """silu(x), fetched along its rows by hand, and returned."""
    piece = torch.randn(1, 4, have[rank + 1] - have[rank], 8)
    graph = capture(lambda x: F.silu(x) * 2, piece).gm.graph
    multiply = next(n for n in graph.nodes if "mul" in str(n.target))
    silu: Node = multiply.args[0]
    multiply.meta["stack_trace"] = '  File "/a/model.py", line 7, in forward\n    return silu(x) * 2\n'
    build = Builder(multiply)
    build.replace(build(fetch, silu, 2, have, need, rank, "zeros", "group"))
    return graph


def test_a_halo_exchange() -> None:
    (found,) = graph_cost(fetching(1, HALO), H200).exchanges
    row = 4 * 8 * F32
    assert (found.kind, found.dim, found.group, found.whole, found.result) == ("exchange", 2, "group", False, True)
    assert (found.sent, found.received, found.messages) == (2 * row, 2 * row, 2)
    assert found.seconds == 20e-6
    (edge,) = graph_cost(fetching(0, HALO), H200).exchanges
    assert (edge.sent, edge.messages) == (row, 1)
    assert found.source == "model.py:7: return silu(x) * 2"


def test_a_gather_moves_padded_pieces() -> None:
    cost = graph_cost(fetching(2, WHOLE), H200)
    (found,) = cost.exchanges
    assert (found.kind, found.whole, found.messages) == ("gather", True, 2)
    assert found.received == 2 * 6 * 4 * 8 * F32
    assert cost.exchange == found.seconds == pytest.approx(20e-6 + found.received / H200.link)


def test_what_stays_is_no_exchange() -> None:
    local = graph_cost(fetching(1, ((0, 0), (7, 10), (0, 0))), H200)
    assert not local.exchanges and local.exchange == 0
    assert graph_cost(fetching(0, ((0, 3),), (0, 6)), H200).kernels == 1  # a view of what silu wrote


@given(st.data())
def test_what_one_sends_another_receives(data: st.DataObject) -> None:
    world = data.draw(st.integers(2, 4))
    have = (0, *sorted(data.draw(st.lists(st.integers(0, 12), min_size=world - 1, max_size=world - 1))), 12)
    starts = data.draw(st.lists(st.integers(-2, 12), min_size=world, max_size=world))
    need = tuple((start, start + data.draw(st.integers(0, 6))) for start in starts)
    ranks = [graph_cost(fetching(rank, need, have), H200).exchanges for rank in range(world)]
    assert len({len(found) for found in ranks}) == 1
    assert sum(e.sent for found in ranks for e in found) == sum(e.received for found in ranks for e in found)


# Heads and tokens of 3 ranks: tokens are split, heads are needed; of grouped queries there are fewer keys
TOKENS = tuple(((0, 6), (a, b)) for a, b in ((0, 8), (8, 12), (12, 16)))
HEADS = tuple(((2 * r, 2 * r + 2), (0, 16)) for r in range(3))
KEY_TOKENS, KEY_HEADS = tuple(((0, 3), t) for _, t in TOKENS), tuple(((r, r + 1), (0, 16)) for r in range(3))


def attending(rank: int, keys: bool, have: tuple[Box, ...] = TOKENS, need: tuple[Box, ...] = HEADS) -> Graph:
    """Attention of sin(q) with k and v (of half the heads), exchanged by hand on the way there and back."""
    (a, b), (c, d) = have[rank]
    of_keys = (KEY_TOKENS, KEY_HEADS) if keys else (have, need)
    xs = [torch.randn(1, h, d - c, 8) for h in (b - a, *[3 if keys else b - a] * 2)]
    graph = capture(lambda q, k, v: [q.sin(), k + 1, v + 1], *xs).gm.graph
    out = output_node(graph)
    build, group = Builder(out), "group"
    qkv = build(exchange, list(out.args[0]), (have, *[of_keys[0]] * 2), (need, *[of_keys[1]] * 2), rank, group)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    attended = build(sdpa, *(build(getitem, qkv, i) for i in range(3)), enable_gqa=keys)
    back = build(exchange, [attended], (need,), (have,), rank, group)
    out.args = ((build(getitem, back, 0),),)
    return graph


@pytest.mark.parametrize("keys", [False, True])
def test_heads_for_tokens(keys: bool) -> None:
    """Of rank 0's 8 tokens of 6 heads two thirds go; it gets 8 tokens of 2 heads. The way back carries only the queries."""
    place = 8 * F32  # of one head and token
    cost = graph_cost(attending(0, keys), H200)
    there, back = cost.exchanges
    heads = 4 + (2 * 2 if keys else 4 * 2)
    assert (there.kind, there.group, there.messages, there.result, there.have) == ("boxes", "group", 2, False, (0, 16))
    assert (there.sent, there.received) == (8 * heads * place, 8 * heads // 2 * place)
    assert (back.sent, back.received, back.result) == (8 * 2 * place, 8 * 4 * place, True)
    assert cost.exchange == there.seconds + back.seconds == 40e-6
    # One kernel packs, with what computes q, k and v in it; attention; nothing on the way but the copy of what came back.
    assert cost.kernels == 3


@given(st.data())
def test_what_one_sends_another_receives_of_boxes(data: st.DataObject) -> None:
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, 16), min_size=2, max_size=2))), 16]
    have = tuple(((0, 6), (cuts[r], cuts[r + 1])) for r in range(3))
    need = data.draw(st.permutations(HEADS))
    ranks = [graph_cost(attending(rank, False, have, tuple(need)), H200).exchanges for rank in range(3)]
    assert all(len(found) == 2 for found in ranks)
    for each in zip(*ranks, strict=True):
        assert sum(e.sent for e in each) == sum(e.received for e in each) > 0


def test_boxes_that_stay_are_no_exchange() -> None:
    cost = graph_cost(attending(1, False, HEADS, HEADS), H200)
    assert not cost.exchanges and cost.exchange == 0


def test_exchange_times_are_those_measured() -> None:
    for kib, microseconds in ((16, 20), (640, 20), (2560, 38)):  # measured: a message to either neighbour
        assert H200.exchange_seconds(2 * kib * 1024) == pytest.approx(microseconds * 1e-6)
    assert H200.gather_seconds(384 * MIB) == pytest.approx(384 * MIB / 315e9, rel=0.05)
    assert H200.exchange_seconds(100 * MIB) > H200.exchange_seconds(10 * MIB) > H200.exchange_seconds(4 * MIB)


def test_symbolic_sizes_are_refused() -> None:
    graph = capture(torch.sin, X).gm.graph
    mode = torch._subclasses.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    for node in graph.nodes:
        if node is not output_node(graph):
            node.meta["val"] = mode.from_tensor(X)
    with pytest.raises(CostError, match="symbolic"):
        graph_cost(graph, H200)


# --- machines --------------------------------------------------------------------------------------------------------


def test_machines_by_name_and_constants() -> None:
    assert machine_named("h200") == machine_named("") == H200
    slow = machine_named("a100,memory=1e12,exchange=5e-5,convolution=0:0.1/128:0.5")
    assert (slow.memory, slow.exchange, slow.convolution) == (1e12, ((0, 5e-5),), ((0, 0.1), (128, 0.5)))
    assert slow.matrix == MACHINES["a100"].matrix and "memory=1e+12" in slow.source
    assert machine_named("matrix=786e12,link=1e11").link == 1e11
    assert H200.measured and not any(m.measured for m in MACHINES.values() if m is not H200)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h20", "did you mean h200.*h200, h100, a100"),
        ("h200,memroy=1", "did you mean memory.*matrix.*capacity"),
        ("h200,memory", "not written CONSTANT=NUMBER"),
        ("h200,memory=fast", "not a number"),
        ("h200,memory=-1", "positive"),
        ("h200,exchange=5:1/3:1", "must rise"),
        ("h200,exchange=0:a", "points such as"),
        ("h200,name=x", "no constant.*'name'"),
    ],
)
def test_mistakes_name_the_way_out(text: str, said: str) -> None:
    with pytest.raises(MachineError, match=said):
        machine_named(text)


def test_rates_by_dtype() -> None:
    assert H200.product_rate(torch.bfloat16) == H200.product_rate(torch.float16) == 786e12
    assert H200.product_rate(torch.float32) < H200.product_rate(torch.float32, convolution=True) < 786e12
    assert H200.product_rate(torch.float64) == H200.fp64


# --- against measured decoders (docs/measurements.md, one H200, bf16) -------------------------------------------------

cuda_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build")


@pytest.mark.parametrize(
    ("model", "size", "device", "measured"),
    [
        ("kl", (1024, 1024), "cpu", 34.9e-3),
        ("qwen-image", (1024, 1024), "cpu", 14.0e-3),
        pytest.param("qwen-image", (1024, 1024), "cuda", 14.0e-3, marks=cuda_build),
        pytest.param("mochi", (19, 480, 848), "cuda", 390e-3, marks=cuda_build),
        pytest.param("wan2.1", (81, 480, 832), "cuda", 785e-3, marks=cuda_build),
    ],
)
def test_whole_decoders_within_thirty_percent(model: str, size: tuple[int, ...], device: str, measured: float) -> None:
    request = Request(model, preset="full", dtype=torch.bfloat16, size=size, device=device)
    graphs = rank_graphs(request, (), 0)
    total = Cost.total(graph_cost(g.graph, H200, g.weights).times(g.calls) for g in graphs)
    assert 0.7 * measured < total.seconds < 1.3 * measured
