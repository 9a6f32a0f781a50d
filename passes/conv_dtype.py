"""`conv_dtype="bf16"`: convolutions compute in bf16 under fp32 activations. Approximate; on only when asked for by name.

As on ROCm upstream (SGLang: PSNR 38.1 dB on the temporal unfold's bf16 form). The bias is added in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from pvae.passes.ir import Builder, ConvNode, aten, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule


class ConvInBf16:
    """`conv(x, w, b)` -> `conv(x.bf16, w.bf16).float() + b`."""

    name = "conv_dtype"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        if conv is None or not conv.batched:
            return None
        if value(conv.x).dtype is not torch.float32:
            return Refusal(node, f"the activation is {value(conv.x).dtype}, not float32")
        return Match(node, conv)

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, node = match.facts, match.node
        build = Builder(node)
        x = build(aten.to.dtype, conv.x, torch.bfloat16)
        weight = build(aten.to.dtype, conv.weight, torch.bfloat16)
        assert callable(node.target)
        rest = list(node.args[3:])
        y = build(node.target, x, weight, None, *rest, **{k: v for k, v in node.kwargs.items() if k != "bias"})
        y = build(aten.to.dtype, y, torch.float32)
        if conv.bias is not None:
            y = build(aten.add.Tensor, y, build(aten.reshape.default, conv.bias, [-1] + [1] * conv.ndim))
        build.replace(y)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [ConvInBf16()] if context.options.conv_dtype == "bf16" else []


CONV_DTYPE = Pass(
    name="conv_dtype",
    summary="convolutions in bf16 under fp32 activations, where asked for",
    rules=_rules,
    exact="approximate: on only when asked for",
)
