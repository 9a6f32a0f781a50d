"""The ranks as a grid, with process groups of pvae's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from weakref import WeakKeyDictionary

import torch.distributed as dist

__all__ = ["Mesh", "make_mesh"]


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, the last axis fastest. Rank and coordinates are this process's."""

    shape: tuple[int, ...]
    groups: tuple[str | None, ...]  # per axis, the group of the ranks that differ in it only; None where it has one
    rank: int
    coordinates: tuple[int, ...]


# Groups are costly and never die, so a mesh is made once. A new world (`init_process_group`) has none yet.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], timedelta | None], Mesh]] = WeakKeyDictionary()


def make_mesh(shape: Sequence[int] | None = None, timeout: timedelta | None = None) -> Mesh:
    """The world as a grid of that shape (default: one axis), on new groups of the default group's backends.

    Every rank must call it, with the same shapes in the same order. It never uses the default group for traffic: a model
    that does so at the same time would have its collectives interleaved with pvae's. Without `torch.distributed`
    initialised the world is of one rank. `timeout` is the new groups' (default: the backend's own).

    Raises ValueError if the shape does not hold as many ranks as there are.
    """
    alone = not dist.is_initialized()
    world, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    shape = (world,) if shape is None else tuple(shape)
    if math.prod(shape) != world or min(shape, default=1) < 1:
        hint = "; initialise torch.distributed first" if alone else ""
        raise ValueError(f"a mesh of shape {shape} holds {math.prod(shape)} ranks; there are {world}{hint}")
    made = {} if alone else _made.setdefault(dist.group.WORLD, {})
    if (shape, timeout) not in made:
        places = list(product(*map(range, shape)))
        groups = tuple(_axis_group(places, axis, rank, timeout) for axis in range(len(shape)))
        made[shape, timeout] = Mesh(shape, groups, rank, places[rank])
    return made[shape, timeout]


def _axis_group(places: list[tuple[int, ...]], axis: int, rank: int, timeout: timedelta | None) -> str | None:
    """Make the groups of one axis, all of them as `new_group` demands of every rank, and return this rank's name."""
    lines: dict[tuple[int, ...], list[int]] = {}
    for other, place in enumerate(places):
        lines.setdefault(place[:axis] + place[axis + 1 :], []).append(other)
    mine = None
    for line in lines.values():
        if len(line) > 1:
            group = dist.new_group(line, timeout=timeout)
            if rank in line:
                mine = group.group_name
    return mine
