"""The semantics of the norm family in plain torch: what the kernel computes, the fallback, and the tests' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.kernels.norm_layout import Operands, aligned

# Largest error against float64, in units of the output's rounding step: |got - want| <= rtol * |want| + atol.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-11, 1e-5),
}


def compute_dtype(operands: Operands) -> torch.dtype:
    """fp32, or float64 as soon as one operand is."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in operands) else torch.float32


def reference(
    norm: str, operands: Operands, eps: float, scale_constant: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(h, y), not yet rounded: computed in `dtype`, by default `compute_dtype`. norm "none": y is h."""
    dtype = dtype or compute_dtype(operands)
    h = operands.x.to(dtype)
    if operands.gate is not None:
        h = h * _modulation(operands.gate, operands.gate1, operands, dtype)
    if operands.residual is not None:
        h = operands.residual.to(dtype) + h
    if norm == "none":
        return h, h
    y = h
    for _ in range(2 if norm == "layer" else 0):  # the second time takes the mean's own rounding out again
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if operands.weight is not None:
        y = y * operands.weight.to(dtype)
    if operands.bias is not None:
        y = y + operands.bias.to(dtype)
    if operands.scale is not None:
        y = y * (scale_constant + _modulation(operands.scale, operands.scale1, operands, dtype))
    if operands.shift is not None:
        y = y + _modulation(operands.shift, operands.shift1, operands, dtype)
    return h, y


def _modulation(first: Tensor, second: Tensor | None, operands: Operands, dtype: torch.dtype) -> Tensor:
    value = aligned(first, operands.x.shape).to(dtype)
    if second is None or operands.select is None:
        return value
    return torch.where(operands.select.unsqueeze(-1) != 0, aligned(second, operands.x.shape).to(dtype), value)
