"""This process among the ranks that share a sharded model: its place in the mesh, and the channel on which ranks agree."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from pvae.options import OptionError, Options
from pvae.runtime.mesh import Mesh, make_mesh
from pvae.runtime.rank_agreement import RankAgreement
from pvae.runtime.sharded_tensor import Piece, ShardedTensor


@dataclass
class Ranks:
    """A mesh on groups of pvae's own, and the agreement of its ranks (None in a world of one, and for invented meshes)."""

    mesh: Mesh
    agreement: RankAgreement | None = None
    _last: ShardedGraph | None = None

    def guarded(self, name: str) -> AbstractContextManager[None]:
        """Around compile and call: what fails here is told to the other ranks."""
        return nullcontext() if self.agreement is None else self.agreement.guarded(name)

    def agree(self, graph: ShardedGraph, inputs: Sequence[Any]) -> None:
        """Wait until all ranks are about to run `graph`, where it is another than last time (or checks its inputs)."""
        if self.agreement is None or (graph is self._last and not graph.check_inputs):
            return
        self._last = None
        told = [f"{tuple(i.shape)} {i.pieces[0].bounds}" if isinstance(i, ShardedTensor) else i for i in inputs]
        self.agreement.agree(graph.name, graph.collectives, told, check_values=graph.check_inputs)
        self._last = graph


_worlds: WeakKeyDictionary[dist.ProcessGroup, dict[Any, Ranks]] = WeakKeyDictionary()


def mesh_shape(options: Options, world: int) -> tuple[int, ...]:
    """The mesh that the options ask for in a world of that size: a line, or as square as can be for rows and columns.

    A mesh of fewer ranks is repeated: every copy of it computes the same. Raises OptionError where `mesh` does not fit.
    """
    both = options.shard_dims == "hw" or (options.shard_dims == "auto" and options.shard == "patch")
    if options.mesh is None:
        rows = next(r for r in range(math.isqrt(world), 0, -1) if world % r == 0)
        return (rows, world // rows) if both else (world,)
    if world % math.prod(options.mesh):
        text = "x".join(map(str, options.mesh))
        raise OptionError(
            f"mesh={text}: {math.prod(options.mesh)} ranks do not divide the {world} of torch.distributed"
        )
    if options.shard_dims != "auto" and len(options.mesh) != len(options.shard_dims):
        raise OptionError(
            f"shard_dims={options.shard_dims} needs a mesh of {len(options.shard_dims)} axes, not {options.mesh}"
        )
    return options.mesh


def ranks_of(options: Options) -> Ranks | None:
    """The ranks that `options.shard` is about; None where nothing is sharded. All ranks must call it.

    Raises RankError, within `options.timeout` seconds, if a rank does not come or asks for another mesh.
    """
    if options.shard == "none":
        return None
    shape = mesh_shape(options, world_size())
    if world_size() == 1:
        return Ranks(Mesh((1,), (None,), 0, (0,)))
    known = _worlds.setdefault(dist.group.WORLD, {})
    if (shape, options.timeout) not in known:
        agreement = RankAgreement.of(None, options.timeout)
        # Making groups waits for every rank without a word: first see that all are here, and mean the same.
        agreement.agree("pvae's mesh", (), (options.shard, options.shard_dims, shape))
        copies = world_size() // math.prod(shape)
        made = make_mesh((copies, *shape), timedelta(seconds=options.timeout))
        mesh = Mesh(shape, made.groups[1:], made.rank, made.coordinates[1:])
        known[shape, options.timeout] = Ranks(mesh, agreement)
    return known[shape, options.timeout]


def world_size() -> int:
    """How many ranks there are; 1 without `torch.distributed`.

    Raises OptionError where a launcher started several ranks and `torch.distributed` is not initialised.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise OptionError(
            f"WORLD_SIZE is {started}, but torch.distributed is not initialised: to shard over these ranks, "
            "call torch.distributed.init_process_group() before the model's first call"
        )
    return 1


class ShardedGraph:
    """One rank's compiled graph, which takes a list and empties it: pieces come and go as `ShardedTensor`s.

    It runs only where all ranks run it: they agree (`RankAgreement`) when the kind of call changes, or at every call with
    `check_inputs`; then the values of inputs that every rank brings are compared as well.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Any]], Sequence[Any]],
        ranks: Ranks,
        left: Mapping[int, tuple[Piece, ...]],
        collectives: tuple[str, ...],
        weights: Sequence[bool],
        check_inputs: bool,
    ) -> None:
        self.name, self.run, self.ranks, self.left, self.collectives = name, run, ranks, dict(left), collectives
        self.given = [i for i, is_weight in enumerate(weights) if not is_weight]
        self.check_inputs = check_inputs

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        with self.ranks.guarded(self.name):
            self.ranks.agree(self, [inputs[i] for i in self.given])
            inputs[:] = [i.local if isinstance(i, ShardedTensor) else i for i in inputs]
            outputs = self.run(inputs)
        return tuple(ShardedTensor(o, self.left[i]) if i in self.left else o for i, o in enumerate(outputs))
