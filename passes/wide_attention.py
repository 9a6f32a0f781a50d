"""Attention with heads of more than 256 channels, as VAEs have one in their middle, runs as blocks of matrix products.

    sdpa(q, k, v)  ->  pvae::wide_attention(q, k, v, scale)

Flash attention takes no such head, and torch then runs its memory-efficient kernel, at a seventh of what matrix products
reach (one H200: 6240 tokens of 384 channels, 60 GFLOP, in 0.6 ms). kernels/wide_attention.py has the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, Node

from pvae.kernels import wide_attention as kernel
from pvae.passes.ir import Builder, aten, known, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


class WideAttention:
    """`sdpa(q, k, v)` with wide heads -> `pvae::wide_attention(q, k, v, scale)`."""

    name = "wide_attention"

    def __init__(self, anywhere: bool) -> None:
        self.anywhere = anywhere

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        q, k, v = (value(x) for x in node.args[:3])
        width = static(q.shape[-1])
        if width is None or width <= kernel.WIDEST_FLASH:
            return None
        given = {**DEFAULTS, **dict(zip(DEFAULTS, node.args[3:], strict=False)), **node.kwargs}
        reason = _why_not(given, q, k, v) or (None if self.anywhere else _not_here(q, k, v))
        if reason is not None:
            return Refusal(node, reason)
        scale = width**-0.5 if given["scale"] is None else given["scale"]
        return Match(node, float(scale), f"heads of {width} channels")

    def rewrite(self, graph: Graph, match: Match) -> None:
        build = Builder(match.node)
        build.replace(build(kernel.OP, *match.node.args[:3], match.facts))


def _why_not(given: Mapping[str, Any], q: Any, k: Any, v: Any) -> str | None:
    """What the op does not do."""
    if given["attn_mask"] is not None:
        return "it has a mask"
    if given["is_causal"]:
        return "it is causal"
    if given["dropout_p"]:
        return f"dropout of {given['dropout_p']}"
    if not isinstance(given["scale"], (int, float, type(None))):
        return "its scale is computed"
    if not _same(q.shape[:-2], k.shape[:-2]) or not _same(k.shape[:-1], v.shape[:-1]):
        return "batches or heads of queries, keys and values differ"
    return None


def _not_here(q: Any, k: Any, v: Any) -> str | None:
    """Why the op would only run its reference, or not pay."""
    if q.device.type != "cuda":
        return f"no gain on {q.device.type}"
    if reason := kernel.supports(q, k, v):
        return reason
    if known(kernel.scores_of(q, k) < kernel.FEW_SCORES):
        return f"{kernel.scores_of(q, k)} scores: one launch of SDPA is cheaper below {kernel.FEW_SCORES}"
    return None


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(known(m == n) for m, n in zip(a, b, strict=True))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [WideAttention(settings.get("where") == "any")]


WIDE_ATTENTION = Pass(
    name="wide_attention",
    summary="attention with heads of more than 256 channels as blocks of matrix products",
    rules=_rules,
    options={"where": "auto|any"},
)

__all__ = ["WIDE_ATTENTION"]
