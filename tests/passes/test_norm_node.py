"""NormNode: every spelling of a layer or RMS norm reads alike; what is nearly one reads as none, or says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.passes.ir import aten, placeholders
from pvae.passes.norm_node import NormNode
from pvae.testing import capture, rewrite

EPS = 1e-6
X, W, B = torch.randn(2, 6, 8), torch.randn(8), torch.randn(8)
HALF = torch.bfloat16


def norms(function: Callable[..., Any], *args: Tensor) -> tuple[list[NormNode], list[str]]:
    """The norms in the canonical graph of `function(x, w, b)`, and the reasons of those that are not handled."""
    gm, _ = rewrite(function, *(args or (X, W, B)), passes="canonicalize")
    found = [NormNode.of(node) for node in gm.graph.nodes]
    for norm in found:
        if isinstance(norm, NormNode):
            inputs = placeholders(gm.graph)
            assert norm.x is inputs[0], "x is what goes in, before casts"
            assert norm.weight in (None, inputs[1]) and norm.bias in (None, inputs[2])
    return [n for n in found if isinstance(n, NormNode)], [n for n in found if isinstance(n, str)]


def by_hand(x: Tensor, square: Callable[[Tensor], Tensor] = torch.square, wide: torch.dtype = torch.float32) -> Tensor:
    wider = x.to(wide)
    return wider * torch.rsqrt(square(wider).mean(-1, keepdim=True) + EPS)


LAYER: dict[str, tuple[Callable[..., Tensor], bool, bool, float]] = {  # function, weight?, bias?, eps
    "plain": (lambda x, w, b: F.layer_norm(x, (8,), eps=EPS), False, False, EPS),
    "affine": (lambda x, w, b: F.layer_norm(x, (8,), w, b, EPS), True, True, EPS),
    "no bias": (lambda x, w, b: F.layer_norm(x, (8,), w, None, EPS), True, False, EPS),
    "no weight": (lambda x, w, b: F.layer_norm(x, (8,), None, b, EPS), False, True, EPS),
    "default eps": (lambda x, w, b: F.layer_norm(x, (8,), w), True, False, 1e-5),
    "by name": (lambda x, w, b: aten.layer_norm.default(x, [8], bias=b, eps=EPS), False, True, EPS),
}


@pytest.mark.parametrize("name", LAYER)
def test_layer_norms(name: str) -> None:
    function, weight, bias, eps = LAYER[name]
    (norm,), _ = norms(function)
    assert (norm.kind, norm.weight is not None, norm.bias is not None, norm.eps) == ("layer", weight, bias, eps)
    assert norm.node.target is aten.layer_norm.default


RMS: dict[str, tuple[Callable[..., Tensor], bool, float]] = {  # function, weight?, eps
    "rms_norm": (lambda x, w, b: F.rms_norm(x, (8,), None, EPS), False, EPS),
    "rms_norm, weight": (lambda x, w, b: F.rms_norm(x, (8,), w, EPS), True, EPS),
    "rms_norm, weight by name": (lambda x, w, b: aten.rms_norm.default(x, [8], weight=w, eps=EPS), True, EPS),
    "rms_norm, default eps": (lambda x, w, b: F.rms_norm(x, (8,), w), True, torch.finfo(torch.float32).eps),
    "pow": (lambda x, w, b: by_hand(x, lambda t: t.pow(2)), False, EPS),
    "pow 2.0": (lambda x, w, b: by_hand(x, lambda t: t**2.0), False, EPS),
    "square": (lambda x, w, b: by_hand(x), False, EPS),
    "x * x": (lambda x, w, b: by_hand(x, lambda t: t * t), False, EPS),
    "positive dimension": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(2, True) + EPS), False, EPS),
    "a tuple of one": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((-1,), keepdim=True) + EPS), False, EPS),
    "eps first": (lambda x, w, b: x * torch.rsqrt(EPS + x.pow(2).mean(-1, True)), False, EPS),
    "root first": (lambda x, w, b: torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * x, False, EPS),
    "divided by the root": (lambda x, w, b: x / torch.sqrt(x.pow(2).mean(-1, True) + EPS), False, EPS),
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norms(name: str) -> None:
    function, weight, eps = RMS[name]
    (norm,), _ = norms(function)
    assert (norm.kind, norm.weight is not None, norm.bias, norm.eps) == ("rms", weight, None, eps)


def test_half_precision_is_read_before_its_casts() -> None:
    for function in (
        lambda x, w, b: by_hand(x).to(HALF) * w,
        lambda x, w, b: F.layer_norm(x.float(), (8,), w.float(), b.float(), EPS).to(HALF),
        lambda x, w, b: F.rms_norm(x.float(), (8,), w.float(), EPS),
    ):
        (norm,), _ = norms(function, *(t.to(HALF) for t in (X, W, B)))
        assert norm.x.meta["val"].dtype == HALF


def test_the_default_eps_is_that_of_the_dtype_computed_in() -> None:
    """What ATen takes; `F.rms_norm` itself is the witness, with values that eps decides."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((1, 2, 8), 3e-4, dtype=dtype)
        (norm,), _ = norms(lambda x, w, b: F.rms_norm(x, (8,)), x, W, B)
        torch.testing.assert_close(F.rms_norm(x, (8,)), F.rms_norm(x, (8,), None, norm.eps))


NONE: dict[str, Callable[..., Tensor]] = {
    "mean over another dimension": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, True) + EPS),
    "mean over two": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), True) + EPS),
    "mean over all": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean() + EPS),
    "sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, True) + EPS),
    "no keepdim": lambda x, w, b: x[0, :, 0] * torch.rsqrt(x[0].pow(2).mean(-1) + EPS),
    "eps outside the root": lambda x, w, b: x / (torch.sqrt(x.pow(2).mean(-1, True)) + EPS),
    "eps before the mean": lambda x, w, b: x * torch.rsqrt((x.pow(2) + EPS).mean(-1, True)),
    "no eps": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, True)),
    "eps a tensor": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, True) + w[0]),
    "eps scaled": lambda x, w, b: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, True), EPS, alpha=2)),
    "another exponent": lambda x, w, b: x * torch.rsqrt(x.pow(4).mean(-1, True) + EPS),
    "absolute values": lambda x, w, b: x * torch.rsqrt(x.abs().mean(-1, True) + EPS),
    "of another tensor": lambda x, w, b: x * torch.rsqrt((x + 1).pow(2).mean(-1, True) + EPS),
    "product of two": lambda x, w, b: x * torch.rsqrt((x * (x + 1)).mean(-1, True) + EPS),
    "of a narrowed x": lambda x, w, b: x * torch.rsqrt(x.half().float().pow(2).mean(-1, True) + EPS),
    "divided by rsqrt": lambda x, w, b: x / torch.rsqrt(x.pow(2).mean(-1, True) + EPS),
    "multiplied by sqrt": lambda x, w, b: x * torch.sqrt(x.pow(2).mean(-1, True) + EPS),
    "root divided by x": lambda x, w, b: torch.sqrt(x.pow(2).mean(-1, True) + EPS) / x,
    "rounded quotient": lambda x, w, b: torch.div(x, torch.sqrt(x.pow(2).mean(-1, True) + EPS), rounding_mode="floor"),
    "L2 norm": lambda x, w, b: F.normalize(x, dim=-1, eps=EPS),
    "group norm": lambda x, w, b: F.group_norm(x, 3, eps=EPS),
    "batch norm": lambda x, w, b: F.batch_norm(x, None, None, training=True),
    "statistics in float64": lambda x, w, b: x * torch.rsqrt(x.double().pow(2).mean(-1, True) + EPS),
    "softmax": lambda x, w, b: x.softmax(-1),
}


@pytest.mark.parametrize("name", NONE)
def test_near_misses(name: str) -> None:
    assert norms(NONE[name]) == ([], [])


def test_what_is_not_handled_says_why() -> None:
    for function in (lambda x, w, b: F.layer_norm(x, (6, 8)), lambda x, w, b: F.rms_norm(x, (6, 8))):
        assert norms(function) == ([], ["the norm is over the last 2 dimensions"])


def test_anything_else_is_none() -> None:
    assert NormNode.of(None) is None and NormNode.of(3) is None
    graph = capture(lambda x: x.relu().sum(), X).gm.graph
    assert [NormNode.of(node) for node in graph.nodes] == [None] * len(graph.nodes)
