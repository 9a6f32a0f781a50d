"""Many ranks in one process, one thread and no process group: how sharded graphs are tested, and tried on one device.

After sharding every rank has a graph of its own, and the ranks meet only in `pvae.runtime.fetch.fetch`. `lockstep`
interprets the graphs side by side: each runs until a fetch, waits there for the other members of its group, takes its rows
and goes on. That is how the demo runs many ranks on one device, and how the property tests run thousands of sharded models.

    graphs = [graph_of(mesh) for mesh in all_meshes((2, 2))]      # any way of making a rank's graph from its mesh
    outputs = lockstep(graphs, [inputs] * 4)

It is the oracle of what a fetch means, and takes nothing from `fetch_plan`: the dimension is put together from the pieces
and each rank picks rows of it by their index. A mistake that would hang a real group, or mix up its messages, is an error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pvae.passes.ir import output_node
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import Bounds, Fill, Intervals
from pvae.runtime.mesh import Mesh

__all__ = ["LockstepError", "Traffic", "all_meshes", "lockstep", "simulated_mesh"]

_PREFIX = "lockstep:"
_SIGNATURE = inspect.signature(fetch)


class LockstepError(RuntimeError):
    """The graphs of the ranks do not fit together; the message names the ranks and the nodes."""


@dataclass
class Traffic:
    """What one rank exchanged. Bytes are those of rows that another rank holds, each counted once a fetch and receiver:
    the least that any way of moving them sends (an all-gather of uneven pieces pads them)."""

    collectives: int = 0
    sent: int = 0
    received: int = 0


# --- meshes ------------------------------------------------------------------------------------------------------------


def simulated_mesh(shape: Sequence[int], rank: int) -> Mesh:
    """The mesh of `rank` in a world of that shape, as `make_mesh` would give it; the groups' names say who is in them."""
    places = list(product(*map(range, shape)))
    if not 0 <= rank < len(places):
        raise ValueError(f"a mesh of shape {tuple(shape)} holds ranks 0 to {len(places) - 1}, not {rank}")
    mine, groups = places[rank], []
    for axis, length in enumerate(shape):
        members = [r for r, p in enumerate(places) if p[:axis] + p[axis + 1 :] == mine[:axis] + mine[axis + 1 :]]
        groups.append(_PREFIX + ",".join(map(str, members)) if length > 1 else None)
    return Mesh(tuple(shape), tuple(groups), rank, mine)


def all_meshes(shape: Sequence[int]) -> list[Mesh]:
    """The mesh of every rank, in order."""
    return [simulated_mesh(shape, rank) for rank in range(math.prod(shape))]


def _members(group: str) -> tuple[int, ...]:
    if not group.startswith(_PREFIX):
        raise LockstepError(f"group {group!r} is none of simulated_mesh, so who is in it is not known")
    return tuple(map(int, group.removeprefix(_PREFIX).split(",")))


# --- what a fetch means --------------------------------------------------------------------------------------------------


def _sources(start: int, stop: int, size: int, fill: Fill) -> Tensor:
    """For each of the rows `[start, stop)` the row of `[0, size)` that stands there, -1 for zeros; int64.

    That is `torch.nn.functional.pad` with mode constant, replicate, reflect or circular.
    """
    at = torch.arange(start, stop)
    below, above = at < 0, at >= size
    match fill:
        case "zeros":
            return at.masked_fill(below | above, -1)
        case "replicate":
            found = at.clamp(0, size - 1)
        case "reflect":
            found = torch.where(below, -at, torch.where(above, 2 * (size - 1) - at, at))
        case "circular":
            found = at % size if size else at
        case _:
            raise LockstepError(f"fill {fill!r} is none of zeros, replicate, reflect, circular")
    if ((found < 0) | (found >= size)).any():
        raise LockstepError(f"[{start}, {stop}) of {size} rows is out of the reach of fill {fill!r}")
    return found


def _pick(rows: Tensor, dim: int, index: Tensor) -> Tensor:
    """A copy of the rows of `index`, zeros for -1."""
    if not (index >= 0).any():
        return rows.new_zeros(*rows.shape[:dim], len(index), *rows.shape[dim + 1 :])
    index = index.to(rows.device)
    picked = rows.index_select(dim, index.clamp_min(0))
    return picked.index_fill_(dim, (index < 0).nonzero()[:, 0], 0)


@lru_cache(maxsize=4096)
def _foreign(have: Bounds, interval: tuple[int, int], rank: int, fill: Fill) -> frozenset[int]:
    """The rows that `rank` needs and another rank holds."""
    rows = _sources(*interval, have[-1], fill).tolist()
    return frozenset(row for row in rows if row >= 0 and not have[rank] <= row < have[rank + 1])


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    """`x` dense in the memory format that `fetch` promises."""
    if not channels_last or x.dim() < 4:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass(frozen=True)
class _Fetch:
    """A rank at a fetch: the node, and its arguments with the dimension counted from the front."""

    world_rank: int
    node: Node
    x: Tensor
    dim: int
    have: Bounds
    need: Intervals
    rank: int
    fill: Fill
    group: str | None
    channels_last: bool

    @classmethod
    def at(cls, world_rank: int, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> _Fetch:
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        x, need = given["x"], tuple((start, stop) for start, stop in given["need"])
        rest = (need, given["rank"], given["fill"], given["group"], given["channels_last"])
        return cls(world_rank, node, x, range(x.dim())[given["dim"]], tuple(given["have"]), *rest)

    def __str__(self) -> str:
        return (
            f"rank {self.world_rank} at {self.node.name} (group {self.group}, dimension {self.dim}, have {self.have})"
        )

    @property
    def agreed(self) -> dict[str, Any]:
        """What all members must bring alike."""
        others = list(self.x.shape)
        others[self.dim] = -1
        same = {name: getattr(self, name) for name in ("dim", "have", "need", "fill", "channels_last")}
        return {**same, "dtype": self.x.dtype, "sizes of the other dimensions": tuple(others)}

    def sources(self, rank: int) -> Tensor:
        """The rows of the whole that member `rank` needs, -1 for zeros."""
        return _sources(*self.need[rank], self.have[-1], self.fill)

    def foreign(self, rank: int) -> frozenset[int]:
        """The rows that member `rank` needs of other members."""
        return _foreign(self.have, self.need[rank], rank, self.fill)

    def check(self) -> None:
        """That the arguments make sense on this rank alone."""
        if len(self.have) != len(self.need) + 1 or self.have[0] != 0 or any(a > b for a, b in pairwise(self.have)):
            raise LockstepError(f"{self}: have must be bounds 0, ..., size, one more than needs; need {self.need}")
        if not 0 <= self.rank < len(self.need):
            raise LockstepError(f"{self}: is rank {self.rank} of {len(self.need)}")
        held = self.have[self.rank + 1] - self.have[self.rank]
        if self.x.shape[self.dim] != held:
            raise LockstepError(f"{self}: {tuple(self.x.shape)} has {self.x.shape[self.dim]} rows instead of {held}")
        if self.group is not None:
            members = _members(self.group)
            if len(members) != len(self.need) or members[self.rank : self.rank + 1] != (self.world_rank,):
                raise LockstepError(f"{self}: is not rank {self.rank} of {len(self.need)} in that group")

    @property
    def is_local(self) -> bool:
        """Whether no member needs a row of another: each goes on by itself."""
        return not any(self.foreign(rank) for rank in range(len(self.need)))

    def local(self) -> Tensor:
        """The rows of a fetch that moves nothing."""
        index, offset = self.sources(self.rank), self.have[self.rank]
        if len(index) and index[0] >= 0 and torch.equal(index, index[0] + torch.arange(len(index))):
            return self.x.narrow(self.dim, int(index[0]) - offset, len(index))
        return _dense(_pick(self.x, self.dim, torch.where(index < 0, index, index - offset)), self.channels_last)


def _exchange(fetches: Sequence[_Fetch], traffic: Sequence[Traffic] | None) -> list[Tensor]:
    """What each member of a group gets. `fetches` are theirs, in the order of the group."""
    first = fetches[0]
    for other in fetches[1:]:
        for name, value in first.agreed.items():
            if other.agreed[name] != value:
                raise LockstepError(f"{first} and {other} differ in {name}: {value} and {other.agreed[name]}")
    if traffic is not None:
        row_bytes = first.x.element_size() * math.prod(n for d, n in enumerate(first.x.shape) if d != first.dim)
        for mine in fetches:
            traffic[mine.world_rank].collectives += 1
            for row in first.foreign(mine.rank):
                owner = next(o for o in fetches if o.have[o.rank] <= row < o.have[o.rank + 1])
                traffic[mine.world_rank].received += row_bytes
                traffic[owner.world_rank].sent += row_bytes
    whole = torch.cat([f.x for f in fetches], first.dim)
    return [_dense(_pick(whole, first.dim, first.sources(f.rank)), first.channels_last) for f in fetches]


# --- running -------------------------------------------------------------------------------------------------------------


def _run(rank: int, gm: GraphModule, inputs: Sequence[Any]) -> Generator[_Fetch, Tensor, Any]:
    """Interpret one rank's graph; yields where it must wait and is sent the rows. Dead values are dropped at once."""
    interpreter = Interpreter(gm)
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if count != len(inputs):
        raise LockstepError(f"rank {rank}: the graph takes {count} inputs, {len(inputs)} are given")
    interpreter.args_iter = iter(inputs)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional":
            raise LockstepError(f"rank {rank}: {node.format_node()} is a collective and no fetch: no lockstep for it")
        try:
            at = None
            if node.target is fetch:
                at = _Fetch.at(rank, node, *interpreter.fetch_args_kwargs_from_env(node))
                at.check()
                result = at.local() if at.is_local else None
            else:
                result = interpreter.run_node(node)
        except Exception as error:
            error.add_note(f"on rank {rank}, at {node.format_node()}")
            raise
        if at is not None and result is None:
            result = yield at
        interpreter.env[node] = result
        del at, result
        for dead in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[dead]
    return interpreter.env[output_node(gm.graph)]


def lockstep(
    graphs: Sequence[GraphModule], inputs: Sequence[Sequence[Any]], traffic: Sequence[Traffic] | None = None
) -> list[Any]:
    """Run the graphs of ranks 0, 1, ... on their inputs and return what each returns.

    Args:
        graphs: one a rank, whose only communication is `fetch`, in groups of a `simulated_mesh`.
        inputs: for each rank what its placeholders take.
        traffic: one a rank, to which what is exchanged is added.

    Raises LockstepError where a real world would hang or mix up messages: members at different fetches, a rank that ends
    or waits elsewhere, pieces that are not what `have` says.
    """
    if len(inputs) != len(graphs) or (traffic is not None and len(traffic) != len(graphs)):
        raise ValueError(f"{len(graphs)} graphs need the inputs, and the traffic, of as many ranks")
    runs = [_run(rank, gm, given) for rank, (gm, given) in enumerate(zip(graphs, inputs, strict=True))]
    waiting: dict[int, _Fetch] = {}
    outputs: dict[int, Any] = {}

    def resume(rank: int, rows: Tensor | None) -> None:
        try:
            waiting[rank] = runs[rank].send(rows) if rows is not None else next(runs[rank])
        except StopIteration as end:
            outputs[rank] = end.value

    with torch.no_grad():
        for rank in range(len(runs)):
            resume(rank, None)
        while waiting:
            fetches = _complete(waiting, outputs)
            received = _exchange(fetches, traffic)
            ranks = [f.world_rank for f in fetches]
            del fetches  # and with it the pieces that were sent
            for rank in ranks:
                del waiting[rank]
            for rank in ranks:
                resume(rank, received.pop(0))
    return [outputs[rank] for rank in range(len(runs))]


def _complete(waiting: dict[int, _Fetch], outputs: dict[int, Any]) -> list[_Fetch]:
    """The fetches of a group all of whose members have come."""
    for at in waiting.values():
        if at.group is None:
            raise LockstepError(f"{at}: needs rows of other ranks and names no group")
        members = _members(at.group)
        if all(rank in waiting and waiting[rank].group == at.group for rank in members):
            return [waiting[rank] for rank in members]
        ended = [rank for rank in members if rank in outputs]
        if ended:
            raise LockstepError(f"{at} waits for rank {ended[0]}, whose graph has ended")
    places = "; ".join(str(at) for _, at in sorted(waiting.items()))
    raise LockstepError(f"every rank waits for another: {places}")
