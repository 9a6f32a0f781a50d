"""Convolutions for the tests of `pvae::conv_taps`, on any device: a case is a description, `make` draws its operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from pvae.kernels import conv_taps
from pvae.kernels.channels_last import FORMATS
from pvae.testing import Agreement, agreement

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# How x lies in memory; the last two are for frames before it: both in one buffer, in this order.
LAYOUTS = ("dense", "contiguous", "gaps", "unaligned", "before_first", "x_first")


@dataclass(frozen=True)
class Operands:
    """The op's arguments but for `config`, and what they are in another dtype."""

    x: Tensor
    before: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    rest: tuple[Any, ...]

    def args(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        five = (self.x, self.before, self.weight, self.bias, self.residual)
        return (*(t if t is None or dtype is None else t.to(dtype) for t in five), *self.rest)

    def run(self, config: Sequence[int] = ()) -> Tensor:
        return conv_taps.conv_taps(*self.args(), list(config))

    def reference(self, dtype: torch.dtype) -> Tensor:
        return conv_taps.reference(*self.args(dtype))

    def agrees(self, y: Tensor, eager: torch.dtype = torch.float32) -> Agreement:
        """`y` against float64, beside torch's ops in `eager` with one rounding to the dtype of `y`."""
        return agreement(y, self.reference(eager).to(y.dtype), self.reference(torch.float64))


@dataclass(frozen=True)
class Case:
    """x `[N, C, (T,) H, W]`; `kernel` is that of the enlarged picture's phases, 2x2, with `upsample`."""

    x: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    before: int | None = None
    upsample: bool = False
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    layout: str = "dense"
    dtype: torch.dtype = torch.float32

    @property
    def rest(self) -> tuple[Any, ...]:
        ones = [1] * len(self.kernel)
        same = [k // 2 for k in self.kernel for _ in range(2)]
        padding = list(self.padding) or ([*same[:-4], 1, 1, 1, 1] if self.upsample else same)
        return (list(self.stride) or ones, padding, list(self.dilation) or ones, self.upsample, self.activation)

    def out_shape(self) -> list[int]:
        x, weight = torch.empty(self.x, device="meta"), torch.empty(self.weight_shape, device="meta")
        before = None if self.before is None else x.new_empty(self.before_shape)
        return conv_taps.out_shape(x, before, weight, *self.rest[:4])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out * (4 if self.upsample else 1), self.x[1], *self.kernel)

    @property
    def before_shape(self) -> tuple[int, ...]:
        return (*self.x[:2], self.before or 0, *self.x[3:])

    def make(self, device: str = "cpu", seed: int = 0) -> Operands:
        """Normal numbers, the weight scaled so that results are too. What lies around x in memory is NaN."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        def put(t: Tensor) -> Tensor:
            return t.to(self.dtype).to(device, memory_format=FORMATS[t.dim()] if t.dim() > 1 else torch.preserve_format)

        weight = put(draw(*self.weight_shape) / prod(self.weight_shape[1:]) ** 0.5)
        bias = put(draw(self.out)) if self.bias else None
        residual = put(draw(*self.out_shape())) if self.residual else None
        x, before = put(draw(*self.x)), None if self.before is None else put(draw(*self.before_shape))
        if before is not None and self.layout in ("before_first", "x_first"):
            x, before = _in_one_buffer(x, before, self.layout == "before_first")
        else:
            x = _laid(x, self.layout)
        return Operands(x, before, weight, bias, residual, self.rest)


def _nans(like: Tensor, *shape: int) -> Tensor:
    empty = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=FORMATS[len(shape)])
    return empty.fill_(float("nan"))


def _laid(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return x.contiguous()
    if layout == "gaps":  # 16 bytes of channels more, a row and two columns more
        n, c, *sizes = x.shape
        around = [*sizes[:-2], sizes[-2] + 1, sizes[-1] + 2]
        view = _nans(x, n, c + 8, *around)[:, :c, ..., : sizes[-2], : sizes[-1]]
        return view.copy_(x)
    if layout == "unaligned":
        return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
    return x


def _in_one_buffer(x: Tensor, before: Tensor, before_first: bool) -> tuple[Tensor, Tensor]:
    """Both as slices in time of one tensor, a frame of NaN between them."""
    n, c, t, h, w = x.shape
    frames = before.shape[2]
    whole = _nans(x, n, c, t + frames + 1, h, w)
    start, other = (frames + 1, 0) if before_first else (0, t + 1)
    return whole[:, :, start : start + t].copy_(x), whole[:, :, other : other + frames].copy_(before)


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = FLOATS, upsample: bool | None = None) -> Case:
    """Any convolution that has an output; small pictures."""
    spatial = draw(st.sampled_from((2, 3)))
    enlarge = draw(st.booleans()) if upsample is None else upsample
    sizes = [draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 19))][-spatial:]
    kernel = [draw(st.sampled_from((1, 3, 3, 5))) for _ in range(spatial)]
    stride, dilation = ([draw(st.sampled_from((1, 1, 2))) for _ in range(spatial)] for _ in range(2))
    padding = [draw(st.integers(0, 3)) for _ in range(2 * spatial)]
    before = draw(st.none() | st.integers(0, 3)) if spatial == 3 else None
    if enlarge:
        kernel[-2:], stride[-2:], dilation[-2:], padding[-4:] = [2, 2], [1, 1], [1, 1], [1] * 4
    ends = [sizes[0] + (before or 0), *sizes[1:]]
    for i in range(spatial - 2 if enlarge else spatial):
        assume(ends[i] + padding[2 * i] + padding[2 * i + 1] > dilation[i] * (kernel[i] - 1))
    channels = draw(st.integers(1, 70) | st.sampled_from((8, 16, 32, 40, 64)))
    return Case(
        (draw(st.sampled_from((1, 1, 1, 2))), channels, *sizes),
        draw(st.integers(1, 40) | st.sampled_from((8, 32))),
        tuple(kernel),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        before,
        enlarge,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(conv_taps.ACTIVATIONS)),
        draw(st.sampled_from(LAYOUTS if before is not None else LAYOUTS[:4])),
        draw(st.sampled_from(list(dtypes))),
    )
