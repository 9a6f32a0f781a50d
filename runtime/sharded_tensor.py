"""`ShardedTensor`: this rank's piece of a tensor, in the clothes of the whole one (DESIGN section 5).

What a compiled graph may leave sharded between calls, such as a causal decoder's caches, leaves it so. Dynamo sees the
global shape, and the backend takes `local` out again. All others see an ordinary tensor: any eager operation gathers
first and returns plain tensors. That is right everywhere, and a collective: every rank must do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from pvae.runtime.fetch import fetch
from pvae.runtime.torch_compat import wrapper_tensor

__all__ = ["Piece", "ShardedTensor"]

# What torch itself and `copy.deepcopy` do to a tensor that they only pass on: piece by piece, no rank waits for another.
_PIECEWISE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


@dataclass(frozen=True)
class Piece:
    """How one dimension of a tensor is split over one axis of the mesh.

    Attributes:
        bounds: global partition `0, b1, ..., size`, one more than there are ranks; pieces may be uneven or empty.
        held: `[start, stop)` of each rank in global rows: its part of the partition, or that and context around it.
        group: name of the process group; None for a world of one.
        rank: this process's in the group.
    """

    dim: int
    bounds: tuple[int, ...]
    held: tuple[tuple[int, int], ...]
    group: str | None
    rank: int

    @property
    def own(self) -> tuple[int, int]:
        """This rank's part of the partition."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]


class ShardedTensor(torch.Tensor):
    """A tensor of which this rank has `local`. Shape and strides are the whole tensor's, dtype and device are `local`'s.

    Args:
        local: what this rank holds; dense or not, possibly without rows.
        pieces: how it is split, at most one piece a dimension. They differ between ranks in `rank` alone.
        channels_last: the memory format that the whole tensor has, of four or five dimensions. An argument because the
            strides of a thin or empty `local` do not say it: all ranks must pass the same.

    Raises ValueError if `local` is not what `pieces` say, or requires grad.
    It cannot be written to or pickled: `whole()` makes a plain tensor of it. Its views are views of a copy.
    """

    local: torch.Tensor
    pieces: tuple[Piece, ...]
    channels_last: bool

    def __new__(cls, local: torch.Tensor, pieces: Sequence[Piece], channels_last: bool = False) -> ShardedTensor:
        pieces = tuple(pieces)
        _check(local, pieces, channels_last)
        shape = list(local.shape)
        for piece in pieces:
            shape[piece.dim] = piece.bounds[-1]
        return cls._wrap(local, pieces, channels_last, shape, _dense_strides(shape, channels_last))

    @classmethod
    def _wrap(
        cls,
        local: torch.Tensor,
        pieces: tuple[Piece, ...],
        channels_last: bool,
        shape: Sequence[int],
        strides: Sequence[int],
    ) -> ShardedTensor:
        self = wrapper_tensor(cls, shape, strides, local)
        self.local, self.pieces, self.channels_last = local, pieces, channels_last
        return self

    @torch.compiler.disable  # a backend is not to compile what it is made of
    def whole(self) -> torch.Tensor:
        """The whole tensor, plain, dense in its memory format, in memory of its own. A collective: every rank must call it.

        Of a fake ShardedTensor it is a plain fake, and communicates nothing.
        """
        x = self.local
        for piece in self.pieces:  # the context first: it need not travel
            start, stop = piece.own
            x = x.narrow(piece.dim, start - piece.held[piece.rank][0], stop - start)
        for piece in self.pieces:
            everything = ((0, piece.bounds[-1]),) * len(piece.held)
            x = fetch(
                x, piece.dim, piece.bounds, everything, piece.rank, group=piece.group, channels_last=self.channels_last
            )
        memory_format = torch.contiguous_format
        if self.channels_last:
            memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if all(piece.own == (0, piece.bounds[-1]) for piece in self.pieces):  # nothing was received: still a view
            x = x.clone(memory_format=memory_format)
        else:
            x = x.contiguous(memory_format=memory_format)
        # Where a size is one, any stride is as good to torch. Ranks that trace with it must see the same.
        return x.as_strided(x.shape, _dense_strides(x.shape, self.channels_last))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        bounds = {piece.dim: piece.bounds for piece in self.pieces}
        return (
            f"ShardedTensor(shape={tuple(self.shape)}, local={tuple(self.local.shape)}, bounds={bounds}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    # These look at memory without asking the dispatcher.

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole().numpy(force=force)

    def tolist(self) -> Any:
        return self.whole().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        return self.whole().__dlpack__(**options)

    def share_memory_(self) -> NoReturn:
        raise _write_error("share_memory_")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise _write_error("an assignment to elements")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a ShardedTensor is one rank's piece and cannot be saved: save its whole(), called on every rank"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[tuple[Piece, ...], bool]]:
        return ["local"], (self.pieces, self.channels_last)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor],
        context: tuple[tuple[Piece, ...], bool],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> ShardedTensor:
        return ShardedTensor._wrap(inner["local"], *context, outer_size, outer_stride)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PIECEWISE and not kwargs:
            (x,) = args
            return cls._wrap(func(x.local), x.pieces, x.channels_last, x.shape, x.stride())
        if any(isinstance(x, cls) for x in _written(func, args, kwargs)):
            raise _write_error(str(func))
        # Under inference mode a view of a normal tensor is a normal one: torch insists on that for `func`'s result.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            args, kwargs = tree_map_only(cls, cls.whole, (args, dict(kwargs)))
        return func(*args, **kwargs)


def _write_error(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} writes to a ShardedTensor, of which each rank has a piece only: "
        "write to its whole(), called on every rank, or to a new tensor"
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors that an operator writes to. The schemas of `torch.distributed` do not say it: all of them."""
    found: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if func.namespace == "c10d" or (argument.alias_info is not None and argument.alias_info.is_write):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return found


def _dense_strides(shape: Sequence[int], channels_last: bool) -> list[int]:
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return strides


def _check(local: torch.Tensor, pieces: tuple[Piece, ...], channels_last: bool) -> None:
    if local.requires_grad:
        raise ValueError("a ShardedTensor is for inference and local requires grad: make it under torch.no_grad()")
    if channels_last and local.dim() not in (4, 5):
        raise ValueError(f"channels_last is for four or five dimensions; local has {local.dim()}")
    dims = [piece.dim for piece in pieces]
    if len(set(dims)) < len(dims) or any(dim not in range(local.dim()) for dim in dims):
        raise ValueError(f"pieces split dimensions {dims} of {local.dim()}: each may be split once, counted from 0")
    for piece in pieces:
        own = list(pairwise(piece.bounds))
        if len(piece.held) != len(own) or piece.rank not in range(len(own)):
            raise ValueError(f"{piece} is not of one world: it needs one held interval a rank, and one bound more")
        if any(start > lo or stop < hi for (start, stop), (lo, hi) in zip(piece.held, own, strict=True)):
            raise ValueError(f"{piece}: a rank does not hold its part of the partition")
        start, stop = piece.held[piece.rank]
        if local.shape[piece.dim] != stop - start:
            raise ValueError(
                f"dimension {piece.dim} of {tuple(local.shape)} has {local.shape[piece.dim]} rows; "
                f"rank {piece.rank} holds {stop - start} by {piece}"
            )
