"""Which form of sharding, over which dimensions and how many ranks: candidates, what each costs, and why one is taken.

The chooser knows no graph. Whoever asks gives the cost of a candidate (a compile: the graph sharded so; `pvae plan`: the
whole model traced so), and gets a `Choice` that can be printed.

    1. a candidate that does not fit into the machine's memory is out; if none fits, the smallest is taken
    2. the fastest of the rest is found
    3. the simplest that is at most 5 % slower than it is taken: no sharding before fewer ranks before one dimension
       before two, rows before columns

Exact forms only, unless approximate ones are asked for, which adds patch. What works on tokens (a transformer) has the form
sequence for its exact one, all else halo. Tiles are a choice of the autoencoder as a whole, not of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from pvae.passes.cost import Cost
from pvae.passes.machine import Machine

__all__ = ["NONE", "Candidate", "Choice", "Considered", "candidates", "choose", "mesh_shapes"]

MARGIN = 0.05
_FORMS = ("none", "halo", "patch", "sequence")
_DIMS = ("", "h", "w", "hw")


@dataclass(frozen=True)
class Candidate:
    """A form (none, halo, patch, sequence), the dimensions of pictures that it splits (h, w, hw), the ranks along each."""

    form: str
    dims: str = ""
    mesh: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        return prod(self.mesh)

    @property
    def complexity(self) -> tuple[object, ...]:
        """Simpler candidates are less."""
        return self.ranks > 1, self.form == "patch", self.ranks, len(self.dims), _DIMS.index(self.dims), self.mesh[::-1]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.form, self.dims, "x".join(map(str, self.mesh)))))


NONE = Candidate("none")


def mesh_shapes(ranks: int, dims: str) -> list[tuple[int, ...]]:
    """The meshes of so many ranks for `h`, `w` (a line) or `hw`: as square as can be, both ways round."""
    if dims != "hw":
        return [(ranks,)]
    low = max((n for n in range(2, int(ranks**0.5) + 1) if ranks % n == 0), default=None)
    return [] if low is None else sorted({(low, ranks // low), (ranks // low, low)})


def candidates(
    world: int,
    *,
    form: str = "auto",
    dims: str = "auto",
    approximate: bool = False,
    mesh: tuple[int, ...] | None = None,
    fewer: bool = True,
    tokens: bool = False,
) -> list[Candidate]:
    """The candidates for `world` ranks, the simplest first.

    `form`, `dims` and `mesh` fix what they name (`auto` and None leave it open). A form that is fixed rules none out on
    more than one rank; `fewer` takes in meshes of fewer ranks, on which the others compute the same as one of them.
    `tokens`: what is to be split are tokens, not pictures. Their form takes no `dims`.
    Raises ValueError for a form or dimension that there is not, and for a mesh that does not fit.
    """
    if form not in (*_FORMS, "auto"):
        raise ValueError(f"form {form!r} cannot be chosen here; valid: auto, {', '.join(_FORMS)}")
    if dims not in (*_DIMS[1:], "auto"):
        raise ValueError(f"dims {dims!r} does not exist; valid: auto, {', '.join(_DIMS[1:])}")
    if world < 1:
        raise ValueError(f"a world of {world} ranks does not exist")
    if mesh is not None and (prod(mesh) != world or dims not in ("auto", *(("hw",) if len(mesh) == 2 else ("h", "w")))):
        raise ValueError(f"a mesh of shape {mesh} is not one of {world} ranks along {dims}")
    if form == "none" or world == 1:
        return [NONE]
    forms = [form] if form != "auto" else ["sequence"] if tokens else ["halo", "patch"] if approximate else ["halo"]
    counts = [n for n in range(2, world + 1) if world % n == 0 and ((fewer and mesh is None) or n == world)]
    names = _DIMS[1:] if dims == "auto" else (dims,)
    found = [NONE] if form == "auto" else []
    if forms == ["sequence"]:
        return found + [Candidate("sequence", mesh=(n,) if mesh is None else mesh) for n in counts]
    for count in counts:
        for name in names:
            shapes = mesh_shapes(count, name) if mesh is None else [mesh] if len(mesh) == len(name) else []
            found += [Candidate(f, name, shape) for f in forms for shape in shapes]
    if not found:  # hw of a prime number of ranks
        raise ValueError(f"{world} ranks are no grid of rows and columns; h or w would split over them")
    return sorted(found, key=lambda c: c.complexity)


@dataclass(frozen=True)
class Considered:
    """A candidate, the cost of its slowest rank (None where it is impossible), and what became of it."""

    candidate: Candidate
    cost: Cost | None
    verdict: str


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, its cost, why, and everything that was considered, in order of complexity."""

    candidate: Candidate
    cost: Cost
    reason: str
    considered: tuple[Considered, ...]


def choose(
    options: Sequence[Candidate], cost: Callable[[Candidate], Cost | str], machine: Machine, margin: float = MARGIN
) -> Choice:
    """Ask `cost` for every candidate (a text says why one is impossible) and choose by the module's rules.

    Raises ValueError, with every reason, if no candidate is possible.
    """
    options = sorted(options, key=lambda c: c.complexity)
    answers = {candidate: cost(candidate) for candidate in options}
    costs = {c: found for c, found in answers.items() if isinstance(found, Cost)}
    if not costs:
        raise ValueError(f"nothing is possible: {'; '.join(f'{c}: {found}' for c, found in answers.items())}")
    fitting = [c for c in costs if costs[c].memory <= machine.capacity]
    if fitting:
        fastest = min(fitting, key=lambda c: costs[c].seconds)
        chosen = next(c for c in fitting if costs[c].seconds <= (1 + margin) * costs[fastest].seconds)
    else:
        chosen = fastest = min(costs, key=lambda c: costs[c].memory)

    def verdict(candidate: Candidate) -> str:
        found = answers[candidate]
        if isinstance(found, str):
            return f"impossible: {found}"
        if candidate == chosen:
            return "chosen"
        if fitting and candidate not in fitting:
            return f"needs {_gib(found.memory)} of {_gib(machine.capacity)}"
        if candidate == fastest:
            return "faster, but by less than the margin"
        return "not simpler" if found.seconds <= (1 + margin) * costs[fastest].seconds else "slower"

    reason = _reason(chosen, fastest, costs, machine, bool(fitting), margin)
    considered = tuple(Considered(c, costs.get(c), verdict(c)) for c in options)
    return Choice(chosen, costs[chosen], reason, considered)


def _reason(
    chosen: Candidate, fastest: Candidate, costs: dict[Candidate, Cost], machine: Machine, fits: bool, margin: float
) -> str:
    def time(candidate: Candidate) -> str:
        return f"{1e3 * costs[candidate].seconds:.2f} ms"

    if not fits:
        need = _gib(costs[chosen].memory)
        return f"nothing fits into {_gib(machine.capacity)}; {chosen} needs least, {need}"
    if len(costs) == 1:
        return f"{chosen} is all there is: {time(chosen)}"
    others = [c for c in costs if c != chosen and costs[c].memory <= machine.capacity]
    if not others:
        return f"only {chosen} fits into {_gib(machine.capacity)}: {time(chosen)}"
    if chosen != fastest:
        gain = 100 * (costs[chosen].seconds / costs[fastest].seconds - 1)
        small = " (too small to gain)" if chosen == NONE else ""
        return f"{fastest} would gain {gain:.1f} %, less than {100 * margin:.0f} %{small}: {chosen}, {time(chosen)}"
    if chosen == NONE:
        best = min(others, key=lambda c: costs[c].seconds)
        return f"too small to gain: {time(NONE)} unsharded, at best {time(best)} sharded ({best})"
    if NONE in costs and costs[NONE].memory > machine.capacity:
        return f"{chosen} is fastest of what fits, {time(chosen)}; unsharded needs {_gib(costs[NONE].memory)}"
    ratio = f", {costs[NONE].seconds / costs[chosen].seconds:.2f}x of unsharded" if NONE in costs else ""
    return f"{chosen} is fastest: {time(chosen)}{ratio}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
