"""Conv3d in the two-dimensional form that suits it.

    kernel == stride, no padding       linear      x as patches [N, T', H', W', C*kt*kh*kw] times the flattened weight
    one frame deep (kt == 1)           frames      conv2d on [N*T, C, H, W]
    otherwise                          unfold2d    conv2d on kt frames laid side by side as channels (kernels/conv3d_unfold.py)

All three compute the same sums; only the order of summation can differ. What a causal pad in front adds (zero frames, zero
borders) is folded into the unfold. Which convolutions take the unfold is decided by the rule in `unfold_pays`; measured
figures are beside it. Sources: SGLang-Diffusion #34424 (ROCm), whose limits on groups, dilation and padding do not apply.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import conv3d_unfold as kernel
from pvae.kernels.channels_last import OP as CHANNELS_LAST
from pvae.passes.ir import Builder, ConvNode, PadNode, aten, fake_mode_of, known, static, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule
from pvae.runtime.torch_compat import conv_backend

SLOW_BACKENDS = ("Slow", "Overrideable", "Empty")


def unfold_pays(conv: ConvNode) -> str | None:
    """None if the unfold is the faster form of `conv` on its device by what was measured, else why not.

    ROCm: always (MIOpen's conv3d; SGLang measured +3.6 % end to end, and an order of magnitude on single layers).
    CUDA, half precision: between 64 and 128 input channels, for which cuDNN has no good conv3d kernel. H200, TFLOP/s of
    conv3d channels_last_3d against the unfold: C=96 237 / 324, C=192 538 / 440, C=384 588 / 600 at two frames and
    395 / 346 at one; 96 -> 3 channels 23 / 16. At C=128 whole decoders lose by it (LTX-2 44.8 -> 59.0 ms, CogVideoX 170
    -> 190, 2026-11-21), so it stays with cuDNN.
    CPU: where ATen has no fast conv3d but a fast conv2d. EPYC, fp32, ms: C=16 18.3 / 0.8, C=64 22.4 / 2.6; where oneDNN
    takes the 3-D form (C >= 96, bf16) both are equal.
    """
    x, weight = value(conv.x), value(conv.weight)
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return None
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"cuDNN's conv3d is kept for {x.dtype}"
        if not 64 < conv.in_channels < 128 or conv.out_channels < 32:
            return (
                f"{conv.in_channels} -> {conv.out_channels} channels: cuDNN's conv3d is as fast (the unfold pays at 96)"
            )
        return None
    if x.device.type == "cpu":
        padding = [max(pair) for pair in conv.padding]
        native = conv_backend(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)
        if not native.startswith(SLOW_BACKENDS):
            return f"ATen has a fast conv3d for this shape ({native})"
        with fake_mode_of(conv.node.graph) or nullcontext():
            frame, flat = x[:, :, 0].repeat(1, conv.kernel[0], 1, 1), kernel.unfold_weight(weight, conv.groups)
        two_d = conv_backend(frame, flat, None, conv.stride[1:], padding[1:], conv.dilation[1:], conv.groups)
        if two_d.startswith(SLOW_BACKENDS):
            return f"ATen has no fast conv2d for this shape either ({two_d})"
        return None
    return f"no measurement for device type {x.device.type!r}"


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
        if conv.kernel != conv.stride or any(p != (0, 0) for p in conv.padding) or conv.groups != 1:
            return None
        if any(d != 1 for d, k in zip(conv.dilation, conv.kernel, strict=True) if k > 1):
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


class FramesToConv2d:
    """`conv3d(x, w[:, :, :1])` -> `conv2d` on every frame."""

    name = "frames"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = _conv3d(node)
        if not isinstance(conv, ConvNode) or conv.kernel[0] != 1:
            return conv if isinstance(conv, Refusal) else None
        if conv.padding[0] != (0, 0):
            return Refusal(node, "pads time with a kernel of one frame")
        if conv.stride[0] != 1 and static(value(conv.x).shape[2]) is None:
            return Refusal(node, "strides over a symbolic number of frames")
        if any(front != back for front, back in conv.padding):
            return Refusal(node, "padding='same' is uneven here")
        return Match(node, conv)

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
        y = build(aten.reshape.default, y, [n, t, conv.out_channels, build.size(y, 2), build.size(y, 3)])
        build.replace(build(aten.permute.default, y, [0, 2, 1, 3, 4]))


@dataclass(frozen=True)
class UnfoldTime:
    """`conv3d(pad(x), w)` -> `pvae::conv3d_unfold(x, unfold_weight(w))`.

    In channels_last on a GPU. On the CPU not unless asked for: oneDNN is a little faster so, but sums fp32 in an order
    that is three times less exact (C = 64: 7.2e-7 against conv3d's 2.5e-7; contiguous 2.2e-7).
    """

    forced: bool
    layout: str
    name: str = "unfold2d"

    def match(self, node: Node) -> Match | Refusal | None:
        conv = _conv3d(node)
        if not isinstance(conv, ConvNode):
            return conv
        if conv.kernel[0] == 1:
            return None
        if not self.forced:
            reason = unfold_pays(conv)
            if reason is not None:
                return Refusal(node, reason)
        pad = PadNode.of(conv.x)
        if pad is not None and (
            pad.mode != "constant"
            or pad.fill != 0.0
            or any(w < 0 for pair in pad.pads for w in pair)
            or any(p != (0, 0) for p in pad.pads[3:])
        ):
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
        channels_last = self.layout == "on" or (self.layout == "auto" and value(x).device.type == "cuda")
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
    form = settings.get("form", context.options.conv3d)
    if form in ("native", "channels_last"):
        return []
    unfold = UnfoldTime(forced=form == "unfold2d", layout=context.options.channels_last)
    return [PatchesToLinear(), FramesToConv2d(), unfold]


CONV3D_UNFOLD = Pass(
    name="conv3d_unfold",
    summary="conv3d as linear, as conv2d on frames, or as conv2d on temporally unfolded channels",
    rules=_rules,
    options={"form": "auto|native|channels_last|unfold2d"},
)
