"""A 3x3 convolution of a picture enlarged twice becomes four 2x2 convolutions of the picture itself.

    conv(upsample_nearest2x(x), w) -> pvae::conv_taps(x, pvae::phase_weight(w), upsample=True)

4/9 of the arithmetic, and the enlarged activation, the largest of a decoder's level, is never written. The formula is in
kernels/phase_weight.py. What stands between the enlargement and the convolution is done before it instead (enlarged.py);
`upsample(x.float()).type_as(x)` has no casts then.

A pad or fetch of one row of the enlarged picture takes one row of the small one, and the convolution's result, which then
has two rows too many on that side, is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from pvae.kernels import conv_taps
from pvae.kernels.channels_last import FORMATS
from pvae.kernels.phase_weight import OP as PHASE_WEIGHT
from pvae.passes.conv_rules import no_gain
from pvae.passes.enlarged import Enlarged, enlarged
from pvae.passes.ir import Builder, ConvNode, aten, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

CHANNELS = 64  # from so many the phases are chosen by themselves


def pays(conv: ConvNode) -> str | None:
    """None if the phases are the faster form of `conv`, else why they are not chosen by themselves.

    On GPUs in half precision a convolution of 64 and more channels is bound by arithmetic, of which this saves 5/9.
    """
    x = value(conv.x)
    reason = no_gain(x)
    if reason is not None:
        return reason
    if conv.in_channels < CHANNELS:
        return f"{conv.in_channels} channels: no gain measured below {CHANNELS}"
    return conv_taps.supports(x, value(conv.weight), conv.groups)


def _conv_refusal(conv: ConvNode, found: Enlarged) -> str | None:
    """Why this convolution has no four phases, or None."""
    if found.factors != (2, 2):
        return f"enlarges rows and columns {found.factors[0]} and {found.factors[1]} times, not twice"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.stride[-2:] != (1, 1) or conv.dilation[-2:] != (1, 1):
        return f"stride {conv.stride[-2:]} and dilation {conv.dilation[-2:]}, not 1"
    for own, cut in zip(conv.padding[-2:], found.crop, strict=True):
        if own != (0, 0) and (own != (1, 1) or cut != (0, 0)):
            return f"padding {own} of rows or columns" + (" that are padded already" if any(cut) else ", not 1 or none")
    return None


@dataclass(frozen=True)
class FoldUpsample:
    """`conv(upsample_nearest2x(x), w, b)` -> `conv_taps(x, phase_weight(w), b, upsample=True)`."""

    forced: bool
    name: str = "fold_upsample"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = ConvNode.of(node)
        if conv is None or conv.ndim not in (2, 3) or not conv.batched or conv.kernel[-2:] != (3, 3):
            return None
        found = enlarged(conv.x)
        if found is None:
            return None
        if isinstance(found, str):
            return Refusal(node, found)
        reason = _conv_refusal(conv, found) or (None if self.forced else pays(conv))
        if reason is not None:
            return Refusal(node, reason)
        return Match(node, (conv, found), f"{conv.in_channels} -> {conv.out_channels} channels")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, found = match.facts
        build = Builder(match.node)
        x = build(aten.contiguous.default, found.low(build), memory_format=FORMATS[conv.ndim + 2])
        weight = build(PHASE_WEIGHT, conv.weight)
        time = list(conv.padding[0]) if conv.ndim == 3 else []
        settings = list(conv.stride), [*time, 1, 1, 1, 1], list(conv.dilation)
        y = build(conv_taps.OP, x, None, weight, conv.bias, None, *settings, True, "none", [])
        for axis in (-2, -1):  # rows that a convolution without padding does not make, nor of a border
            if conv.padding[axis] == (0, 0):
                front, back = found.crop[axis]
                y = build(aten.slice.Tensor, y, conv.ndim + 2 + axis, front + 1, -(back + 1))
        build.replace(y)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    choice = settings.get("phases", context.options.upsample_conv)
    return [] if choice == "off" else [FoldUpsample(forced=choice == "on")]


FOLD_UPSAMPLE = Pass(
    name="fold_upsample",
    summary="3x3 convolutions of pictures enlarged twice, as four 2x2 convolutions of the pictures",
    rules=_rules,
    options={"phases": "auto|on|off"},
    exact="sums of two and four weights are rounded: in half precision about 1.4 times the error of the convolution alone",
)
