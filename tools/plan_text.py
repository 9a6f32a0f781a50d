"""Plans as text: a line a world, and what there is to say about each. Pictures are `plan_picture.py`'s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from pvae.tools import show
from pvae.tools.plan import LINES, Plan, RankPlan

__all__ = ["details", "overview"]


def overview(plans: Sequence[Plan]) -> Table:
    """A line a world: the slowest rank's time and what it is made of, and the most memory of a rank."""
    parts = ("arithmetic", "memory traffic", "launches", "exchanges ms")
    figures = ("time ms", "speed-up", *parts, "count", "sent MiB", "memory GiB")
    rows = show.table("world", "form", *figures, right=("world", *figures))
    for plan in plans:
        cost = plan.slowest.cost
        times = (cost.arithmetic, cost.traffic, cost.launch, cost.exchange)
        rows.add_row(
            str(plan.world),
            str(plan.candidate),
            f"{1e3 * plan.seconds:.2f}",
            f"{plan.alone / plan.seconds:.2f}",
            *(f"{1e3 * t:.2f}" for t in times),
            str(sum(e.times for e in cost.exchanges)),
            f"{sum(e.sent * e.times for e in cost.exchanges) / 2**20:.1f}",
            f"{plan.memory / 2**30:.2f}",
        )
    return rows


def reasoning(plan: Plan) -> Table:
    rows = show.table("candidate", "time ms", "memory GiB", "verdict", right=("time ms", "memory GiB"))
    for entry in plan.choice.considered:
        cost = entry.cost
        figures = ("-", "-") if cost is None else (f"{1e3 * cost.seconds:.2f}", f"{cost.memory / 2**30:.2f}")
        rows.add_row(str(entry.candidate), *figures, entry.verdict, style="" if entry.verdict == "chosen" else "dim")
    return rows


def exchange_table(rank: RankPlan) -> Table:
    figures = ("count", "of", "messages", "sent MiB", "received MiB", "largest", "us each", "ms")
    rows = show.table("what", "splits", "how", *figures, right=figures)
    for t in rank.exchanges():
        counts = (str(t.count), str(t.size), str(t.messages))
        sizes = (f"{t.sent / 2**20:.1f}", f"{t.received / 2**20:.1f}", _size(t.largest))
        times = (f"{1e6 * t.seconds / t.count:.1f}", f"{1e3 * t.seconds:.2f}")
        rows.add_row(t.purpose, t.direction, t.kind, *counts, *sizes, *times)
    return rows


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size} B"


def details(plan: Plan) -> Iterator[str | Table]:
    """What there is to say about one world beyond its line in the overview."""
    yield f"world {plan.world}: {plan.choice.reason}"
    if len(plan.choice.considered) > 1:
        yield reasoning(plan)
    rank = plan.slowest
    for cut in rank.cuts:
        lines, (reach, of) = LINES[cut.direction], cut.halo
        yield f"  {lines} of the input, {cut.size}: bounds {' '.join(map(str, cut.bounds))}; widest halo {reach} of {of}"
    for token_cut in rank.token_cuts:
        where = f" ({token_cut.source})" if token_cut.source else ""
        bounds = " ".join(map(str, token_cut.bounds))
        yield f"  dimension {token_cut.dimension} of {token_cut.node}, {token_cut.size}: bounds {bounds}{where}"
    if not plan.candidate.mesh:
        return
    if plan.candidate.ranks < plan.world:
        yield f"  uses {plan.candidate.ranks} ranks; each mesh is run {plan.world // plan.candidate.ranks} times over"
    if len(plan.ranks) < plan.candidate.ranks:
        yield f"  traced: ranks {', '.join(str(r.rank) for r in plan.ranks)}; no other has more to do"
    per_rank = ", ".join(f"rank {r.rank} {r.cost.memory / 2**30:.2f} GiB" for r in plan.ranks)
    yield f"  memory: {per_rank}"
    if rank.cost.exchanges:
        yield f"  exchanges of rank {rank.rank}, the slowest:"
        yield exchange_table(rank)
    for (source, size, rows), count in rank.gathered().items():
        yield f"  gathered: {count} x {_size(size)} ({rows} rows) for {source}"
    for (op, source, reason), count in rank.refused.items():
        yield f"  {op}: {count} x {reason} ({source})"
