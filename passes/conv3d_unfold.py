"""Conv3d in the two-dimensional form that suits it, and grouped pointwise convolutions as batched products.

    kernel == stride, no padding       linear      x as patches [N, T', H', W', C*kt*kh*kw] times the flattened weight
    kernel 1, in groups (also conv2d)  linear      [G, O/G, C/G] times x as [G, C/G, N*T*H*W]
    one frame deep (kt == 1)           frames      conv2d on [N*T, C, H, W]
    otherwise                          unfold2d    conv2d on kt frames laid side by side as channels (kernels/conv3d_unfold.py)

All compute the same sums; only the order of summation can differ. What a causal pad in front adds (zero frames, zero
borders) is folded into the unfold. Patches and frames are taken wherever they can be (and `conv_taps` was not chosen); which
convolutions take the others is the policy's choice (conv_policy.py). Sources: SGLang-Diffusion #34424 (ROCm), whose limits on
groups, dilation and padding do not apply.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import conv3d_unfold as kernel
from pvae.kernels.channels_last import OP as CHANNELS_LAST
from pvae.passes.conv_forms import is_grouped_pointwise, is_patches, why_no_frames
from pvae.passes.conv_policy import chosen, hand_over
from pvae.passes.conv_site import zero_pad
from pvae.passes.ir import Builder, ConvNode, PadNode, aten, known, value
from pvae.passes.layout_cut import CHANNELS_LAST as LAST
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule


def _conv3d(node: Node) -> ConvNode | Refusal | None:
    """The convolution, if it is a 3-D one that any form here can take."""
    conv = ConvNode.of(node)
    if conv is None or conv.ndim != 3 or not conv.batched:
        return None
    if not value(conv.x).dtype.is_floating_point:
        return Refusal(node, f"{value(conv.x).dtype} is not a floating-point type")
    return conv


class PatchesToLinear:
    """`conv3d(x, w, stride=kernel)` -> `linear(patches(x), w.flatten(1))`."""

    name = "linear"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = _conv3d(node)
        if not isinstance(conv, ConvNode):
            return conv
        if not is_patches(conv):
            return None
        return Match(node, conv, f"kernel {'x'.join(map(str, conv.kernel))} = stride")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, build = match.facts, Builder(match.node)
        x, sizes = conv.x, [self._patches_along(build, conv, i) for i in range(3)]
        n, c = build.size(x, 0), conv.in_channels
        if conv.kernel == (1, 1, 1):
            patches = build(aten.permute.default, x, [0, 2, 3, 4, 1])
        else:
            split: list[Any] = [n, c]
            for i in range(3):
                used = build.product(sizes[i], conv.kernel[i])
                if not known(value(x).shape[2 + i] == (used if isinstance(used, int) else value(used))):
                    x = build(aten.slice.Tensor, x, 2 + i, 0, used)
                split += [sizes[i], conv.kernel[i]]
            x = build(aten.reshape.default, x, split)
            x = build(aten.permute.default, x, [0, 2, 4, 6, 1, 3, 5, 7])
            features = c * conv.kernel[0] * conv.kernel[1] * conv.kernel[2]
            patches = build(aten.reshape.default, x, [n, *sizes, features])
        weight = build(aten.reshape.default, conv.weight, [conv.out_channels, -1])
        y = build(aten.linear.default, patches, weight, conv.bias)
        build.replace(build(aten.permute.default, y, [0, 4, 1, 2, 3]))

    @staticmethod
    def _patches_along(build: Builder, conv: ConvNode, dim: int) -> Any:
        """How many patches there are along a dimension, in the very terms of convolution's shape formula."""
        size, patch = build.size(conv.x, 2 + dim), conv.kernel[dim]
        if patch == 1:
            return size
        if isinstance(size, int):
            return conv.out_size(dim, size)
        return build(operator.add, build(operator.floordiv, build(operator.sub, size, patch), patch), 1)


@dataclass(frozen=True)
class GroupsToBatchedProduct:
    """`conv(x, w[..., :1, :1], groups=G)` -> `bmm(w as [G, O/G, C/G], x as [G, C/G, N*positions])`, in 2-D and 3-D.

    x in channels_last, or a batch of one in any layout, is read as it lies; the result is channels by positions.
    """

    context: Context
    form: str | None
    name: str = "linear"

    def match(self, node: Node) -> Match | Refusal | None:
        conv, choice = ConvNode.of(node), chosen(node, self.context, self.form)
        if conv is None or choice is None or not is_grouped_pointwise(conv):
            return None
        if choice.form == self.name:
            return Match(node, conv, f"{conv.groups} groups of {conv.in_channels // conv.groups} channels")
        reason = choice.why_not(self.name)
        return Refusal(node, reason) if reason is not None else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, build = match.facts, Builder(match.node)
        groups, inside, out = conv.groups, conv.in_channels // conv.groups, conv.out_channels
        n, *positions = (build.size(conv.x, dim) for dim in range(2 + conv.ndim) if dim != 1)
        x = build(aten.transpose.int, conv.x, 0, 1)
        x = build(aten.reshape.default, x, [groups, inside, build.product(n, *positions)])
        weight = build(aten.reshape.default, conv.weight, [groups, out // groups, inside])
        y = build(aten.reshape.default, build(aten.bmm.default, weight, x), [out, n, *positions])
        y = build(aten.transpose.int, y, 0, 1)
        if conv.bias is not None:
            y = build(aten.add.Tensor, y, build(aten.reshape.default, conv.bias, [out] + [1] * conv.ndim))
        build.replace(y)


@dataclass(frozen=True)
class FramesToConv2d:
    """`conv3d(x, w[:, :, :1])` -> `conv2d` on every frame."""

    context: Context
    name: str = "frames"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = _conv3d(node)
        if not isinstance(conv, ConvNode) or conv.kernel[0] != 1:
            return conv if isinstance(conv, Refusal) else None
        reason = why_no_frames(conv)
        return Match(node, conv) if reason is None else Refusal(node, reason)

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, build = match.facts, Builder(match.node)
        x = conv.x
        if conv.stride[0] != 1:
            x = build(aten.slice.Tensor, x, 2, 0, 2**63 - 1, conv.stride[0])
        n, t = build.size(x, 0), build.size(x, 2)
        frames = build(aten.permute.default, x, [0, 2, 1, 3, 4])
        frames = build(
            aten.reshape.default, frames, [build.product(n, t), conv.in_channels, build.size(x, 3), build.size(x, 4)]
        )
        weight = build(aten.select.int, conv.weight, 2, 0)
        padding = [p[0] for p in conv.padding[1:]]
        y = build(
            aten.conv2d.default,
            frames,
            weight,
            conv.bias,
            list(conv.stride[1:]),
            padding,
            list(conv.dilation[1:]),
            conv.groups,
        )
        hand_over(chosen(match.node, self.context), y)
        y = build(aten.reshape.default, y, [n, t, conv.out_channels, build.size(y, 2), build.size(y, 3)])
        build.replace(build(aten.permute.default, y, [0, 2, 1, 3, 4]))


@dataclass(frozen=True)
class UnfoldTime:
    """`conv3d(pad(x), w)` -> `pvae::conv3d_unfold(x, unfold_weight(w))`.

    In channels_last on a GPU. On the CPU not unless asked for: oneDNN is a little faster so, but sums fp32 in an order
    that is three times less exact (C = 64: 7.2e-7 against conv3d's 2.5e-7; contiguous 2.2e-7).
    """

    context: Context
    form: str | None
    name: str = "unfold2d"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = _conv3d(node)
        if not isinstance(conv, ConvNode):
            return conv
        if conv.kernel[0] == 1:
            return None
        choice = chosen(node, self.context, self.form)
        assert choice is not None
        reason = choice.why_not(self.name)
        if reason is not None:
            return Refusal(node, reason)
        pad = PadNode.of(conv.x)
        if pad is not None and not zero_pad(pad, conv.ndim):
            pad = None
        x = pad.x if pad is not None else conv.x
        widths: list[int] = []
        for dim in range(3):
            outer = pad.along(2 - dim) if pad is not None else (0, 0)
            widths += [outer[0] + conv.padding[dim][0], outer[1] + conv.padding[dim][1]]
        return Match(node, (conv, x, widths), f"{conv.in_channels} -> {conv.out_channels} channels")

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv, x, widths = match.facts
        build = Builder(match.node)
        weight = build(aten.permute.default, conv.weight, [0, 2, 1, 3, 4])
        flat = conv.kernel[0] * conv.in_channels // conv.groups
        weight = build(aten.reshape.default, weight, [conv.out_channels, flat, *conv.kernel[1:]])
        choice = chosen(match.node, self.context, self.form)
        channels_last = choice is not None and choice.layout == LAST
        if channels_last:
            weight = build(CHANNELS_LAST, weight)
            x = build(aten.contiguous.default, x, memory_format=torch.channels_last_3d)
        else:
            weight = build(aten.contiguous.default, weight)
        on_cuda = value(x).device.type == "cuda"
        y = build(
            kernel.OP,
            x,
            weight,
            None if on_cuda else conv.bias,
            conv.kernel[0],
            list(conv.stride),
            widths,
            list(conv.dilation),
            conv.groups,
            channels_last,
        )
        if on_cuda and conv.bias is not None:
            # cuDNN adds the bias in a pass of its own; as a node, Inductor fuses it into what reads the convolution.
            bias = build(aten.reshape.default, conv.bias, [conv.out_channels, 1, 1, 1])
            y = build(aten.add.Tensor, y, bias)
        build.replace(y)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    form = settings.get("form")
    if (form or context.options.conv3d) in ("native", "channels_last"):
        return []
    return [
        PatchesToLinear(),
        GroupsToBatchedProduct(context, form),
        FramesToConv2d(context),
        UnfoldTime(context, form),
    ]


CONV3D_UNFOLD = Pass(
    name="conv3d_unfold",
    summary="conv3d as linear, as conv2d on frames, or as conv2d on temporally unfolded channels; grouped 1x1 as bmm",
    rules=_rules,
    options={"form": "auto|native|channels_last|unfold2d"},
)
