"""What an operation does to one dimension of a tensor that is split over ranks. Runs no tensor.

All positions are global: an interval is `(lo, hi)`, half open, and may reach below 0 or beyond the size where an op pads.
Given the bounds of the input, `follow` chooses those of the output and `locals_of` says what each rank does for its piece:
take the rows `need`, call the op with `padding`, drop `crop`:

    conv = Window(kernel=3, stride=2, padding=(1, 1))
    have = even(17, 3)                      # (0, 6, 12, 17)
    want = follow(conv, have)               # (0, 3, 6, 9)
    locals_of(conv, have[-1], want)[1]      # Local(need=(5, 12), padding=(0, 0), crop=(0, 0), taps=())

A map knows one dimension; an op over several is one map for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pvae.passes.placement import Bounds, Interval, clip, even

Rows = list[NDArray[Any]]


@dataclass(frozen=True)
class Tap:
    """One term of a weighted gather: row j of the result adds `weight[j] * x[index[j]]`, indices local to `need`."""

    index: tuple[int, ...]
    weight: tuple[float, ...]


@dataclass(frozen=True)
class Local:
    """How one rank computes its rows of the output.

    `need`: the input rows, those outside the tensor being fill. `padding`: the op's (front, back) padding that remains
    once they are in hand. `crop`: rows of the result to drop in front and behind. With `taps`, the sum of these
    gathers stands in for the op.
    """

    need: Interval
    padding: tuple[int, int] = (0, 0)
    crop: tuple[int, int] = (0, 0)
    taps: tuple[Tap, ...] = ()


class IndexMap(Protocol):
    def size(self, n: int) -> int:
        """Global size of the output of an input of `n` rows."""

    def home(self, j: int, n: int) -> int:
        """The input row at the centre of what output row `j` reads; never falls as `j` rises; may lie outside."""

    def local(self, lo: int, hi: int, n: int) -> Local:
        """How the output rows `[lo, hi)`, at least one, are computed."""


def follow(op: IndexMap, bounds: Bounds) -> Bounds:
    """Output bounds such that an output row stays with its `home`. An op that keeps the size keeps the bounds, so that
    the two arms of a residual meet, whatever lies between them (a causal convolution is off centre)."""
    n, m = bounds[-1], op.size(bounds[-1])
    if m == n:
        return bounds
    homes = range(m)
    inner = (bisect_left(homes, b, key=lambda j: min(max(op.home(j, n), 0), n - 1)) for b in bounds[1:-1])
    return (0, *inner, m)


def locals_of(op: IndexMap, n: int, bounds: Bounds) -> tuple[Local, ...]:
    """What each rank does to hold its piece of the output `bounds`, the input having `n` rows.

    A rank with an empty piece computes one row and drops it: most ops refuse an input of no rows.
    """
    m = op.size(n)
    if bounds[-1] != m:
        raise ValueError(f"the output has {m} rows, its bounds end at {bounds[-1]}")
    if m == 0:
        return (Local((0, 0)),) * (len(bounds) - 1)

    def piece(lo: int, hi: int) -> Local:
        if lo < hi:
            return op.local(lo, hi, n)
        one = op.local(min(lo, m - 1), min(lo, m - 1) + 1, n)
        return Local(one.need, one.padding, (one.crop[0], one.crop[1] + 1), one.taps)

    return tuple(piece(lo, hi) for lo, hi in pairwise(bounds))


@dataclass(frozen=True)
class Window:
    """Output row j reads `j * stride - front + t * dilation`, t < kernel: convolution, and see `pad` and `slicing`.

    The padding becomes fill: the local op pads nothing. Averages that count the padding may use it as well.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def size(self, n: int) -> int:
        return (n + sum(self.padding) - self.span) // self.stride + 1

    def home(self, j: int, n: int) -> int:
        return j * self.stride - self.padding[0] + (self.span - 1) // 2

    def local(self, lo: int, hi: int, n: int) -> Local:
        first = lo * self.stride - self.padding[0]
        return Local((first, first + (hi - lo - 1) * self.stride + self.span))


def pad(front: int, back: int) -> Window:
    """Padding, cutting where negative. The local op is nothing at all: `need`, filled as the mode says, is the result.
    A constant other than zero is no fill: take `clip(need)` and pad locally by the two counts that it gives."""
    return Window(1, padding=(front, back))


def slicing(n: int, start: int, stop: int, step: int = 1) -> Window:
    """`x[start:stop:step]` of `n` rows, `0 <= start <= stop <= n`. The local op is `x[::step]`."""
    return Window(1, stride=step, padding=(-start, stop - n))


@dataclass(frozen=True)
class Pool(Window):
    """Pooling whose padding is not zeros: max (minus infinity) and averages that do not count it.

    The local op keeps its own padding and `ceil_mode`. `need` stays inside the tensor and begins at a multiple of the
    stride, so windows fall where they fall globally; what the padding touches at an inner border is cropped.
    """

    ceil_mode: bool = False

    def size(self, n: int) -> int:
        # ATen/native/Pool.h, pooling_output_shape: rounding up adds no window that starts in the padding at the end.
        up = self.stride - 1 if self.ceil_mode else 0
        m = (n + sum(self.padding) - self.span + up) // self.stride + 1
        return m - 1 if self.ceil_mode and (m - 1) * self.stride >= n + self.padding[0] else m

    def local(self, lo: int, hi: int, n: int) -> Local:
        first, last = super().local(lo, hi, n).need
        start, stop = max(first, 0) // self.stride, min(last, n)
        while stop - start * self.stride < min(self.span, n):  # torch pools no input smaller than the kernel
            start, stop = (start - 1, stop) if start else (start, stop + 1)
        need = start * self.stride, stop
        front = lo - start
        return Local(need, self.padding, (front, self.size(need[1] - need[0]) - front - (hi - lo)))


@dataclass(frozen=True)
class Transposed:
    """Transposed convolution: input row i adds to the output rows `i * stride - padding + t * dilation`, t < kernel.

    Outside is zeros. The local op has neither `padding` nor `output_padding`: the crop does both.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    output_padding: int = 0

    @property
    def span(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def size(self, n: int) -> int:
        return (n - 1) * self.stride - 2 * self.padding + self.span + self.output_padding

    def home(self, j: int, n: int) -> int:
        return ceil(Fraction(2 * (j + self.padding) - (self.span - 1) - self.stride, 2 * self.stride))

    def local(self, lo: int, hi: int, n: int) -> Local:
        s, lo, hi = self.stride, lo + self.padding, hi + self.padding  # rows of the output before its padding is cut
        # The inputs that add to [lo, hi); where the stride leaves gaps, also those that make the local result reach it.
        first = min(-(-(lo - self.span + 1) // s), lo // s)
        last = max((hi - 1) // s, -(-(hi - self.span) // s))
        return Local((first, last + 1), crop=(lo - first * s, last * s + self.span - hi))


@dataclass(frozen=True)
class Flip:
    """The rows in reverse. Bounds rise with the rank, so a flip has to move data: each rank flips the mirrored piece."""

    def size(self, n: int) -> int:
        return n

    def home(self, j: int, n: int) -> int:
        return j

    def local(self, lo: int, hi: int, n: int) -> Local:
        return Local((n - hi, n - lo))


@dataclass(frozen=True)
class Repeat:
    """The rows `times` times over. `repeat_interleave` is `Resample("nearest", times * n)`."""

    times: int

    def size(self, n: int) -> int:
        return n * self.times

    def home(self, j: int, n: int) -> int:
        return j // self.times  # an equal share of the output for an equal share of the input

    def local(self, lo: int, hi: int, n: int) -> Local:
        first, last = (lo % n, (hi - 1) % n + 1) if lo // n == (hi - 1) // n else (0, n)
        return Local((first, last), taps=(Tap(tuple(j % n - first for j in range(lo, hi)), (1.0,) * (hi - lo)),))


@dataclass(frozen=True)
class Resample:
    """Interpolation to `out` rows along one dimension: nearest, or linear (a term of bilinear and trilinear).

    `scale` is the op's scale factor for this dimension where it was given one: coordinates then come from it and not
    from the sizes. There are three local forms.

    - By a whole factor (`align_corners` false): the op itself, with a halo where it is linear.
    - Otherwise a local call would place its rows by its own sizes, so taps, made of global coordinates, stand in for
      it along this dimension. The op may still do the others, with this one kept at its size and without a scale.
    - Where torch's own kernels disagree on a row (by rounding, or on a scale that is not `out / n`), only the op on
      the whole is sure to be right: `need` is everything.

    Without taps the local op has the op's own scale, and the size of the piece plus the crop.
    """

    mode: Literal["nearest", "nearest-exact", "linear"]
    out: int
    scale: float | None = None
    align_corners: bool = False

    def size(self, n: int) -> int:
        return self.out

    def home(self, j: int, n: int) -> int:
        return ceil(self.sources(np.array([j]), n)[0][0] - 0.5)

    def sources(self, j: NDArray[np.int64], n: int) -> Rows:
        """The input positions of the output rows j, in each way that a kernel of torch computes them.

        ATen/native/UpSample.h (area_pixel_compute_source_index, nearest_idx) and UpSampleKernel.cpp: which one is used
        depends on device and memory format. Some take `out` equal to n, or twice n, for the factor whatever the scale.
        """
        by_size: Rows = [j * n // self.out] if self.out in (n, 2 * n) else []
        if self.mode == "linear" and self.align_corners:
            return [(j * ((n - 1) / max(self.out - 1, 1))).clip(0, n - 1)]
        ratio = 1 / self.scale if self.scale else n / self.out
        if self.mode == "linear":
            return [((j + 0.5) * ratio - 0.5).clip(0, n - 1), *(by_size if self.out == n else ())]
        shifted = j + (0.5 if self.mode == "nearest-exact" else 0.0)
        products = (
            shifted.astype(np.float32) * np.float32(ratio),
            (shifted * ratio).astype(np.float32),
            shifted * ratio,
        )
        return [np.minimum(np.floor(p), n - 1) for p in products] + by_size

    def local(self, lo: int, hi: int, n: int) -> Local:
        j = np.arange(self.out)
        every, *others = self.sources(j, n)
        if not all(np.array_equal(every, other) for other in others):
            return Local((0, n), crop=(lo, self.out - hi))
        at = every[lo:hi]
        below, above = np.floor(at).astype(int), np.ceil(at).astype(int)
        first, last = int(below[0]), int(above[-1]) + 1
        factor = self.out // n
        if self.mode == "linear":
            whole = self.out == factor * n and self.scale in (None, factor) and not self.align_corners
        else:
            whole = self.out == factor * n and np.array_equal(every, j // factor)
        if whole:
            return Local((first, last), crop=(lo - first * factor, last * factor - hi))
        lower = Tap(tuple((below - first).tolist()), tuple((1 - (at - below)).tolist()))
        upper = Tap(tuple((above - first).tolist()), tuple((at - below).tolist()))
        return Local((first, last), taps=(lower, upper) if self.mode == "linear" else (lower,))


def cat_bounds(operands: Sequence[Bounds]) -> Bounds:
    """Bounds of a concatenation along the split dimension: the largest operand stays where it is and the outermost
    ranks take the others, if these are no more than a mean piece of it; otherwise even ones."""
    sizes = [b[-1] for b in operands]
    at = max(range(len(sizes)), key=sizes.__getitem__)
    total, world = sum(sizes), len(operands[at]) - 1
    if (total - sizes[at]) * world > sizes[at]:
        return even(total, world)
    return (0, *(sum(sizes[:at]) + b for b in operands[at][1:-1]), total)


def cat_needs(sizes: Sequence[int], lo: int, hi: int) -> tuple[Interval, ...]:
    """What of each operand, of these sizes, makes the rows `[lo, hi)` of their concatenation; empty ones are `(p, p)`."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(clip((lo - s, hi - s), n)[0] for s, n in zip(starts, sizes, strict=True))
