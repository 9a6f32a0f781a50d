"""`pvae::residual_gate`: a gated residual that no norm follows.

    h = residual + gate * x

in fp32 from the loads to the one rounding of the result. `norm_layout` says which shapes and strides gate may have.
With gate1 and index, a row takes gate1 if its index is not 0.
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


@functional_op(fake=lambda residual, x, out_dtype=None, **_: like_x(x, out_dtype or residual.dtype))
def residual_gate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    out_dtype: torch.dtype | None = None,
    gate1: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """residual and x [*, C], index [*] -> h [*, C], contiguous, of `out_dtype` (default: that of residual)."""
    operands = Operands(x, residual, gate, gate1, select=index)
    h = run("none", operands, 0.0, 1.0, out_dtype or residual.dtype, None)[0]
    assert h is not None
    return h


def reference(operands: Operands, out_dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain torch."""
    assert operands.residual is not None
    return norm_reference("none", operands, 0.0, 1.0)[0].to(out_dtype or operands.residual.dtype)


supports = functools.partial(norm_supports, "none")  # (Operands) -> why the kernel does not take them, or None

OP = residual_gate
