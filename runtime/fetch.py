"""`fetch`: the one primitive that moves a tensor between ranks, from any partition of a dimension to any set of intervals.

It is plain traceable torch, at most one collective in it, so that Inductor fuses the packing and the assembly with what is
around them. Which rows go where is `fetch_plan`'s subject; this file packs, sends and assembles them.

    pack      the rows for rank 0, those for rank 1, ... laid end to end, the fetched dimension outermost: one copy
    send      one `all_to_all_single` with uneven splits, or one all-gather where every rank needs everything
    assemble  own rows, received rows and zeros, concatenated: one copy
"""

from __future__ import annotations

import math

import torch
import torch.distributed._functional_collectives  # marks `wait_tensor` as an effect, which no one removes as dead code

from pvae.runtime.fetch_plan import Bounds, Fill, Intervals, Part, fetch_plan

__all__ = ["fetch", "fetched_like"]


# Private names of torch ------------------------------------------------------------------------------------------------


def _all_to_all(rows: torch.Tensor, receive: tuple[int, ...], send: tuple[int, ...], group: str | None) -> torch.Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(rows, list(receive), list(send), group))


def _all_gather(rows: torch.Tensor, world: int, group: str | None) -> torch.Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(rows, world, group))


# -----------------------------------------------------------------------------------------------------------------------


@torch.compiler.allow_in_graph  # Dynamo need not follow the plan: AOT and make_fx trace the tensor part of it
def fetch(
    x: torch.Tensor,
    dim: int,
    have: Bounds,
    need: Intervals,
    rank: int = 0,
    fill: Fill = "zeros",
    group: str | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """Rows `need[rank]` of dimension `dim`, of which this rank holds rows `[have[rank], have[rank + 1])`, which is `x`.

    Args:
        x: this rank's piece, of any dtype (complex too) and any memory format.
        have: global bounds `0, b1, ..., size` of the pieces, which may be uneven or empty; one more than there are ranks.
        need: `[start, stop)` of each rank in global rows; they may overlap, be empty, and leave `[0, size)`.
        rank: this process's rank in the group. An argument, so that the graph of any rank can be made anywhere.
        fill: what stands outside `[0, size)`: zeros, or as `torch.nn.functional.pad` means replicate, reflect, circular.
        group: name of the process group; None for a world of one.
        channels_last: the memory format of the result and of what is sent (for four and more dimensions). An argument and
            not read from `x`, whose strides say nothing where it is thin or empty: all ranks must pass the same.

    Returns the rows, dense in that memory format; where they are a part of `x` and no more, a view of it.
    Every rank of the group must call it with the same arguments but `x`, whatever it holds or needs.

    Raises ValueError if `x` is not the piece that `have` says, or if a need cannot be filled (see `fetch_plan`).
    """
    plan, world = fetch_plan(tuple(have), tuple((start, stop) for start, stop in need), fill), len(need)
    if group is None and world > 1 and plan.kind != "local":
        raise ValueError(f"{world} ranks exchange rows: name their process group")
    dim = range(x.dim())[dim]
    if x.shape[dim] != have[rank + 1] - have[rank]:
        raise ValueError(
            f"dimension {dim} of {tuple(x.shape)} has {x.shape[dim]} rows; "
            f"rank {rank} of {have} holds {have[rank + 1] - have[rank]}"
        )
    mine = plan.ranks[rank]

    # From here on as (outer, rows, inner) of physical memory, with the wanted memory format for the contiguous one. Not as
    # they are: with four dimensions both eager and Inductor take a one-row message for channels-last along the rows.
    order = list(range(x.dim()))
    if channels_last and x.dim() >= 4:
        order = [0, *order[2:], 1]
    if is_complex := x.is_complex():  # neither NCCL nor Inductor knows them: as real numbers in pairs, inside all else
        order.append(x.dim())
        x = torch.view_as_real(x.resolve_conj())
    axis = order.index(dim)
    outer, inner = [x.shape[d] for d in order[:axis]], [x.shape[d] for d in order[axis + 1 :]]
    own = x.permute(order).reshape(math.prod(outer), x.shape[dim], math.prod(inner))

    received, nothing = own, own.narrow(1, 0, 0)
    if plan.kind == "exchange":
        sent = [own.narrow(1, start, stop - start) for rows in mine.send for start, stop in rows]
        packed = torch.cat([rows.transpose(0, 1) for rows in sent or [nothing]])
        received = _all_to_all(packed, mine.receive_splits, mine.send_splits, group).transpose(0, 1)
    elif plan.kind == "gather":
        rows = own.transpose(0, 1)
        if missing := plan.longest - (have[rank + 1] - have[rank]):
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        received = _all_gather(rows.contiguous(), world, group).transpose(0, 1)

    parts = [_part(part, own, received) for part in mine.parts]
    if len(parts) != 1:
        result = torch.cat(parts or [nothing], dim=1)
    elif plan.kind == "local":
        result = parts[0]
    else:
        result = parts[0].contiguous()
    inverse = [order.index(d) for d in range(x.dim())]
    result = result.reshape(*outer, result.shape[1], *inner).permute(inverse)
    return torch.view_as_complex(result) if is_complex else result


def fetched_like(
    x: torch.Tensor,
    dim: int,
    have: Bounds,
    need: Intervals,
    rank: int = 0,
    fill: Fill = "zeros",
    group: str | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """What `fetch` returns, without values: its fake, for where running it on fake tensors takes too long."""
    mine = fetch_plan(tuple(have), tuple((start, stop) for start, stop in need), fill).ranks[rank]
    if len(mine.parts) == 1 and mine.parts[0].origin == "own" and not any(map(len, mine.send)):
        return fetch(x, dim, have, need, rank, fill, group, channels_last)  # perhaps a view
    dim = range(x.dim())[dim]
    shape = list(x.shape)
    if shape[dim] != have[rank + 1] - have[rank]:
        raise ValueError(f"dimension {dim} of {shape} has {shape[dim]} rows; rank {rank} of {have} holds others")
    shape[dim] = need[rank][1] - need[rank][0]
    if not channels_last or x.dim() < 4:
        return x.new_empty(shape)
    order = [0, *range(2, x.dim()), 1]
    return x.new_empty([shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])


def _part(part: Part, own: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    length = part.stop - part.start
    if part.origin == "zeros":
        return own.new_zeros(own.shape[0], length, own.shape[2])
    rows = (received if part.origin == "received" else own).narrow(1, part.start, length)
    if part.repeat > 1:
        return rows.expand(-1, part.repeat, -1)
    return rows.flip(1) if part.flip else rows
