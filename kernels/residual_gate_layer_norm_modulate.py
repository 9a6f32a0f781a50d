"""`pvae::residual_gate_layer_norm_modulate`: a gated residual and the layer normalisation that follows it.

    h = residual + gate * x
    y = (LN(h; eps) * weight + bias) * (scale_constant + scale) + shift

in fp32 from the loads to one rounding of each result: y is made from h before h is rounded. What is None is left out,
scale_constant with scale. `norm_layout` says which shapes and strides gate, scale and shift may have. With `index`, a
row takes gate1, scale1 and shift1 (where they are given) if its index is not 0.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pvae.kernels.norm_launch import run
from pvae.kernels.norm_launch import supports as norm_supports
from pvae.kernels.norm_layout import Operands
from pvae.kernels.norm_op import functional_op, like_residual_and_x
from pvae.kernels.norm_reference import reference as norm_reference


@functional_op(fake=like_residual_and_x)
def residual_gate_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    scale_constant: float = 1.0,
    h_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    gate1: Tensor | None = None,
    scale1: Tensor | None = None,
    shift1: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual and x [*, C], weight and bias [C], index [*] -> h and y [*, C], contiguous.

    `h_dtype` is by default that of residual, `out_dtype` that of x.
    """
    operands = Operands(x, residual, gate, gate1, weight, bias, scale, scale1, shift, shift1, index)
    h, y = run("layer", operands, eps, scale_constant, h_dtype or residual.dtype, out_dtype or x.dtype)
    assert h is not None and y is not None
    return h, y


def reference(
    operands: Operands,
    eps: float,
    scale_constant: float = 1.0,
    h_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    assert operands.residual is not None
    h, y = norm_reference("layer", operands, eps, scale_constant)
    return h.to(h_dtype or operands.residual.dtype), y.to(out_dtype or operands.x.dtype)


supports = functools.partial(norm_supports, "layer")  # (Operands) -> why the kernel does not take them, or None

OP = residual_gate_layer_norm_modulate
