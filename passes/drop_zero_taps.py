"""Known-zero taps: a kernel tap that reads nothing but padding zeros, in every window, is dropped.

A causal video convolution pads kt - 1 frames in front. On a single frame (an image through a video VAE, a decoder's first
chunk) all but the last time tap multiply zeros: two thirds of the arithmetic of Qwen-Image's decoder. The same holds in
any dimension where the input is thinner than the kernel.

Exact for finite weights: 0 * w is 0 unless w is Inf or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from pvae.passes.fold_pad import CONV_OPS
from pvae.passes.ir import Builder, ConvNode, PadNode, aten, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule


@dataclass(frozen=True)
class Taps:
    """For one dimension: the taps `[first, last]` that read data, and the (front, back) pad that is then needed."""

    first: int
    last: int
    front: int
    back: int


def live_taps(size: int, kernel: int, stride: int, dilation: int, front: int, back: int) -> Taps | None:
    """The taps of a 1-D convolution that read any of the `size` inputs; None if none does."""
    out = (size + front + back - dilation * (kernel - 1) - 1) // stride + 1
    live = [
        tap for tap in range(kernel) if any(0 <= o * stride + tap * dilation - front < size for o in range(max(out, 0)))
    ]
    if not live:
        return None
    first, last = live[0], live[-1]
    new_front = front - first * dilation
    new_back = (out - 1) * stride + dilation * (last - first) + 1 - size - new_front
    return Taps(first, last, new_front, new_back)


class DropZeroTaps:
    """`conv(pad(x), w)` -> `conv(x', w[..., first:last+1])` where the other taps see only zeros."""

    name = "drop_zero_taps"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        if conv is None or not conv.batched:
            return None
        pad = PadNode.of(conv.x)
        if pad is not None and (pad.mode != "constant" or pad.fill != 0.0 or len(pad.pads) > conv.ndim):
            pad = None
        if pad is not None and any(width < 0 for pair in pad.pads for width in pair):
            pad = None  # it crops: what the convolution then pads are zeros, not the frames that were cropped
        x = pad.x if pad is not None else conv.x
        found: list[Taps] = []
        dropped = 0
        for dim in range(conv.ndim):
            outer = pad.along(conv.ndim - 1 - dim) if pad is not None else (0, 0)
            front, back = (a + b for a, b in zip(outer, conv.padding[dim], strict=True))
            kernel, size = conv.kernel[dim], static(value(x).shape[2 + dim])
            everything = Taps(0, kernel - 1, front, back)
            taps: Taps | None = everything
            if size is not None and kernel > 1 and (front > 0 or back > 0):
                taps = live_taps(size, kernel, conv.stride[dim], conv.dilation[dim], front, back)
            if taps is None:
                return Refusal(node, "no tap reads any input")
            if taps.last - taps.first + 1 == kernel:
                taps = everything
            dropped += kernel - (taps.last - taps.first + 1)
            found.append(taps)
        if not dropped:
            return None
        kept = "x".join(str(t.last - t.first + 1) for t in found)
        return Match(node, (conv, x, found), f"{'x'.join(map(str, conv.kernel))} -> {kept}")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, x, found = match.facts
        build = Builder(match.node)
        weight, padding = conv.weight, list[int]()
        left: list[int] = []
        for dim, taps in enumerate(found):
            if taps.last - taps.first + 1 != conv.kernel[dim]:
                weight = build(aten.slice.Tensor, weight, 2 + dim, taps.first, taps.last + 1)
            common = max(0, min(taps.front, taps.back))
            padding.append(common)
            left = [taps.front - common, taps.back - common, *left]  # `pad` counts from the last dimension; < 0 crops
        if any(left):
            x = build(aten.pad.default, x, left)
        args = (x, weight, conv.bias, list(conv.stride), padding, list(conv.dilation), conv.groups)
        build.replace(build(CONV_OPS[conv.ndim], *args))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [DropZeroTaps()]


DROP_ZERO_TAPS = Pass(
    name="drop_zero_taps",
    summary="drop kernel taps that read only padding zeros",
    rules=_rules,
    exact="exact for finite weights",
)
