"""Where the pieces of a tensor lie, and how views move them (DESIGN section 4). Integers only, no tensor.

A dimension is a product of factors, outermost first, each whole on every rank or split over one axis of the mesh. So
`[b, c, t, h, w]` with `h` split, flattened to tokens `[b, t * h * w, c]`, has the token dimension (t, h * w split), and
a later reshape takes it apart again: nothing moves. Positions are global; pieces may be uneven or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import gcd, prod

Interval = tuple[int, int]
Bounds = tuple[int, ...]


def even(size: int, world: int, multiple: int = 1) -> Bounds:
    """Pieces as equal as they can be, the larger ones first; inner bounds are multiples of `multiple`."""
    each, more = divmod(-(-size // multiple), world)
    return tuple(min(size, multiple * (each * r + min(r, more))) for r in range(world + 1))


def clip(interval: Interval, size: int) -> tuple[Interval, tuple[int, int]]:
    """What of `interval` lies in `[0, size)`, and how many rows have to be filled in front of it and behind it."""
    lo, hi = interval
    inside = min(max(lo, 0), size), max(min(hi, size), 0)
    if inside[0] >= inside[1]:  # all of it is fill
        return (inside[0], inside[0]), (hi - lo, 0)
    return inside, (inside[0] - lo, hi - inside[1])


def rounded(bounds: Bounds, multiple: int) -> Bounds:
    """`bounds` with the inner ones moved to the nearest multiples of `multiple`."""
    nearest = ((b + multiple // 2) // multiple * multiple for b in bounds[1:-1])
    return (0, *(min(b, bounds[-1]) for b in nearest), bounds[-1])


class Misfit(Exception):
    """A view that cuts a split factor where no bound is. `axis`: the factor's; `multiple`: what its bounds and context would
    have to be multiples of, None where none would do."""

    def __init__(self, reason: str, axis: int, multiple: int | None) -> None:
        super().__init__(reason)
        self.axis, self.multiple = axis, multiple


@dataclass(frozen=True)
class Factor:
    """`size` positions of a dimension: on every rank, or split over mesh axis `axis`.

    Rank r of the axis owns `[bounds[r], bounds[r + 1])` and holds that and `context[r]` = (front, back) rows around it
    (patch form; no context where every rank holds what it owns).

    With `parts` it is a concatenation of segments, each cut by itself at the bounds that are there (text and image tokens
    of one sequence). Rank r holds its piece of every segment, in order, and `bounds` count positions in the order in which
    they are held: those of rank 0, then those of rank 1, ...
    """

    size: int
    axis: int | None = None
    bounds: Bounds = ()
    context: tuple[tuple[int, int], ...] = ()
    parts: tuple[Bounds, ...] = ()

    @property
    def spans(self) -> tuple[Interval, ...]:
        """What each rank of the axis holds."""
        own = list(pairwise(self.bounds))
        around = self.context or ((0, 0),) * len(own)
        return tuple((lo - front, hi + back) for (lo, hi), (front, back) in zip(own, around, strict=True))

    def pieces(self, rank: int) -> list[Interval]:
        """The stretches of the dimension that a rank of the axis holds, in the order in which it does."""
        if not self.parts:
            return [self.spans[rank]]
        starts = accumulate((part[-1] for part in self.parts), initial=0)
        return [(at + part[rank], at + part[rank + 1]) for at, part in zip(starts, self.parts, strict=False)]

    @property
    def in_order(self) -> list[Interval]:
        """Where the dimension's stretches are held, one after the other, if what all ranks hold is laid end to end."""
        found, taken = [], list(self.bounds)
        for part in self.parts or (self.bounds,):
            for rank, (lo, hi) in enumerate(pairwise(part)):
                found.append((taken[rank], taken[rank] + hi - lo))
                taken[rank] += hi - lo
        return found

    def times(self, k: int) -> Factor:
        """This factor with every position standing for `k`."""
        return Factor(
            self.size * k,
            self.axis,
            tuple(b * k for b in self.bounds),
            tuple((front * k, back * k) for front, back in self.context),
            tuple(tuple(b * k for b in part) for part in self.parts),
        )

    def over(self, k: int) -> Factor | None:
        """The factor of which this is `k` times, or None if bounds fall between."""
        numbers = (self.size, *self.bounds, *(n for group in (*self.context, *self.parts) for n in group))
        if any(n % k for n in numbers):
            return None
        context = tuple((front // k, back // k) for front, back in self.context)
        parts = tuple(tuple(b // k for b in part) for part in self.parts)
        return Factor(self.size // k, self.axis, tuple(b // k for b in self.bounds), context, parts)

    def held(self, coordinates: Sequence[int]) -> int:
        """How many positions the rank at these mesh coordinates holds."""
        if self.axis is None:
            return self.size
        lo, hi = self.spans[coordinates[self.axis]]
        return hi - lo


def concatenated(factors: Sequence[Factor]) -> Factor:
    """The concatenation of dimensions that are split over one axis, of which every rank holds its pieces: nothing moves."""
    parts = tuple(part for f in factors for part in f.parts or (f.bounds,))
    bounds = tuple(map(sum, zip(*parts, strict=True)))
    return Factor(bounds[-1], factors[0].axis, bounds, parts=parts if len(parts) > 1 else ())


def spanning(size: int, axis: int, bounds: Bounds, spans: Sequence[Interval]) -> Factor:
    """The factor of which rank r owns its part of `bounds` and holds `spans[r]`."""
    context = tuple((lo - a, b - hi) for (lo, hi), (a, b) in zip(pairwise(bounds), spans, strict=True))
    if any(front < 0 or back < 0 for front, back in context):
        raise ValueError(f"{spans} do not cover {bounds}")
    return Factor(size, axis, bounds, context if any(map(any, context)) else ())


Dim = tuple[Factor, ...]


def canonical(factors: Iterable[Factor]) -> Dim:
    """The one spelling of a dimension: neighbouring whole factors are one, a split factor takes the whole ones behind it."""
    dim: list[Factor] = []
    for f in factors:
        if f.axis is None and f.size == 1:
            continue
        if f.axis is None and dim:
            dim[-1] = dim[-1].times(f.size)
        else:
            dim.append(f)
    return tuple(dim) or (Factor(1),)


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies: its dimensions."""

    dims: tuple[Dim, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Placement:
        return cls(tuple((Factor(n),) for n in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return tuple(prod(f.size for f in dim) for dim in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def is_whole(self) -> bool:
        return all(f.axis is None for dim in self.dims for f in dim)

    @property
    def axes(self) -> frozenset[int]:
        """The mesh axes that split it."""
        return frozenset(f.axis for dim in self.dims for f in dim if f.axis is not None)

    def local(self, coordinates: Sequence[int]) -> tuple[int, ...]:
        """The shape that the rank at these mesh coordinates holds."""
        return tuple(prod(f.held(coordinates) for f in dim) for dim in self.dims)

    def splits(self, dim: int) -> bool:
        return any(f.axis is not None for f in self.dims[dim])

    def one(self, dim: int) -> Factor | None:
        """The split factor that is the whole of dimension `dim`, in one segment; None where it is not split so simply."""
        factor = self.segments(dim)
        return factor if factor is not None and not factor.parts else None

    def segments(self, dim: int) -> Factor | None:
        """The split factor that is the whole of dimension `dim`, of one segment or more."""
        factors = self.dims[dim]
        return factors[0] if len(factors) == 1 and factors[0].axis is not None else None

    def with_dim(self, dim: int, factors: Iterable[Factor]) -> Placement:
        dims = list(self.dims)
        dims[dim] = canonical(factors)
        return replace(self, dims=tuple(dims))

    def permuted(self, order: Sequence[int]) -> Placement:
        return Placement(tuple(self.dims[o] for o in order))

    def reshaped(self, shape: Sequence[int]) -> Placement:
        """After reshape, view, flatten or unflatten to the global `shape` (without -1). Raises Misfit."""
        if prod(shape) != prod(self.shape):
            raise ValueError(f"{self.shape} does not reshape to {tuple(shape)}")
        rest = list(canonical(f for dim in self.dims for f in dim))[::-1]
        what = f"a reshape of {self.shape} to {tuple(shape)}"
        dims: list[Dim] = []
        for n in shape:
            taken: list[Factor] = []
            while n > 1:
                f = rest.pop()
                if n % f.size == 0:  # all of it is of this dimension
                    taken.append(f)
                    n //= f.size
                    continue
                inner, more = divmod(f.size, n)  # else the outer part is
                part = None if more else f.over(inner)
                if part is None and more:
                    axis = next(g.axis for g in (f, *reversed(rest)) if g.axis is not None)
                    raise Misfit(f"{what} cuts a split dimension", axis, None)
                if part is None:
                    behind = f.size // next(g.size for dim in self.dims for g in dim if g.axis == f.axis)
                    assert f.axis is not None
                    raise Misfit(f"{what} cuts a split dimension", f.axis, inner // gcd(inner, behind))
                taken.append(part)
                rest.append(Factor(inner))
                n = 1
            dims.append(canonical(taken))
        for f in rest:
            if f.axis is not None:
                raise Misfit(f"{what} drops a split dimension of one row", f.axis, None)
        return Placement(tuple(dims))
