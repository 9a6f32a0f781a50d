"""`pvae::conv_taps_norm`: `conv_taps`, and the norm over channels that reads its result, before that leaves the chip.

    y = conv(cat(before, x), weight) + bias + residual          z = activation(norm(y) * norm_weight + norm_bias)

A program that holds all channels of a position can normalise it where it is: the norm's reading of y is saved, and its
writing too if nothing else reads y. `keep` says whether it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.kernels.channel_norm_act import channel_norm_act
from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps import conv_taps, out_shape, refusal
from pvae.kernels.conv_taps_launch import NormOperands, launch
from pvae.kernels.norm_op import functional_op


def _fake(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    keep: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    n, out, *spatial = out_shape(x, before, weight, stride, padding, dilation, False)
    z = x.new_empty([n, *spatial, out]).movedim(-1, 1)
    return (torch.empty_like(z) if keep else x.new_empty([0])), z


@functional_op(fake=_fake)
def conv_taps_norm(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    factor: float,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(y, z), both [N, O, (T',) H', W'] in channels_last(_3d); y is empty without `keep`.

    The convolution's arguments are those of `conv_taps`, the norm's those of `channel_norm_act`. Where no kernel does both
    at once, one does each.
    """
    if refusal(x, weight) is None:
        shape = out_shape(x, before, weight, stride, padding, dilation, False)
        z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=FORMATS[x.dim()])
        y = torch.empty_like(z) if keep else None
        operands = NormOperands(norm_weight, norm_bias, norm, eps, factor, activation, z)
        if launch(x, before, weight, bias, residual, stride, padding, dilation, False, "none", config, y, operands):
            return (x.new_empty([0]) if y is None else y), z
    y = conv_taps(x, before, weight, bias, residual, stride, padding, dilation, False, "none", config)
    z = channel_norm_act(y, norm_weight, norm_bias, norm, eps, factor, activation)
    return (y if keep else x.new_empty([0])), z


OP = conv_taps_norm
