"""A zero pad in front of a convolution becomes the convolution's own padding, as far as that can say it.

A convolution pads by the same amount on both sides of a dimension, `pad` by any: the common part moves into the
convolution, and what is left (the causal frames in front, the `(0, 1, 0, 1)` of a downsampling encoder) stays a pad.
`pad` returns a contiguous copy of the whole activation, which costs a pass over memory and destroys channels_last. Only
ATen's slow conv3d of the CPU takes longer to pad itself than `pad` does (8 channels, 6x32x48: 1.77 ms against 1.00).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, Node

from pvae.passes.ir import Builder, ConvNode, PadNode, aten, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule
from pvae.runtime.torch_compat import conv_backend

CONV_OPS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


class FoldPad:
    """`conv(pad(x, (f, b)), padding=p)` -> `conv(pad(x, (f - m, b - m)), padding=p + m)` with `m = min(f, b)`."""

    name = "fold_pad"

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        pad = PadNode.of(conv.x) if conv is not None else None
        if conv is None or pad is None:
            return None
        if pad.mode != "constant" or pad.fill != 0.0:
            how = pad.mode if pad.mode != "constant" else f"by {pad.fill:g}"
            return Refusal(node, f"pads {how}, the convolution pads with zeros")
        spatial, rest = pad.pads[: conv.ndim], pad.pads[conv.ndim :]
        if any(p != (0, 0) for p in rest):
            return Refusal(node, "pads the batch or channel dimension")
        if any(front != back for front, back in conv.padding):
            return Refusal(node, "padding='same' with an uneven total cannot be added to")
        inner = tuple(reversed([pad.along(i) for i in range(conv.ndim)]))
        if any(w < 0 for pair in spatial for w in pair):
            return Refusal(node, "the pad crops (negative width)")
        moved = tuple(min(pair) for pair in inner)
        # A pad in front of the convolution's own padding in the same dimension still adds up: both are zeros.
        if not any(moved):
            return Refusal(node, "the pad is one-sided")
        if not self.everywhere and conv.batched and _pads_slowly(conv):
            return Refusal(node, "ATen's slow conv3d is slower when it pads itself")
        return Match(node, (conv, pad, moved))

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, pad, moved = match.facts
        build = Builder(match.node)
        left: list[int] = []
        for i in range(conv.ndim):  # `pad` counts from the last dimension
            front, back = pad.along(i)
            m = moved[conv.ndim - 1 - i]
            left += [front - m, back - m]
        x = build(aten.pad.default, pad.x, left) if any(left) else pad.x
        padding = [p[0] + m for p, m in zip(conv.padding, moved, strict=True)]
        build.replace(
            build(
                CONV_OPS[conv.ndim],
                x,
                conv.weight,
                conv.bias,
                list(conv.stride),
                padding,
                list(conv.dilation),
                conv.groups,
            )
        )


def _pads_slowly(conv: ConvNode) -> bool:
    x, weight = value(conv.x), value(conv.weight)
    if conv.ndim != 3 or x.device.type != "cpu":
        return False
    padding = [max(pair) for pair in conv.padding]
    return conv_backend(x, weight, None, conv.stride, padding, conv.dilation, conv.groups).startswith("Slow")


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    # A sharded convolution that pads itself fetches its halo once.
    return [FoldPad(settings.get("where") == "any" or context.mesh is not None)]


FOLD_PAD = Pass(
    name="fold_pad",
    summary="move zero pads into the convolutions that read them",
    rules=_rules,
    options={"where": "auto|any"},
)
