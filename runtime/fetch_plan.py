"""What `pvae::fetch` has to move: from a partition of one dimension to any set of intervals. Integers only, no tensor.

Rank r holds `[have[r], have[r + 1])` of a dimension and needs `[start, stop)` of it, `need[r]`. The intervals may overlap,
be empty, skip pieces, and leave `[0, have[-1])`, where `fill` says what stands. Halo exchange, scatter, gather,
re-balancing and shifting are all this. Every rank derives the same plan from the same arguments, so what one sends is what
the other expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

Fill = Literal["zeros", "replicate", "reflect", "circular"]
Kind = Literal["local", "exchange", "gather"]
Bounds = tuple[int, ...]
Intervals = tuple[tuple[int, int], ...]


class Part(NamedTuple):
    """A stretch of a rank's result: rows `[start, stop)` of its own piece or of what it received, or zeros."""

    origin: Literal["own", "received", "zeros"]
    start: int
    stop: int
    flip: bool = False
    repeat: int = 1  # more than one only for a single row


@dataclass(frozen=True)
class RankPlan:
    """One rank's side. `send[d]` are the local rows that go to rank d, each at most once; splits are in rows."""

    send: tuple[Intervals, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Plan:
    """`local` moves nothing; `gather`: every rank needs all, in pieces padded to `longest`; else `exchange`."""

    kind: Kind
    longest: int
    ranks: tuple[RankPlan, ...]


class _Run(NamedTuple):
    """Consecutive source rows in global indices, and how they stand in the result. Zeros have no rows: `[n, n)`."""

    start: int
    stop: int
    flip: bool = False
    repeat: int = 1


@lru_cache(maxsize=4096)
def fetch_plan(have: Bounds, need: Intervals, fill: Fill = "zeros") -> Plan:
    """The plan for all ranks. Raises ValueError, with what would be right, for bounds or a reach that make no sense."""
    _check(have, need, fill)
    world, size = len(need), have[-1]
    runs = [[piece for run in _runs(*interval, size, fill) for piece in _by_owner(run, have)] for interval in need]
    # wanted[d][r]: the rows of rank r that rank d needs, in global indices
    wanted = [_wanted(mine, world) for mine in runs]

    lengths = [have[rank + 1] - have[rank] for rank in range(world)]
    if not any(wanted[d][r] for d in range(world) for r in range(world) if d != r):
        kind: Kind = "local"
    # A gather pads the pieces to the longest. Where that more than doubles the traffic, uneven messages are better.
    elif all(sum(map(_rows, mine)) == size for mine in wanted) and max(lengths) * world <= 2 * size:
        kind = "gather"
    else:
        kind = "exchange"

    ranks = []
    for rank in range(world):
        send = tuple(_local(wanted[d][rank], have[rank]) if d != rank else () for d in range(world))
        receive = [wanted[rank][r] if r != rank else () for r in range(world)]
        if kind == "gather":
            send, receive = ((),) * world, wanted[rank]
            offsets = [r * max(lengths) for r in range(world)]
        else:
            offsets = list(accumulate(map(_rows, receive), initial=0))
        parts: list[Part] = []
        for owner, run in runs[rank]:
            if owner is None:
                part = Part("zeros", 0, run.repeat)
            elif owner == rank and kind != "gather":
                part = Part("own", run.start - have[rank], run.stop - have[rank], run.flip, run.repeat)
            else:
                at = offsets[owner] + _position(run.start, receive[owner])
                part = Part("received", at, at + run.stop - run.start, run.flip, run.repeat)
            _append(parts, part)
        ranks.append(RankPlan(send, tuple(map(_rows, send)), tuple(map(_rows, receive)), tuple(parts)))
    return Plan(kind, max(lengths), tuple(ranks))


def _check(have: Bounds, need: Intervals, fill: Fill) -> None:
    if fill not in get_args(Fill):
        raise ValueError(f"fill {fill!r} is none of {', '.join(get_args(Fill))}")
    if len(have) < 2 or have[0] != 0 or any(a > b for a, b in pairwise(have)):
        raise ValueError(
            f"have {have} must be bounds 0, b1, ..., size that never decrease, one more than there are ranks"
        )
    if len(need) != len(have) - 1:
        raise ValueError(
            f"need has {len(need)} intervals; {len(have) - 1} ranks hold pieces of {have}: give one a rank"
        )
    size = have[-1]
    for rank, (start, stop) in enumerate(need):
        if start > stop:
            raise ValueError(f"rank {rank} needs [{start}, {stop}): an interval must not stop before it starts")
        reach = max(-start, stop - size) if start < stop else 0
        if fill in ("replicate", "circular") and reach > 0 and size == 0:
            raise ValueError(
                f"rank {rank} needs [{start}, {stop}) of nothing: fill {fill!r} takes a row; zeros takes none"
            )
        if fill == "reflect" and reach > max(size - 1, 0):
            raise ValueError(
                f"rank {rank} needs [{start}, {stop}), {reach} beyond the {size} rows there are: "
                f"reflect reaches {max(size - 1, 0)} at most (the edge is not repeated)"
            )


def _runs(start: int, stop: int, size: int, fill: Fill) -> Iterator[_Run]:
    """`[start, stop)` as stretches of source rows within `[0, size)`, in order."""
    if fill == "circular":
        while start < stop:
            turn = start // size * size
            end = min(stop, turn + size)
            yield _Run(start - turn, end - turn)
            start = end
        return
    below, above = min(stop, 0), max(start, size)  # [start, below) and [above, stop) are outside
    if start < below:
        match fill:
            case "zeros":
                yield _Run(0, 0, repeat=below - start)
            case "replicate":
                yield _Run(0, 1, repeat=below - start)
            case "reflect":  # row g stands for row -g
                yield _Run(1 - below, 1 - start, flip=True)
    if max(start, 0) < min(stop, size):
        yield _Run(max(start, 0), min(stop, size))
    if above < stop:
        match fill:
            case "zeros":
                yield _Run(size, size, repeat=stop - above)
            case "replicate":
                yield _Run(size - 1, size, repeat=stop - above)
            case "reflect":  # row g stands for row 2 (size - 1) - g
                yield _Run(2 * size - 1 - stop, 2 * size - 1 - above, flip=True)


def _by_owner(run: _Run, have: Bounds) -> Iterator[tuple[int | None, _Run]]:
    """The run cut where pieces meet, each with the rank that holds it (None for zeros), in the order of the result."""
    if run.start == run.stop:
        yield None, run
        return
    ranks = range(len(have) - 1)
    for rank in reversed(ranks) if run.flip else ranks:
        start, stop = max(run.start, have[rank]), min(run.stop, have[rank + 1])
        if start < stop:
            yield rank, run._replace(start=start, stop=stop)


def _wanted(runs: list[tuple[int | None, _Run]], world: int) -> list[Intervals]:
    """Of each owner the rows in `runs`, each once: sorted intervals that neither overlap nor touch."""
    merged: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for owner, (start, stop, *_) in sorted((owner, run) for owner, run in runs if owner is not None):
        last = merged[owner][-1] if merged[owner] else None
        if last is not None and start <= last[1]:
            merged[owner][-1] = (last[0], max(stop, last[1]))
        else:
            merged[owner].append((start, stop))
    return [tuple(rows) for rows in merged]


def _append(parts: list[Part], part: Part) -> None:
    """Add `part`, as one with the last where it continues it."""
    last = parts[-1] if parts else None
    plain = last is not None and not (last.flip or part.flip) and last.repeat == part.repeat == 1
    if last is not None and plain and last.origin == part.origin != "zeros" and last.stop == part.start:
        parts[-1] = last._replace(stop=part.stop)
    else:
        parts.append(part)


def _position(row: int, rows: Intervals) -> int:
    """Where global `row` stands among `rows` laid end to end."""
    return sum(min(stop, row) - start for start, stop in rows if start < row)


def _local(rows: Intervals, origin: int) -> Intervals:
    return tuple((start - origin, stop - origin) for start, stop in rows)


def _rows(rows: Intervals) -> int:
    return sum(stop - start for start, stop in rows)
