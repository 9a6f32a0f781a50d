"""`pvae::layer_norm_modulate`: layer normalisation over the last dimension, then scale and shift.

    y = (LN(x; eps) * weight + bias) * (scale_constant + scale) + shift

in fp32 from the loads to the one rounding of the result; what is None is left out, scale_constant with scale.
`norm_layout` says which shapes and strides scale and shift may have. With `index`, a row takes scale1 and shift1 (where
they are given) if its index is not 0.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pvae.kernels.norm_launch import run
from pvae.kernels.norm_launch import supports as norm_supports
from pvae.kernels.norm_layout import Operands
from pvae.kernels.norm_op import functional_op, like_x
from pvae.kernels.norm_reference import reference as norm_reference


@functional_op(fake=like_x)
def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    scale_constant: float = 1.0,
    out_dtype: torch.dtype | None = None,
    scale1: Tensor | None = None,
    shift1: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """x [*, C], weight and bias [C], index [*] -> y [*, C], contiguous, of `out_dtype` (default: that of x)."""
    operands = Operands(
        x, weight=weight, bias=bias, scale=scale, scale1=scale1, shift=shift, shift1=shift1, select=index
    )
    y = run("layer", operands, eps, scale_constant, None, out_dtype or x.dtype)[1]
    assert y is not None
    return y


def reference(
    operands: Operands, eps: float, scale_constant: float = 1.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The same in plain torch."""
    return norm_reference("layer", operands, eps, scale_constant)[1].to(out_dtype or operands.x.dtype)


supports = functools.partial(norm_supports, "layer")  # (Operands) -> why the kernel does not take them, or None

OP = layer_norm_modulate
