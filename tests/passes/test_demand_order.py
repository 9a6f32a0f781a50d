"""demand_order: a node stands just before what first needs it, unless order means something."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.passes.demand_order import in_demand_order
from pvae.testing import capture
from tests.passes.shard_case import shard


def names(graph: torch.fx.Graph) -> list[str]:
    return [
        getattr(n.target, "__name__", str(n.target)).partition(".")[0] for n in graph.nodes if n.op == "call_function"
    ]


def test_each_operand_is_finished_before_the_next_one_begins() -> None:
    def model(x: Tensor) -> Tensor:
        a, b = x.sin(), x.cos()
        a, b = a.exp(), b.abs()
        x.tanh()
        return a + b

    gm = capture(model, torch.randn(3)).gm
    before = torch.fx.Interpreter(gm).run(torch.ones(3))
    assert names(gm.graph)[:4] == ["sin", "cos", "exp", "abs"]
    assert in_demand_order(gm.graph)
    assert names(gm.graph) == ["sin", "exp", "cos", "abs", "add"]
    gm.recompile()
    assert torch.equal(torch.fx.Interpreter(gm).run(torch.ones(3))[0], before[0])


def test_writes_and_random_numbers_stay_where_they_are() -> None:
    def writing(x: Tensor) -> Tensor:
        y = x.cos()
        x.add_(1)
        return y.sin() + x

    def random(x: Tensor) -> Tensor:
        a, b = torch.rand_like(x), x.cos()
        return b + a

    for model in (writing, random):
        gm = capture(model, torch.randn(3)).gm
        order = names(gm.graph)
        assert not in_demand_order(gm.graph) and names(gm.graph) == order


def test_long_exchanges_start_before_the_next_projection() -> None:
    def model(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w).unflatten(2, (4, 3)).transpose(1, 2) for w in (wq, wk, wv))
        return F.scaled_dot_product_attention(q.tanh(), k.tanh(), v).transpose(1, 2).flatten(2)

    args = torch.randn(1, 8, 12, dtype=torch.float64), *torch.randn(3, 12, 12, dtype=torch.float64)
    slow = "h200,exchange=0:1e-9/1:1/1e9:2,link=1"
    found = shard(model, *args, mesh=(2,), weights=3, shard="sequence", machine=slow)
    order = [n for n in names(found.graphs[0].graph) if n in ("linear", "exchange", "scaled_dot_product_attention")]
    assert order == [*["linear", "exchange"] * 3, "scaled_dot_product_attention", "exchange"]
    for output in found.run(*args):
        torch.testing.assert_close(output[0], model(*args), rtol=1e-12, atol=1e-12)


def test_a_graph_that_keeps_its_order_says_so() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).unflatten(2, (4, 3)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q + 1, q * 2).transpose(1, 2).flatten(2)
        return out + torch.rand_like(w).sum()

    args = torch.randn(1, 8, 12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    found = shard(model, *args, mesh=(2,), weights=1, shard="sequence")
    (refusal,) = found.report.refusals
    assert refusal.rule == "demand_order" and "draws random numbers" in refusal.note
