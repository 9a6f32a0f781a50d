"""This process among the ranks that share a sharded model: its place in the mesh, and the channel on which ranks agree."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from pvae.call_structure import is_dense
from pvae.options import OptionError, Options
from pvae.runtime.mesh import Mesh, make_mesh
from pvae.runtime.rank_agreement import RankAgreement
from pvae.runtime.sharded_tensor import Piece, ShardedTensor


@dataclass
class Ranks:
    """A mesh on groups of pvae's own, and the agreement of its ranks (None in a world of one, and for invented meshes)."""

    mesh: Mesh
    agreement: RankAgreement | None = None
    _last: str | None = None  # the kind of call that all ranks made last

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Around compile and call: what fails here is told to the other ranks, and all agree anew at the next call."""
        try:
            with nullcontext() if self.agreement is None else self.agreement.guarded(name):
                yield
        except BaseException:
            self._last = None
            raise

    def agree(self, graph: ShardedGraph, inputs: Sequence[Any]) -> None:
        """Wait until all ranks are about to run `graph`, if it is new, of another kind than the last, or checks inputs."""
        if self.agreement is None or not (graph.new or graph.check_inputs or graph.kind != self._last):
            return
        self._last = None
        told = [stated(i) if isinstance(i, ShardedTensor) else i for i in inputs]
        self.agreement.agree(graph.name, graph.collectives, told, check_values=graph.check_inputs)
        self._last, graph.new = graph.kind, False


def stated(value: Any) -> Any:
    """What of an input all ranks must bring alike: the shape of a tensor, where it is split, or a plain value itself."""
    if isinstance(value, ShardedTensor):
        return f"{tuple(value.shape)} in {[replace(piece, group=None, rank=0) for piece in value.pieces]}"
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


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
    return _ranks(mesh_shape(options, world_size()), options.timeout, (options.shard, options.shard_dims))


def all_ranks(timeout: float) -> Ranks:
    """All ranks in a line: those among whom a main-rank region's results travel. All ranks must call it.

    Raises RankError, within `timeout` seconds, if a rank does not come or makes another mesh.
    """
    return _ranks((world_size(),), timeout, ("main_rank",))


def _ranks(shape: tuple[int, ...], timeout: float, what_for: tuple[str, ...]) -> Ranks:
    if world_size() == 1:
        return Ranks(Mesh((1,), (None,), 0, (0,)))
    known = _worlds.setdefault(dist.group.WORLD, {})
    if (shape, timeout) not in known:
        agreement = RankAgreement.of(None, timeout)
        # Making groups waits for every rank without a word: first see that all are here, and mean the same.
        agreement.agree("pvae's mesh", (), (*what_for, shape))
        copies = world_size() // math.prod(shape)
        made = make_mesh((copies, *shape), timedelta(seconds=timeout))
        mesh = Mesh(shape, made.groups[1:], made.rank, made.coordinates[1:])
        known[shape, timeout] = Ranks(mesh, agreement)
    return known[shape, timeout]


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

    It runs only where all ranks run it: they agree (`RankAgreement`) when it is new (the ranks compile at different speeds,
    and one may fail) and when the kind of call changes, or at every call with `check_inputs`; then the values of inputs that
    every rank brings are compared as well. A kind is the sequence of collectives and the inputs' global shapes, so the
    layers of a transformer, compiled one by one, are of one kind.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Any]], Sequence[Any]],
        ranks: Ranks,
        left: Mapping[int, tuple[Piece, ...]],
        collectives: tuple[str, ...],
        given: Mapping[int, Any],
        check_inputs: bool,
    ) -> None:
        self.name, self.run, self.ranks, self.left, self.collectives = name, run, ranks, dict(left), collectives
        self.given, self.check_inputs, self.new = list(given), check_inputs, True
        self.kind = hashlib.sha256(repr((collectives, given)).encode()).hexdigest()

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        with self.ranks.guarded(self.name):
            self.ranks.agree(self, [inputs[i] for i in self.given])
            inputs[:] = [i.local if isinstance(i, ShardedTensor) else i for i in inputs]
            outputs = self.run(inputs)
        return tuple(ShardedTensor(_dense(o), self.left[i]) if i in self.left else o for i, o in enumerate(outputs))


def _dense(local: torch.Tensor) -> torch.Tensor:
    """Without gaps in memory: strides that tell of what a piece was cut from are no reason for the next block's compile."""
    return local if local.is_contiguous() or is_dense(local) else local.contiguous()
