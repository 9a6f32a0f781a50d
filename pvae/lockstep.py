"""Many ranks in one process, one thread and no process group: how sharded graphs are tested, and tried on one device.

After sharding every rank has a graph of its own, and the ranks meet only in `pvae.runtime.fetch.fetch` and in
`pvae.runtime.exchange.exchange`. `lockstep` interprets the graphs side by side: each runs until one of these, waits there for
the other members of its group, takes what it needs and goes on. That is how the demo runs many ranks on one device, and how
the property tests run thousands of sharded models.

    graphs = [graph_of(mesh) for mesh in all_meshes((2, 2))]      # any way of making a rank's graph from its mesh
    outputs = lockstep(graphs, [inputs] * 4)

It is the oracle of what they mean, and takes nothing from their plans: the whole is put together from the pieces and each
rank picks its rows or its box of it. A mistake that would hang a real group, or mix up its messages, is an error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from pvae.passes.ir import output_node
from pvae.runtime.exchange import Box, Boxes, exchange, exchanged_like
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import Bounds, Fill, Intervals
from pvae.runtime.mesh import Mesh

__all__ = ["LockstepError", "Traffic", "all_meshes", "lockstep", "simulated_mesh"]

_PREFIX = "lockstep:"


class LockstepError(RuntimeError):
    """The graphs of the ranks do not fit together; the message names the ranks and the nodes."""


@dataclass
class Traffic:
    """What one rank exchanged. Bytes are those of what another rank holds, each counted once a collective and receiver:
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


# --- where ranks meet ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Meeting:
    """A rank at a node where it meets the others of its group: its place in the world, and in a group of `world` ranks."""

    world_rank: int
    node: Node
    rank: int
    world: int
    group: str | None

    def __str__(self) -> str:
        return f"rank {self.world_rank} at {self.node.name} (group {self.group}, {self.details})"

    @property
    def details(self) -> str:
        raise NotImplementedError

    @property
    def agreed(self) -> dict[str, Any]:
        """What all members must bring alike."""
        raise NotImplementedError

    @property
    def is_local(self) -> bool:
        """Whether no member needs anything of another: each goes on by itself."""
        raise NotImplementedError

    def local(self) -> Any:
        """The result where nothing moves."""
        raise NotImplementedError

    def check_pieces(self) -> None:
        """That this rank brings what its arguments say."""
        raise NotImplementedError

    def check(self) -> None:
        """That the arguments make sense on this rank alone."""
        if not 0 <= self.rank < self.world:
            raise LockstepError(f"{self}: is rank {self.rank} of {self.world}")
        self.check_pieces()
        if self.group is not None:
            members = _members(self.group)
            if len(members) != self.world or members[self.rank : self.rank + 1] != (self.world_rank,):
                raise LockstepError(f"{self}: is not rank {self.rank} of {self.world} in that group")


def _bound(target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(target).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _agree(members: Sequence[_Meeting]) -> None:
    first = members[0]
    for other in members[1:]:
        if first.node.target is not other.node.target:
            raise LockstepError(f"{first} and {other} are at different collectives")
        for name, value in first.agreed.items():
            if other.agreed[name] != value:
                raise LockstepError(f"{first} and {other} differ in {name}: {value} and {other.agreed[name]}")


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
class _Fetch(_Meeting):
    """A rank at a fetch: its arguments, with the dimension counted from the front."""

    x: Tensor
    dim: int
    have: Bounds
    need: Intervals
    fill: Fill
    channels_last: bool

    @classmethod
    def at(cls, world_rank: int, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> _Fetch:
        given = _bound(fetch, args, kwargs)
        x, need = given["x"], tuple((start, stop) for start, stop in given["need"])
        who = (world_rank, node, given["rank"], len(need), given["group"])
        return cls(
            *who, x, range(x.dim())[given["dim"]], tuple(given["have"]), need, given["fill"], given["channels_last"]
        )

    @property
    def details(self) -> str:
        return f"dimension {self.dim}, have {self.have}"

    @property
    def agreed(self) -> dict[str, Any]:
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

    def check_pieces(self) -> None:
        if len(self.have) != len(self.need) + 1 or self.have[0] != 0 or any(a > b for a, b in pairwise(self.have)):
            raise LockstepError(f"{self}: have must be bounds 0, ..., size, one more than needs; need {self.need}")
        held = self.have[self.rank + 1] - self.have[self.rank]
        if self.x.shape[self.dim] != held:
            raise LockstepError(f"{self}: {tuple(self.x.shape)} has {self.x.shape[self.dim]} rows instead of {held}")

    @property
    def is_local(self) -> bool:
        return not any(self.foreign(rank) for rank in range(len(self.need)))

    def local(self) -> Tensor:
        index, offset = self.sources(self.rank), self.have[self.rank]
        if len(index) and index[0] >= 0 and torch.equal(index, index[0] + torch.arange(len(index))):
            return self.x.narrow(self.dim, int(index[0]) - offset, len(index))
        return _dense(_pick(self.x, self.dim, torch.where(index < 0, index, index - offset)), self.channels_last)


def _fetched(fetches: Sequence[_Fetch], traffic: Sequence[Traffic] | None) -> list[Tensor]:
    """What each member of a group gets. `fetches` are theirs, in the order of the group."""
    first = fetches[0]
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


# --- what an exchange means ----------------------------------------------------------------------------------------------


def _at(box: Box) -> tuple[slice, slice, slice]:
    """The index of a box in `[batch, heads, tokens, inner]`."""
    return (slice(None), slice(*box[0]), slice(*box[1]))


@lru_cache(maxsize=4096)
def _owners(held: tuple[Box, ...]) -> Tensor:
    """Who holds each place of heads x tokens: the ranks, int64. Raises LockstepError if someone else does too, or nobody."""
    full = [box for box in held if box[0][0] < box[0][1] and box[1][0] < box[1][1]]
    owner = torch.full([max((box[d][1] for box in full), default=0) for d in (0, 1)], -1)
    for rank, box in enumerate(held):
        if (owner[_at(box)[1:]] >= 0).any():
            raise LockstepError(f"two ranks hold the same place in {held}")
        owner[_at(box)[1:]] = rank
    if (owner < 0).any():
        raise LockstepError(f"{held} leave a place that no rank holds")
    return owner


@dataclass(frozen=True)
class _Exchange(_Meeting):
    """A rank at an exchange, and its arguments."""

    xs: tuple[Tensor, ...]
    have: Boxes
    need: Boxes

    @classmethod
    def at(cls, world_rank: int, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> _Exchange:
        given = _bound(exchange, args, kwargs)
        have, need = (
            tuple(tuple(((a, b), (c, d)) for (a, b), (c, d) in boxes) for boxes in given[name])
            for name in ("have", "need")
        )
        who = (world_rank, node, given["rank"], len(have[0]), given["group"])
        return cls(*who, tuple(given["xs"]), have, need)

    @property
    def details(self) -> str:
        return f"have {self.have}"

    @property
    def agreed(self) -> dict[str, Any]:
        return {
            "have": self.have,
            "need": self.need,
            "dtypes": [x.dtype for x in self.xs],
            "batch and inner sizes": [(x.shape[0], x.shape[3]) for x in self.xs],
        }

    def check_pieces(self) -> None:
        if len(self.have) != len(self.xs) or len(self.need) != len(self.xs):
            raise LockstepError(f"{self}: boxes of {len(self.have)} and {len(self.need)} tensors for {len(self.xs)}")
        if {len(boxes) for boxes in (*self.have, *self.need)} != {self.world}:
            raise LockstepError(f"{self}: boxes of other numbers of ranks; need {self.need}")
        for i, (x, held, wanted) in enumerate(zip(self.xs, self.have, self.need, strict=True)):
            heads, tokens = _owners(held).shape
            if any(a < b and c < d and (a < 0 or b > heads or c < 0 or d > tokens) for (a, b), (c, d) in wanted):
                raise LockstepError(f"{self}: tensor {i} is of {heads} heads and {tokens} tokens; need {wanted}")
            (a, b), (c, d) = held[self.rank]
            if x.dim() != 4 or x.shape[1:3] != (b - a, d - c):
                raise LockstepError(f"{self}: tensor {i} is {tuple(x.shape)} instead of the box {held[self.rank]}")
            if x.dtype != self.xs[0].dtype:
                raise LockstepError(f"{self}: tensor {i} is {x.dtype}, tensor 0 is {self.xs[0].dtype}")

    @property
    def is_local(self) -> bool:
        return all(
            bool((_owners(held)[_at(box)[1:]] == rank).all())
            for held, wanted in zip(self.have, self.need, strict=True)
            for rank, box in enumerate(wanted)
        )

    def local(self) -> list[Tensor]:
        results = []
        for x, held, wanted in zip(self.xs, self.have, self.need, strict=True):
            (a, b), (c, d) = wanted[self.rank]
            if a == b or c == d:
                results.append(x.new_empty(x.shape[0], b - a, d - c, x.shape[3]))
            else:
                (heads, _), (tokens, _) = held[self.rank]
                results.append(x[:, a - heads : b - heads, c - tokens : d - tokens])
        return results


def _exchanged(members: Sequence[_Exchange], traffic: Sequence[Traffic] | None) -> list[list[Tensor]]:
    """What each member of a group gets. The memory is laid out as `exchange` does, for views that come after."""
    first = members[0]
    results = [exchanged_like(m.xs, m.have, m.need, m.rank, m.group) for m in members]
    for i, (held, wanted) in enumerate(zip(first.have, first.need, strict=True)):
        x = first.xs[i]
        whole = x.new_empty(x.shape[0], *_owners(held).shape, x.shape[3])
        for mine in members:
            whole[_at(held[mine.rank])] = mine.xs[i]
        for mine in members:
            box = wanted[mine.rank]
            results[mine.rank][i].copy_(whole[_at(box)])
            place = x.element_size() * x.shape[0] * x.shape[3]
            for owner, count in enumerate(torch.bincount(_owners(held)[_at(box)[1:]].flatten()).tolist()):
                if traffic is not None and owner != mine.rank:
                    traffic[mine.world_rank].received += count * place
                    traffic[members[owner].world_rank].sent += count * place
    if traffic is not None:
        for mine in members:
            traffic[mine.world_rank].collectives += 1
    return results


# --- running -------------------------------------------------------------------------------------------------------------


# Each kind of node where ranks meet: how a rank comes to it, and what its members get.
_MEETINGS: dict[Any, tuple[Callable[..., _Meeting], Callable[..., list[Any]]]] = {
    fetch: (_Fetch.at, _fetched),
    exchange: (_Exchange.at, _exchanged),
}


def _run(rank: int, gm: GraphModule, inputs: Sequence[Any]) -> Generator[_Meeting, Any, Any]:
    """Interpret one rank's graph; yields where it must wait and is sent what it gets. Dead values are dropped at once."""
    interpreter = Interpreter(gm)
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if count != len(inputs):
        raise LockstepError(f"rank {rank}: the graph takes {count} inputs, {len(inputs)} are given")
    interpreter.args_iter = iter(inputs)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "_c10d_functional":
            raise LockstepError(
                f"rank {rank}: {node.format_node()} is a collective and no fetch or exchange: no lockstep for it"
            )
        try:
            at: _Meeting | None = None
            if node.op == "call_function" and node.target in _MEETINGS:
                at = _MEETINGS[node.target][0](rank, node, *interpreter.fetch_args_kwargs_from_env(node))
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
        graphs: one a rank, whose only communication is `fetch` and `exchange`, in groups of a `simulated_mesh`.
        inputs: for each rank what its placeholders take.
        traffic: one a rank, to which what is exchanged is added.

    Raises LockstepError where a real world would hang or mix up messages: members at different nodes, a rank that ends
    or waits elsewhere, pieces that are not what `have` says.
    """
    if len(inputs) != len(graphs) or (traffic is not None and len(traffic) != len(graphs)):
        raise ValueError(f"{len(graphs)} graphs need the inputs, and the traffic, of as many ranks")
    runs = [_run(rank, gm, given) for rank, (gm, given) in enumerate(zip(graphs, inputs, strict=True))]
    waiting: dict[int, _Meeting] = {}
    outputs: dict[int, Any] = {}

    def resume(rank: int, got: Any) -> None:
        try:
            waiting[rank] = runs[rank].send(got) if got is not None else next(runs[rank])
        except StopIteration as end:
            outputs[rank] = end.value

    with torch.no_grad():
        for rank in range(len(runs)):
            resume(rank, None)
        while waiting:
            members = _complete(waiting, outputs)
            _agree(members)
            received = _MEETINGS[members[0].node.target][1](members, traffic)
            ranks = [member.world_rank for member in members]
            del members  # and with it the pieces that were sent
            for rank in ranks:
                del waiting[rank]
            for rank in ranks:
                resume(rank, received.pop(0))
    return [outputs[rank] for rank in range(len(runs))]


def _complete(waiting: dict[int, _Meeting], outputs: dict[int, Any]) -> list[_Meeting]:
    """The members of a group, in its order, once they have all come."""
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
