"""`pvae::conv_taps`: a convolution on channels-last activations as shifted matrix products, one a tap.

    y = activation(conv(cat(before, x, after), weight) + bias + residual)

No padded copy, no im2col, no concatenation with a causal cache: each is arithmetic on the addresses that a patch is loaded
from (conv_taps_kernel.py). Weights are a convolution's own in channels_last order, so nothing is prepared but their layout.
With `upsample` x counts as enlarged twice by nearest neighbours in H and W, and the weight holds the four 2x2 kernels of
`phase_weight`: 4/9 of the arithmetic, and the enlarged picture is never written.

Sources: implicit GEMM as in CUTLASS and cuDNN; the causal cache as an address as in no other that we know.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps_config import Config, candidate_configs, default_config
from pvae.kernels.conv_taps_launch import FLOATS, Call, Memory, Operands, Plan, make_plan
from pvae.kernels.norm_launch import device_refusal
from pvae.kernels.norm_op import functional_op
from pvae.kernels.triton_launch import on_device

ACTIVATIONS = ("none", "silu", "relu")


def supports(x: Tensor, weight: Tensor, groups: int = 1) -> str | None:
    """Why the op does not take this convolution, or None. Takes fake tensors."""
    if x.dim() not in FORMATS:
        return f"{x.dim() - 2} spatial dimensions, not 2 or 3"
    if not x.dtype.is_floating_point:
        return f"{x.dtype} is not a floating-point type"
    if weight.dtype != x.dtype:
        return f"the activation is {x.dtype}, the weight {weight.dtype}"
    if groups != 1:
        return f"{groups} groups"
    return None


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why this call runs in the reference and not in the kernel, or None: `supports`, the device, and fp32's rounding."""
    return supports(x, weight) or _refusal(x.dtype, x.device.type, torch.backends.cudnn.allow_tf32)


def _refusal(dtype: torch.dtype, device: str, tf32: bool) -> str | None:
    reason = device_refusal(device)
    if reason is None and dtype not in FLOATS:
        return f"{dtype} is not fp16, bf16 or fp32"
    if reason is None and dtype == torch.float32 and device == "cuda" and not tf32:
        return "fp32 without tf32 (torch.backends.cudnn.allow_tf32) has no tensor cores"
    return reason


def out_shape(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    after: Tensor | None = None,
) -> list[int]:
    """[N, O, (T',) H', W']."""
    sizes = list(x.shape[2:])
    for more in (before, after):
        if more is not None:
            sizes[0] = sizes[0] + more.shape[2]
    kernel, out = weight.shape[2:], weight.shape[0] // 4 if upsample else weight.shape[0]
    spatial = [
        (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate(sizes)
    ]
    if upsample:
        spatial[-2:] = [2 * sizes[-2], 2 * sizes[-1]]
    return [x.shape[0], out, *spatial]


def _check(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], upsample: bool, activation: str,
    after: Tensor | None,
) -> None:  # fmt: skip
    """The kernel reads by these sizes: one that is wrong would be memory of another tensor."""
    spatial = x.dim() - 2
    if x.dim() not in FORMATS or weight.dim() != x.dim() or weight.shape[1] != x.shape[1]:
        raise ValueError(f"conv_taps: x {list(x.shape)} does not go with weight {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"conv_taps: x is {x.dtype}, the weight {weight.dtype}")
    if (len(stride), len(padding), len(dilation)) != (spatial, 2 * spatial, spatial):
        raise ValueError(
            f"conv_taps: {spatial} spatial dimensions, stride {stride}, padding {padding}, dilation {dilation}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv_taps: activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    for name, more in (("before", before), ("after", after)):
        if more is not None and x.dim() != 5:
            raise ValueError(f"conv_taps: frames {name} x, but x has no time dimension")
        if more is not None and (
            (more.dim(), more.dtype) != (5, x.dtype) or more.shape[:2] != x.shape[:2] or more.shape[3:] != x.shape[3:]
        ):
            raise ValueError(
                f"conv_taps: {name} {list(more.shape)} of {more.dtype} does not go with x {list(x.shape)} of {x.dtype}"
            )
    if min(padding) < 0:
        raise ValueError(f"conv_taps: padding {list(padding)} is negative")
    if upsample:
        last = (
            list(stride[-2:]),
            list(dilation[-2:]),
            list(padding[-4:]),
            list(weight.shape[-2:]),
            weight.shape[0] % 4,
        )
        if last != ([1, 1], [1, 1], [1, 1, 1, 1], [2, 2], 0):
            raise ValueError(
                "conv_taps: upsample takes a phase weight [4*O, C, ..., 2, 2], stride 1, and padding 1 in H and W"
            )
    shape = out_shape(x, before, weight, stride, padding, dilation, upsample, after)
    if bias is not None and list(bias.shape) != shape[1:2]:
        raise ValueError(f"conv_taps: bias {list(bias.shape)} is not [{shape[1]}]")
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"conv_taps: residual {list(residual.shape)} is not as the result, {shape}")


@dataclass(frozen=True)
class Ready:
    """What is known of calls of one kind: how the result lies, why the reference runs, or else the plan, if any is needed."""

    shape: list[int]
    strides: tuple[int, ...]
    refused: str | None
    plan: Plan | None


@functools.lru_cache(maxsize=4096)
def _ready(call: Call) -> Ready:
    x, before, weight, bias, residual, after = (None if m is None else m.tensor() for m in (*call[:5], call.after))
    assert x is not None and weight is not None
    options = (call.stride, call.padding, call.dilation, call.upsample)
    _check(x, before, weight, bias, residual, *options, call.activation, after)
    shape = out_shape(x, before, weight, *options, after)
    y = torch.empty(shape, device="meta", memory_format=FORMATS[x.dim()])
    refused = supports(x, weight) or _refusal(x.dtype, call.x.device.type, call.tf32)
    plan = make_plan(call, shape) if refused is None and y.numel() else None
    return Ready(shape, y.stride(), refused, plan)


def _fake(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    after: Tensor | None = None,
    **_: Any,
) -> Tensor:
    n, out, *spatial = out_shape(x, before, weight, stride, padding, dilation, upsample, after)
    return x.new_empty([n, *spatial, out]).movedim(-1, 1)


@functional_op(_fake)
def conv_taps(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    activation: str,
    config: Sequence[int],
    after: Tensor | None = None,
) -> Tensor:
    """x [N, C, (T,) H, W], weight [O, C, (kt,) kh, kw] -> [N, O, (T',) H', W'] in channels_last(_3d), of x's dtype.

    Args:
        before, after: [N, C, Tb, H, W], frames in front of x and behind it.
        bias: [O]; residual: as the result. Both are added in fp32.
        stride, dilation: one for each spatial dimension; padding: (front, back) for each, zeros.
        upsample: see above; then weight is [4*O, C, (kt,) 2, 2], and H' and W' are twice H and W.
        activation: none, silu or relu.
        config: the kernel's `Config` as numbers, or none for its own choice.

    Fast if x is channels_last already; else it is copied so. fp32 multiplies in tf32 where torch's convolutions may.
    Raises ValueError where the arguments do not go together.
    """
    operands = Operands(x, before, weight, bias, residual, after)
    read: Any = [None if t is None else Memory(t.shape, t.stride(), t.dtype, t.device) for t in operands]
    call = Call(
        read[0], read[1], read[2], read[3], read[4],
        tuple(stride), tuple(padding), tuple(dilation), upsample, activation, tuple(config),
        not any(t is not None and t.data_ptr() % 16 for t in operands),
        x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32, read[5],
    )  # fmt: skip
    ready = _ready(call)
    if ready.refused is not None:
        y = reference(x, before, weight, bias, residual, stride, padding, dilation, upsample, activation, after)
        return y.clone(memory_format=FORMATS[x.dim()])
    y = torch.empty_strided(ready.shape, ready.strides, dtype=x.dtype, device=x.device)
    if ready.plan is not None:
        on_device(x.device, ready.plan.launch, operands, y)
    return y


OP = conv_taps


def reference(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    activation: str,
    after: Tensor | None = None,
) -> Tensor:
    """The semantics, in torch's own ops."""
    if before is not None or after is not None:
        x = torch.cat([t for t in (before, x, after) if t is not None], 2)
    convolve = functional.conv2d if x.dim() == 4 else functional.conv3d

    def conv(weight: Tensor, padding: Sequence[int]) -> Tensor:
        widths = [w for i in reversed(range(x.dim() - 2)) for w in padding[2 * i : 2 * i + 2]]
        padded = functional.pad(x, widths) if any(widths) else x
        return convolve(padded, weight, bias, tuple(stride), 0, tuple(dilation))

    if upsample:
        phases = [conv(w, [*padding[:-4], 1 - p // 2, p // 2, 1 - p % 2, p % 2]) for p, w in enumerate(weight.chunk(4))]
        rows = [torch.stack(phases[i : i + 2], -1).flatten(-2) for i in (0, 2)]
        y = torch.stack(rows, -2).flatten(-3, -2)
    else:
        y = conv(weight, padding)
    if residual is not None:
        y = y + residual
    return {"none": lambda y: y, "silu": functional.silu, "relu": functional.relu}[activation](y)


__all__ = [
    "OP",
    "Config",
    "candidate_configs",
    "conv_taps",
    "default_config",
    "out_shape",
    "reference",
    "refusal",
    "supports",
]
