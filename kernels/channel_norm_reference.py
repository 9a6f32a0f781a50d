"""The semantics of the channel norms in plain torch: what the kernels compute, the fallback, and the tests' oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pvae.kernels.channel_norm_layout import Border, Operands, enlargement, four, is_vector
from pvae.kernels.channels_last import FORMATS

KINDS = ("rms", "l2", "layer", "group")
ACTIVATIONS = {
    "none": lambda y: y,
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


@dataclass(frozen=True)
class Norm:
    """What is computed besides borders.

    rms     factor * x / sqrt(mean(x * x) + eps)          over the channels of a position
    l2      factor * x / max(sqrt(sum(x * x)), eps)       `normalize`, as Wan's and Qwen's autoencoders have it
    layer   (x - mean) / sqrt(variance + eps)
    group   the same, over the channels of a group and all positions of a sample, or of a frame with `per_frame`
    """

    kind: str
    eps: float
    activation: str = "none"
    factor: float = 1.0
    groups: int = 1
    per_frame: bool = False

    def check(self, operands: Operands, border: Border) -> None:
        """Raises ValueError for what means nothing."""
        if self.kind not in KINDS:
            raise ValueError(f"there is no norm {self.kind!r}; it is one of {', '.join(KINDS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation {self.activation!r}; it is one of {', '.join(ACTIVATIONS)}")
        channels = operands.x.shape[1]
        if self.groups < 1 or channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups")
        if self.per_frame and operands.x.dim() != 5:
            raise ValueError("per_frame is for x [N, C, T, H, W]")
        border.check(four(operands.x.shape, 1)[1:])


def empty_result(x: Tensor, border: Border) -> Tensor:
    """An uninitialised result for x: with borders, channels-last."""
    sizes = [border.out(size, dim + 5 - x.dim()) for dim, size in enumerate(x.shape[2:])]
    shape = (*x.shape[:2], *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=FORMATS[x.dim()])


def reference(norm: Norm, operands: Operands, border: Border) -> Tensor:
    """y in fp32 from x to the one rounding of the result (in float64 as soon as one operand is), channels-last."""
    y = exact(norm, operands, border)
    result = empty_result(operands.x, border)
    return result.copy_(y)


def exact(norm: Norm, operands: Operands, border: Border, dtype: torch.dtype | None = None) -> Tensor:
    """y, not yet rounded, computed in `dtype`."""
    wide = any(t is not None and t.dtype == torch.float64 for t in operands)
    dtype = dtype or (torch.float64 if wide else torch.float32)
    x, weight, bias, scale, shift = (None if t is None else t.to(dtype) for t in operands)
    assert x is not None
    if weight is not None:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    if bias is not None:
        bias = bias.reshape(-1, *[1] * (x.dim() - 2))
    y = _normalised(norm, x)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * _as_large(scale, x)
    y = y if shift is None else y + _as_large(shift, x)
    return _bordered(ACTIVATIONS[norm.activation](y), border)


def _as_large(operand: Tensor, x: Tensor) -> Tensor:
    """A scale or shift with the rows and columns of x."""
    factors = enlargement(operand, x)
    if factors is None or is_vector(operand, x):
        return operand
    return operand.repeat_interleave(factors[0], -2).repeat_interleave(factors[1], -1)


def _normalised(norm: Norm, x: Tensor) -> Tensor:
    if norm.kind == "l2":
        return x / torch.linalg.vector_norm(x, 2, 1, keepdim=True).clamp_min(norm.eps) * norm.factor
    if norm.kind == "group":
        if norm.per_frame:
            frames = x.transpose(1, 2)
            y = functional.group_norm(frames.flatten(0, 1), norm.groups, eps=norm.eps)
            return y.unflatten(0, frames.shape[:2]).transpose(1, 2)
        return functional.group_norm(x, norm.groups, eps=norm.eps)
    for _ in range(2 if norm.kind == "layer" else 0):  # the second time takes the mean's own rounding out again
        x = x - x.mean(1, keepdim=True)
    return x / torch.sqrt(x.square().mean(1, keepdim=True) + norm.eps) * norm.factor


def _bordered(y: Tensor, border: Border) -> Tensor:
    for dim in range(5 - y.dim(), 3):
        front, back = border.widths[2 * dim : 2 * dim + 2]
        if front or back:
            axis = dim + y.dim() - 3
            index = torch.arange(-front, y.shape[axis] + back, device=y.device)
            y = _picked(y, axis, index, border.modes[dim])
    return y


def _picked(y: Tensor, axis: int, index: Tensor, mode: str) -> Tensor:
    """The slices of y that `index`, counted from the first one, shows."""
    size = y.shape[axis]
    if mode == "constant":
        outside = (index < 0) | (index >= size)
        shape = [-1 if dim == axis else 1 for dim in range(y.dim())]
        if size == 0:
            return y.new_zeros([*y.shape[:axis], len(index), *y.shape[axis + 1 :]])
        return y.index_select(axis, index.clamp(0, size - 1)).masked_fill(outside.reshape(shape), 0.0)
    if mode == "reflect":
        index = index.abs()
        index = torch.where(index >= size, 2 * (size - 1) - index, index)
    return y.index_select(axis, index.clamp(0, size - 1))
