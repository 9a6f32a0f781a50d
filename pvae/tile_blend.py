"""The cross-fades between tiles, `blend_v`, `blend_h` and `blend_t`, without diffusers' Python loop over rows.

    b[k] = a[extent_a - extent + k] * (1 - k / extent) + b[k] * (k / extent)      for k < extent, in place

A model's own method is replaced only where it was first seen to give these very numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DIMS = {"blend_v": -2, "blend_h": -1, "blend_t": -3}
_EXTENTS = (0, 2, 9)  # nothing, a part, more than there is


def blend(a: torch.Tensor, b: torch.Tensor, blend_extent: int, dim: int) -> torch.Tensor:
    """Fade the end of `a` into the start of `b` along `dim` (negative), over at most `blend_extent` rows.

    Writes into `b` and returns it.
    Rounds as the loop does: a row times a Python number is computed in float32 for half dtypes, then rounded.
    """
    extent = min(a.shape[dim], b.shape[dim], blend_extent)
    if extent <= 0:
        return b
    wide = torch.promote_types(b.dtype, torch.float32)
    ramp = torch.arange(extent, dtype=torch.float64, device=b.device) / extent
    ramp = ramp.reshape(-1, *[1] * (-dim - 1))
    end, start = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    faded = (end * (1 - ramp).to(wide)).to(b.dtype) + (start * ramp.to(wide)).to(b.dtype)
    start.copy_(faded)
    return b


class VectorBlend:
    """Stands as a model's blend method; goes to the model's own for tensors on which the two were not compared."""

    def __init__(self, own: Callable[..., Any], dim: int, ranks: frozenset[int]) -> None:
        self.own = own
        self.dim = dim
        self.ranks = ranks

    def __call__(self, a: torch.Tensor, b: torch.Tensor, blend_extent: int) -> torch.Tensor:
        alike = a.dtype == b.dtype and a.dtype.is_floating_point and a.dim() == b.dim()
        if not alike or b.dim() not in self.ranks:
            return self.own(a, b, blend_extent)
        return blend(a, b, blend_extent, self.dim)


def ranks_alike(own: Callable[..., Any], dim: int) -> frozenset[int]:
    """Numbers of dimensions, of 4 and 5, for which `own(a, b, extent)` gives, and writes, the very numbers of `blend`."""
    return frozenset(rank for rank in (4, 5) if all(_alike(own, dim, rank, extent) for extent in _EXTENTS))


def _alike(own: Callable[..., Any], dim: int, rank: int, extent: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = [2, 3, 5, 4, 3][:rank]
    longer = [*shape]
    longer[dim] += 2
    a, b = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (longer, shape))
    theirs, ours = (a.clone(), b.clone()), (a.clone(), b.clone())
    try:
        faded = own(*theirs, extent)
    except (IndexError, ValueError, RuntimeError):  # it is made for another number of dimensions
        return False
    blend(*ours, extent, dim)
    return faded is theirs[1] and all(map(torch.equal, theirs, ours))


def vectorise_blends(model: nn.Module) -> dict[str, str]:
    """Replace the blend methods of this instance. Returns what was left alone, by name, with the reason."""
    kept: dict[str, str] = {}
    for name, dim in DIMS.items():
        own = getattr(model, name, None)
        if own is None:
            continue
        ranks = ranks_alike(own, dim)
        if ranks:
            setattr(model, name, VectorBlend(own, dim, ranks))
        else:
            kept[name] = "is no linear cross-fade in place, so the model's own method stays"
    return kept


def restore_blends(model: nn.Module) -> None:
    """Undo `vectorise_blends`."""
    for name in DIMS:
        if isinstance(model.__dict__.get(name), VectorBlend):
            delattr(model, name)
