"""Where the pieces of a tensor lie, one mesh axis at a time, and how views move a split (DESIGN section 4).

Bounds are global indices: rank r holds `[bounds[r], bounds[r + 1])`, pieces may be uneven or empty. What an operation does
to one dimension is in `index_map.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

Interval = tuple[int, int]
Bounds = tuple[int, ...]


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole."""


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the ranks hold."""


@dataclass(frozen=True)
class Owned:
    """Only `rank` holds it."""

    rank: int


@dataclass(frozen=True)
class Split:
    """Rank r holds `[bounds[r], bounds[r + 1])` of dimension `dim` (counted from the front). Pieces may be empty."""

    dim: int
    bounds: Bounds

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"dim must be counted from the front, got {self.dim}")
        if len(self.bounds) < 2 or self.bounds[0] != 0 or list(self.bounds) != sorted(self.bounds):
            raise ValueError(f"bounds must rise from 0 to the size of the dimension, got {self.bounds}")

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @property
    def world(self) -> int:
        return len(self.bounds) - 1

    def interval(self, rank: int) -> Interval:
        return self.bounds[rank], self.bounds[rank + 1]


Placement = Replicated | Split | Partial | Owned


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


# --- views: the new split, or why the tensor has to be gathered -------------------------------------------------------


def reshape_route(in_shape: Sequence[int], out_shape: Sequence[int], dim: int) -> tuple[int, Fraction] | str:
    """The dimension that holds `dim` after a reshape, and what its bounds are multiplied by.

    The products must be whole: bounds have to be multiples of the factor's denominator (`even(..., multiple=)`).
    Shapes are global, without -1.
    """
    if prod(in_shape) != prod(out_shape):
        raise ValueError(f"{tuple(in_shape)} does not reshape to {tuple(out_shape)}")
    if not prod(in_shape):
        return "the tensor is empty"
    # Walk both shapes to the least run of dimensions with one product on either side that contains `dim`.
    i = j = 0
    while True:
        start, to, left, right = i, j, in_shape[i], out_shape[j] if j < len(out_shape) else 0
        if not right:
            return f"dimension {dim} of size 1 is dropped"
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * in_shape[i], i + 1
            else:
                right, j = right * out_shape[j], j + 1
        if dim < i:
            break
    if any(size > 1 for size in in_shape[start:dim]):
        return f"dimension {dim} is merged inside {list(in_shape[start:dim])}, so a piece is not one run of rows"
    target = next((k for k in range(to, j) if out_shape[k] > 1), to)
    # A row of `dim` is so many elements of the run, a row of `target` so many.
    return target, Fraction(prod(in_shape[dim + 1 : i]), prod(out_shape[target + 1 : j]))


def reshape_dims(in_shape: Sequence[int], out_shape: Sequence[int], split: Split) -> Split | str:
    """The split after reshape, view, flatten or unflatten; or the reason why the tensor has to be gathered."""
    if in_shape[split.dim] != split.size:
        raise ValueError(f"dimension {split.dim} of {tuple(in_shape)} is not of size {split.size}")
    route = reshape_route(in_shape, out_shape, split.dim)
    if isinstance(route, str):
        return route
    dim, factor = route
    bounds = [b * factor for b in split.bounds]
    if any(b.denominator > 1 for b in bounds):
        return f"bounds {split.bounds} of dimension {split.dim} are not multiples of {factor.denominator}"
    return Split(dim, tuple(map(int, bounds)))


def permute_dims(order: Sequence[int], split: Split) -> Split:
    """After `permute(order)`."""
    return Split([o % len(order) for o in order].index(split.dim), split.bounds)


def transpose_dims(ndim: int, a: int, b: int, split: Split) -> Split:
    """After `transpose(a, b)` of a tensor of `ndim` dimensions."""
    swap = {a % ndim: b % ndim, b % ndim: a % ndim}
    return Split(swap.get(split.dim, split.dim), split.bounds)


def squeeze_dims(shape: Sequence[int], dims: Sequence[int], split: Split) -> Split | str:
    """After `squeeze(dims)` of a tensor of this global shape; dimensions larger than 1 stay, as in torch."""
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    if split.dim in gone:
        return f"dimension {split.dim} of size 1 is dropped"
    return Split(split.dim - sum(d < split.dim for d in gone), split.bounds)


def unsqueeze_dims(ndim: int, dim: int, split: Split) -> Split:
    """After `unsqueeze(dim)` of a tensor of `ndim` dimensions."""
    return Split(split.dim + (dim % (ndim + 1) <= split.dim), split.bounds)


def expand_dims(in_shape: Sequence[int], out_shape: Sequence[int], split: Split) -> Split | str:
    """After `expand(out_shape)`; -1 keeps a size. New dimensions come first."""
    dim = split.dim + len(out_shape) - len(in_shape)
    if out_shape[dim] not in (-1, split.size):
        return f"dimension {split.dim} of size 1 is expanded to {out_shape[dim]}"
    return Split(dim, split.bounds)
