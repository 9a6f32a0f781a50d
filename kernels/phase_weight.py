"""`pvae::phase_weight`: a 3x3 kernel over a picture enlarged twice, as four 2x2 kernels over the picture itself.

After nearest-neighbour enlargement u[k] = x[k // 2], so of the three taps along a dimension two meet the same entry of x:

    y[2h]     = w0 u[2h - 1] + w1 u[2h]     + w2 u[2h + 1] = w0 x[h - 1]   + (w1 + w2) x[h]      phase 0
    y[2h + 1] = w0 u[2h]     + w1 u[2h + 1] + w2 u[2h + 2] = (w0 + w1) x[h] + w2 x[h + 1]        phase 1

Both dimensions together make four phases of 2x2 taps: 4/9 of the arithmetic. Zeros around u are zeros around x.

The sums are made in fp32 and rounded once to the weight's dtype: an error that the 3x3 kernel does not have, and as large
as that of rounding the result. With weights and activations drawn at random a convolution alone errs 1.4 times as much as
its 3x3 form in bf16 and fp16, and 1.75 times where most of a sum cancels (test_phase_weight.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.norm_op import functional_op

PHASES, TAPS = 4, 2  # phases of a picture, taps of a phase along each dimension


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The kernels of phase 0 and of phase 1 along `dim`, which has three taps: two taps each."""
    w0, w1, w2 = weight.split(1, dim)
    return torch.cat([w0, w1 + w2], dim), torch.cat([w0 + w1, w2], dim)


def reference(weight: Tensor) -> Tensor:
    """The semantics, in torch's own ops: phase 2*ph + pw first, then out channels."""
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return torch.cat([phase for rows in _halves(wide, -2) for phase in _halves(rows, -1)]).to(weight.dtype)


@functools.cache
def _sums(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[16, 9] of ones and zeros: which of the 3x3 taps each tap of each phase adds up."""
    taps = torch.eye(9, dtype=torch.float64).reshape(9, 1, 3, 3)
    return reference(taps).reshape(PHASES, 9, TAPS * TAPS).transpose(1, 2).reshape(-1, 9).to(device, dtype)


def by_product(weight: Tensor) -> Tensor:
    """The same as one matrix product and one copy, where launches count: products with ones and zeros are exact."""
    out, channels, *kernel = weight.shape
    rows = weight.contiguous(memory_format=FORMATS[weight.dim()]).movedim(1, -1).reshape(-1, 9, channels)
    sums = torch.matmul(_sums(weight.dtype, weight.device), rows).reshape(-1, PHASES, TAPS * TAPS, channels)
    return sums.movedim(1, 0).contiguous().reshape(PHASES * out, *kernel[:-2], TAPS, TAPS, channels).movedim(-1, 1)


def _check(weight: Tensor) -> None:
    if weight.dim() not in FORMATS or tuple(weight.shape[-2:]) != (3, 3):
        raise ValueError(f"phase_weight: the weight is [O, C, (kt,) 3, 3], not {list(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"phase_weight: {weight.dtype} is not a floating-point type")


def _like_phases(weight: Tensor) -> Tensor:
    _check(weight)
    out, channels, *kernel = weight.shape
    sizes = [PHASES * out, channels, *kernel[:-2], TAPS, TAPS]
    return torch.empty_like(weight.new_empty(sizes), memory_format=FORMATS[weight.dim()])


@functional_op(_like_phases)
def phase_weight(weight: Tensor) -> Tensor:
    """weight [O, C, (kt,) 3, 3] -> [4*O, C, (kt,) 2, 2] in channels_last(_3d) order, of its dtype.

    Rows are phase-major: those of phase 2*ph + pw, which makes y[..., 2h + ph, 2w + pw], start at (2*ph + pw) * O.
    `conv_taps` takes it with `upsample`. Raises ValueError for any other kernel.
    """
    _check(weight)
    if weight.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16):  # both accumulate in fp32
        return by_product(weight)
    return reference(weight).clone(memory_format=FORMATS[weight.dim()])


OP = phase_weight
