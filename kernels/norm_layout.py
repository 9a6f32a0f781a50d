"""Where the operands of a norm lie in memory: which rows of x a scale, shift or gate belongs to, as strides.

An op of this family works on x [*leading, C], row by row. A modulation operand (scale, shift, gate) may be
    [C]                  one vector for all rows
    [1|B, C]             one a sample, B = x.shape[0]    (for x of rank 2 this is one a row)
    broadcastable to x   [1|B, 1, C], [1|B, L, C], [B, F, 1, C] against x [B, F, N, C], ...
    [1|B, F, 1, C]       one a frame, against x [B, L, C], L a multiple of F
No operand is ever copied: each is described by two strides, (batch, row), and a kind that says which row counts,

    kind    "batch": none    "row": l    "frame": l // group    "cycle": l % group        of row l of a batch entry

which is what remains of any of the shapes above after dimensions that are adjacent in memory have been merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Size, Tensor


class Operands(NamedTuple):
    """The tensors of a norm op; `*1` is the second of two sets, chosen where `select` [*leading] is not 0."""

    x: Tensor
    residual: Tensor | None = None
    gate: Tensor | None = None
    gate1: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    scale1: Tensor | None = None
    shift: Tensor | None = None
    shift1: Tensor | None = None
    select: Tensor | None = None


MODULATION = ("gate", "gate1", "scale", "scale1", "shift", "shift1")
TWINS = (("gate", "gate1"), ("scale", "scale1"), ("shift", "shift1"))


@dataclass(frozen=True)
class Memory:
    """An operand's kind and its strides, in elements, to the next batch entry and the next row, frame or cycle step."""

    kind: str
    batch: int
    row: int


@dataclass(frozen=True)
class Layout:
    """x as [batches, rows, C], and the operands (by name) on it; `group` rows make a frame."""

    batches: int
    rows: int
    group: int
    operands: dict[str, Memory]


def is_per_frame(shape: Sequence[int], x_shape: Sequence[int]) -> bool:
    return len(x_shape) == 3 and len(shape) == 4


def shape_error(name: str, shape: Sequence[int], x_shape: Sequence[int]) -> str | None:
    """Why a modulation operand of this shape fits no row of x, or None where it does."""
    if is_per_frame(shape, x_shape):
        batch, frames, one, channels = shape
        good = batch in (1, x_shape[0]) and one == 1 and channels == x_shape[2] and frames and x_shape[1] % frames == 0
    elif len(shape) == 2 and len(x_shape) > 2:
        good = shape[0] in (1, x_shape[0]) and shape[1] == x_shape[-1]
    else:
        tail = x_shape[len(x_shape) - len(shape) :]
        good = 0 < len(shape) <= len(x_shape) and shape[-1] == x_shape[-1]
        good = good and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
    if good:
        return None
    return f"{name} {list(shape)} is neither [C], [B, C], [B, F, 1, C] nor broadcastable to x {list(x_shape)}"


def aligned(operand: Tensor, x_shape: Size) -> Tensor:
    """A modulation operand as a tensor that broadcasts against x by torch's own rule."""
    if is_per_frame(operand.shape, x_shape):
        batch, frames, _, channels = operand.shape
        return operand.expand(batch, frames, x_shape[1] // frames, channels).reshape(batch, x_shape[1], channels)
    if operand.dim() == 2 and len(x_shape) > 2:
        return operand.reshape(operand.shape[0], *[1] * (len(x_shape) - 2), operand.shape[1])
    return operand


def check(operands: Operands) -> None:
    """Raises ValueError where the operands' shapes do not go together."""
    x = operands.x
    for name in MODULATION:
        operand = getattr(operands, name)
        if operand is not None and (error := shape_error(name, operand.shape, x.shape)):
            raise ValueError(error)
    if operands.residual is not None and operands.residual.shape != x.shape:
        raise ValueError(f"residual {list(operands.residual.shape)} and x {list(x.shape)} differ in shape")
    for name in ("weight", "bias"):
        vector = getattr(operands, name)
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} {list(vector.shape)} is not [C] of x {list(x.shape)}")
    for first, second in TWINS:
        if getattr(operands, second) is not None and (getattr(operands, first) is None or operands.select is None):
            raise ValueError(f"{second} needs {first} and index beside it")
    select = operands.select
    if select is not None and (
        select.dim() != x.dim() - 1 or any(n not in (1, m) for n, m in zip(select.shape, x.shape[:-1], strict=True))
    ):
        raise ValueError(f"index {list(select.shape)} is not one number a row of x {list(x.shape)}")


def find_layout(operands: Operands) -> Layout | str:
    """The layout of operands that `check` accepts, or why no two strides an operand describe it."""
    shape = operands.x.shape
    dims = list(shape[:-1])
    frames = {
        t.shape[1] for n in MODULATION if (t := getattr(operands, n)) is not None and is_per_frame(t.shape, shape)
    }
    if len(frames) > 1:
        return f"operands are per frame with different numbers of frames: {sorted(frames)}"
    if frames:
        (count,) = frames
        dims = [dims[0], count, dims[1] // count]
    strides: dict[str, list[int]] = {}
    for name in ("x", "residual", *MODULATION, "select"):
        operand = getattr(operands, name)
        if operand is not None:
            sizes, steps = list(operand.shape), list(operand.stride())
            if name != "select":
                if sizes[-1] > 1 and steps[-1] != 1:
                    return f"the last dimension of {name} has stride {steps[-1]}"
                del sizes[-1], steps[-1]
            strides[name] = _leading_strides(sizes, steps, dims, len(shape) - 1)
    dims, strides = _merge(dims, strides)
    if len(dims) > 3:
        return f"the leading dimensions of the operands merge to {len(dims)}, more than 3"
    batches, rows, group = 1, math.prod(dims), 1
    if len(dims) > 1:
        batches, rows = dims[0], math.prod(dims[1:])
    if len(dims) == 3:
        group = dims[2]
    found: dict[str, Memory] = {}
    for name, steps in strides.items():
        batch = steps[0] if len(dims) > 1 else 0
        inner = steps[1:] if len(dims) > 1 else steps
        memory = _memory(batch, inner, group)
        if memory is None:
            return f"the rows of {name} are not evenly spaced (strides {steps} over {dims})"
        found[name] = memory
    return Layout(batches, rows, group, found)


def _leading_strides(sizes: list[int], steps: list[int], dims: list[int], rank: int) -> list[int]:
    """Strides over `dims` of an operand with these leading sizes and strides; 0 where it is broadcast.

    `rank` is the number of leading dimensions of x; `dims` has one more where the second is split into frames.
    """
    if len(sizes) == 1 and rank > 1:  # [1|B, C]
        sizes, steps = sizes + [1] * (rank - 1), steps + [0] * (rank - 1)
    if len(sizes) < rank:
        sizes, steps = [1] * (rank - len(sizes)) + sizes, [0] * (rank - len(steps)) + steps
    steps = [0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]
    if len(dims) > len(steps):  # per row, where another operand is per frame
        steps = [steps[0], steps[1] * dims[2], steps[1]]
    return steps


def _merge(dims: list[int], strides: dict[str, list[int]]) -> tuple[list[int], dict[str, list[int]]]:
    """Drop dimensions of size 1 and merge neighbours wherever every operand allows it."""
    kept: list[int] = []
    merged: dict[str, list[int]] = {name: [] for name in strides}
    for axis, size in enumerate(dims):
        if size == 1:
            continue
        if kept and all(merged[n][-1] == steps[axis] * size for n, steps in strides.items()):
            kept[-1] *= size
            for name, steps in strides.items():
                merged[name][-1] = steps[axis]
            continue
        kept.append(size)
        for name, steps in strides.items():
            merged[name].append(steps[axis])
    return kept, merged


def _memory(batch: int, inner: list[int], group: int) -> Memory | None:
    if not any(inner):
        return Memory("batch", batch, 0)
    if len(inner) == 1:
        return Memory("row", batch, inner[0])
    frame, row = inner
    if frame == row * group:
        return Memory("row", batch, row)
    if row == 0:
        return Memory("frame", batch, frame)
    return Memory("cycle", batch, row) if frame == 0 else None
