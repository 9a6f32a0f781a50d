"""Where the operands of a channel norm lie in memory: activations [N, C, *spatial] whose channels are innermost.

A position is a point (n, t, h, w) of the activation; its C channels lie side by side. Sizes and strides are always those
of [N, T, H, W]; a picture has T = 1. Dimensions that nothing has to tell apart are merged, so that what needs no border
and is dense is one line of positions, addressed without a division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pvae.kernels.channels_last import FORMATS

MODES = ("constant", "replicate", "reflect")
Sizes = tuple[int, int, int, int]
NO_PADDING = (0, 0, 0, 0, 0, 0)


class Operands(NamedTuple):
    """The tensors of a channel norm: x [N, C, *spatial], weight and bias [C], scale and shift as `check` takes them."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Border:
    """What is written around the result: (front, back) and a mode for each of T, H and W."""

    widths: tuple[int, ...] = NO_PADDING
    modes: tuple[str, ...] = ("constant",) * 3

    @classmethod
    def of(cls, padding: Sequence[int], mode: str, spatial: int) -> Border:
        """From an op's arguments: widths in order of the spatial dimensions, one mode for all or `mode,mode,mode`.

        Raises ValueError for what is neither.
        """
        modes = mode.split(",")
        if len(modes) == 1:
            modes *= spatial
        if len(modes) != spatial or any(m not in MODES for m in modes):
            raise ValueError(
                f"mode {mode!r} is not one of {', '.join(MODES)}, nor {spatial} of them with commas between"
            )
        if len(padding) not in (0, 2 * spatial) or any(width < 0 for width in padding):
            raise ValueError(
                f"padding {list(padding)} is not (front, back) for each of {spatial} dimensions, 0 or more"
            )
        missing = 3 - spatial
        widths = (0, 0) * missing + (tuple(padding) or (0, 0) * spatial)
        return cls(widths, ("constant",) * missing + tuple(modes))

    def check(self, sizes: Sequence[int]) -> None:
        """ValueError where a picture [T, H, W] is too small to be continued by `modes`."""
        for i, (size, mode) in enumerate(zip(sizes, self.modes, strict=True)):
            widest = max(self.widths[2 * i : 2 * i + 2])
            if widest and ((mode == "reflect" and widest >= size) or (mode == "replicate" and size == 0)):
                raise ValueError(f"padding {list(self.widths)} by {mode} is too wide for [T, H, W] = {list(sizes)}")

    def out(self, size: int, dim: int) -> int:
        """The size of spatial dimension `dim` (0 is T) with its borders."""
        return size + self.widths[2 * dim] + self.widths[2 * dim + 1]

    @property
    def empty(self) -> bool:
        return not any(self.widths)


@dataclass(frozen=True)
class Layout:
    """x, and scale and shift that are no vectors, as [N, T, H, W] of positions; strides in elements, by operand.

    `factors`: how many times scale and shift are enlarged along H and W.
    `flat`: positions of a frame follow each other evenly in every operand (H is 1 and neither H nor W has a border).
    """

    sizes: Sizes
    border: Border
    strides: dict[str, Sizes]
    factors: dict[str, tuple[int, int]]

    @property
    def flat(self) -> bool:
        return self.sizes[2] == 1 and not any(self.border.widths[2:])


def four(values: Sequence[int], missing: int) -> Sizes:
    """[N, C, T, H, W] or [N, C, H, W] -> [N, T, H, W], `missing` where there is no T."""
    n, _, *spatial = values
    return (n, *([missing] * (3 - len(spatial))), *spatial)  # type: ignore[return-value]


def is_vector(operand: Tensor, x: Tensor) -> bool:
    """Whether a scale or shift is [1|N, C, 1, ...], one vector a sample."""
    return tuple(operand.shape[1:]) == (x.shape[1],) + (1,) * (x.dim() - 2) and operand.shape[0] in (1, x.shape[0])


def enlargement(operand: Tensor, x: Tensor) -> tuple[int, int] | None:
    """How many times the rows and columns of a scale or shift make those of x: (1, 1) of one like x; None if of no such."""
    if operand.dim() != x.dim() or operand.shape[:-2] != x.shape[:-2]:
        return None
    factors = [1 if a == b else b // a if a and b % a == 0 else 0 for a, b in zip(operand.shape, x.shape, strict=True)]
    return (factors[-2], factors[-1]) if all(factors) else None


def check(operands: Operands) -> None:
    """Raises ValueError where the operands' shapes do not go together.

    scale and shift are [1|N, C, 1, ...], or like x, or that with rows and columns a whole number of times fewer: row h of
    x has row h // factor of them, as enlarged by nearest neighbours.
    """
    x = operands.x
    if x.dim() not in (4, 5):
        raise ValueError(f"x {list(x.shape)} is neither [N, C, H, W] nor [N, C, T, H, W]")
    for name in ("weight", "bias"):
        vector = getattr(operands, name)
        if vector is not None and tuple(vector.shape) != (x.shape[1],):
            raise ValueError(f"{name} {list(vector.shape)} is not [C] of x {list(x.shape)}")
    for name in ("scale", "shift"):
        operand = getattr(operands, name)
        if operand is not None and not is_vector(operand, x) and enlargement(operand, x) is None:
            raise ValueError(
                f"{name} {list(operand.shape)} is neither [1|N, C, 1, ...] nor like x {list(x.shape)}, nor are its rows "
                f"and columns a whole number of times fewer"
            )


def channels_innermost(tensor: Tensor) -> bool:
    return tensor.shape[1] == 1 or tensor.stride(1) == 1


def innermost(operands: Operands) -> Operands:
    """With channels innermost in scale and shift, copied where they are not: Inductor lays out what it computes as it likes."""
    laid = {
        name: operand.contiguous(memory_format=FORMATS[operand.dim()])
        for name in ("scale", "shift")
        if (operand := getattr(operands, name)) is not None
        and operand.dim() in FORMATS
        and not is_vector(operand, operands.x)
        and not channels_innermost(operand)
    }
    return operands._replace(**laid) if laid else operands


def find_layout(operands: Operands, border: Border, frames_apart: bool, samples_apart: bool) -> Layout | str:
    """The layout of operands that `check` accepts, or why the kernels do not read it.

    frames_apart: frames have statistics of their own; samples_apart: samples have, or a scale or shift of their own.
    """
    x = operands.x
    sizes = list(four(x.shape, 1))
    strides: dict[str, list[int]] = {}
    factors: dict[str, tuple[int, int]] = {}
    for name in ("x", "scale", "shift"):
        operand = getattr(operands, name)
        if operand is None or (name != "x" and is_vector(operand, x)):
            continue
        if not channels_innermost(operand):
            return f"{name} is not channels-last: its channels have stride {operand.stride(1)}"
        shape, steps = four(operand.shape, 1), four(operand.stride(), 0)
        strides[name] = [0 if size == 1 else step for size, step in zip(shape, steps, strict=True)]
        factors[name] = enlargement(operand, x) or (1, 1)
    widths = border.widths
    apart = (samples_apart or frames_apart, frames_apart, False)
    for dim in (2, 1, 0):  # merge dimension `dim` into W
        if any(widths) if dim == 0 else any(widths[2 * dim - 2 :]):
            break
        if apart[dim] and sizes[dim] > 1:
            break
        if sizes[dim] > 1 and any(pair != (1, 1) for pair in factors.values()):
            break
        if sizes[dim] == 1:
            continue
        if sizes[3] > 1 and any(s[dim] != s[3] * sizes[3] for s in strides.values()):
            break
        for s in strides.values():
            s[3] = s[dim] if sizes[3] == 1 else s[3]
            s[dim] = 0
        sizes[3], sizes[dim] = sizes[3] * sizes[dim], 1
    merged = {name: tuple(s) for name, s in strides.items()}
    return Layout(tuple(sizes), border, merged, factors)  # type: ignore[arg-type]
