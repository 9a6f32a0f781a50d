"""`pvae::conv_taps_norm`: `conv_taps`, and the norm over channels that reads its result, before that leaves the chip.

    y = conv(cat(before, x), weight) + bias + residual          z = activation(norm(y) * norm_weight + norm_bias)

A program of Hopper's kernel that holds all channels of a position normalises it where it is: the norm's reading of y is
saved, and its writing too if nothing else reads y. `keep` says whether something does. `tail` frames of z, the last ones,
are written once more into a tensor of their own: the causal cache of the next chunk, which else is copied out of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.kernels.channel_norm_act import channel_norm_act
from pvae.kernels.conv_taps import conv_taps, out_shape, ready_for
from pvae.kernels.conv_taps_launch import Call, Memory, NormCall, on_device
from pvae.kernels.norm_op import functional_op


def _fake(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    keep: bool,
    tail: int,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    n, out, *spatial = out_shape(x, before, weight, stride, padding, dilation, upsample)

    def result(sizes: Sequence[int]) -> Tensor:
        return x.new_empty([n, *sizes, out]).movedim(-1, 1)

    nothing = x.new_empty([0])
    return (
        result(spatial) if keep else nothing,
        result(spatial),
        result([tail, *spatial[1:]]) if tail else torch.empty_like(nothing),
    )


@functional_op(_fake)
def conv_taps_norm(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    config: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    factor: float,
    activation: str,
    keep: bool,
    tail: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z, the last `tail` frames of z), [N, O, (T',) H', W'] in channels_last(_3d), of x's dtype.

    y is [0] without `keep`, and the frames are [0] without `tail`, which is for 3 spatial dimensions.

    The convolution's arguments are those of `conv_taps`, the norm's those of `channel_norm_act`: `norm` rms, l2 or layer,
    activation none, silu, relu or gelu. The norm is of y as rounded to x's dtype. Where no kernel does both at once, one
    does each. Raises ValueError where the arguments do not go together.
    """
    tensors = (x, before, weight, bias, residual)
    given = (*tensors, norm_weight, norm_bias)
    memory = [None if t is None else Memory(t.shape, t.stride(), t.dtype, t.device) for t in given]
    call = Call(
        *memory[:5], tuple(stride), tuple(padding), tuple(dilation), upsample, "none", tuple(config),
        not any(t is not None and t.data_ptr() % 16 for t in given),
        x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32,
        NormCall(*memory[5:], norm, eps, factor, activation, keep, tail),
    )  # fmt: skip
    ready = ready_for(call)
    if ready.plan is None:
        y = conv_taps(*tensors, stride, padding, dilation, upsample, "none", config)
        z = channel_norm_act(y, norm_weight, norm_bias, norm, eps, factor, activation)
        last = z[:, :, z.shape[2] - tail :].clone(memory_format=torch.channels_last_3d) if tail else x.new_empty([0])
        return (y if keep else x.new_empty([0])), z, last
    z = torch.empty_strided(ready.shape, ready.strides, dtype=x.dtype, device=x.device)
    y = torch.empty_like(z) if keep else x.new_empty([0])
    last = x.new_empty([0])
    if tail:
        shape = (*ready.shape[:2], tail, *ready.shape[3:])
        last = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    on_device(x.device, ready.plan.launch, *tensors, y if keep else None, norm_weight, norm_bias, z, last)
    return y, z, last


OP = conv_taps_norm
