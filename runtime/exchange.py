"""`exchange`: tensors of attention from any boxes of heads x tokens to any others, all of them in one all-to-all.

Head exchange (Ulysses, arXiv 2309.14509) is its plainest use: rank r has its tokens of all heads of q, k, v and needs all
tokens of its heads; the way back is the same with `have` and `need` swapped. Only some of the ranks' heads, keys of more
tokens than queries, grouped queries: other boxes.

    pack      the message to rank 0, that to rank 1, ... end to end
    send      one `all_to_all_single` with uneven splits
    assemble  views of what arrived where that is in order, else one copy

Tensors of the same batch, tokens and inner size are a bundle and travel together, as `[tokens][batch][heads of each][inner]`.
With tokens outermost, what arrives from all ranks for some heads is one dense array however the tokens were split, and the
way back sends a result of that layout as it is. Like `fetch` it is plain traceable torch, which Inductor fuses with what
is around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives  # marks `wait_tensor` as an effect, which no one removes as dead code
from torch import Tensor

__all__ = [
    "Box",
    "Boxes",
    "Interval",
    "Movement",
    "area",
    "exchange",
    "exchanged_like",
    "is_local",
    "movement",
    "overlap",
    "whole_of",
]

Interval = tuple[int, int]
Box = tuple[Interval, Interval]  # heads, tokens
Boxes = tuple[tuple[Box, ...], ...]  # of each tensor, of each rank


# Private names of torch ------------------------------------------------------------------------------------------------


def _all_to_all(flat: Tensor, receive: list[int], send: list[int], group: str | None) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(flat.contiguous(), receive, send, group))


# -----------------------------------------------------------------------------------------------------------------------


@torch.compiler.allow_in_graph  # Dynamo need not follow the plan: AOT and make_fx trace the tensor part of it
def exchange(xs: Sequence[Tensor], have: Boxes, need: Boxes, rank: int = 0, group: str | None = None) -> list[Tensor]:
    """The boxes `need[i][rank]` of tensors of which this rank holds the boxes `have[i][rank]`, which are `xs`.

    Args:
        xs: `[batch, heads, tokens, inner]` each, of any strides and one dtype; batch and inner may differ between them.
        have: for each tensor and rank `((first head, last + 1), (first token, last + 1))`; those of a tensor tile it.
        need: likewise; they may overlap, leave parts out and be empty.
        rank: this process's rank in the group. An argument, so that the graph of any rank can be made anywhere.
        group: name of the process group; None for a world of one.

    Returns `[batch, heads, tokens, inner]` each, with the inner dimension dense and else of any strides, perhaps views of
    one buffer; slices of `xs` where no rank needs what another holds. Every rank of the group must call it with the same
    arguments but `xs` and `rank`.

    Raises ValueError if an x is not the box that `have` says, or boxes do not tile a tensor or leave it.
    """
    have, need = _boxes(have), _boxes(need)
    _check(have, need, rank)
    _check_tensors(xs, have, rank)
    if is_local(have, need):
        return [_cut(x, held[rank], wanted[rank]) for x, held, wanted in zip(xs, have, need, strict=True)]
    if group is None:
        raise ValueError(f"{len(have[0])} ranks exchange boxes: name their process group")
    if xs[0].is_complex():  # neither NCCL nor Inductor knows them
        got = exchange([torch.view_as_real(x.resolve_conj()).flatten(3) for x in xs], have, need, rank, group)
        return [torch.view_as_complex(y.unflatten(3, (-1, 2))) for y in got]

    plan = _plan(have, need, rank, _bundles(xs, have, need))
    flat = [x.permute(2, 0, 1, 3) for x in xs]  # as they travel
    world = range(len(have[0]))
    routes = [(route, xs[route.tensors[0]].shape[0] * xs[route.tensors[0]].shape[3]) for route in plan.routes]
    send = [sum(route.send[p].size * unit for route, unit in routes) for p in world]
    arriving = [[route.receive[p].size * unit for route, unit in routes] for p in world]
    received = _all_to_all(_packed(plan, flat), list(map(sum, arriving)), send, group)
    messages = received.split([size for sizes in arriving for size in sizes])

    results: list[Tensor] = list(xs)
    for index, route in enumerate(plan.routes):
        x = xs[route.tensors[0]]
        batch, tokens, rows, inner = x.shape[0], _length(route.need.tokens), route.need.rows, x.shape[3]
        if plan.in_order:
            whole = received.view(tokens, batch, rows, inner).permute(1, 2, 0, 3)
        else:
            blocks = [
                message.view(_length(block.tokens), batch, block.rows * inner).transpose(0, 1)
                for message, block in zip(messages[index :: len(plan.routes)], route.receive, strict=True)
            ]
            if not plan.through and route.own.size:
                blocks[rank] = _message(route, flat, route.own).flatten(2).transpose(0, 1)
            whole = _assembled(route, blocks, x.new_empty(batch, tokens, 0), inner)
            whole = whole.view(batch, tokens, rows, inner).transpose(1, 2)
        _hand_out(route, whole, results)
    return results


def exchanged_like(
    xs: Sequence[Tensor], have: Boxes, need: Boxes, rank: int = 0, group: str | None = None
) -> list[Tensor]:
    """What `exchange` returns, without values: its fake, for where running it on fake tensors takes too long."""
    have, need = _boxes(have), _boxes(need)
    _check(have, need, rank)
    if is_local(have, need) or group is None:
        return exchange(xs, have, need, rank, group)
    _check_tensors(xs, have, rank)
    plan = _plan(have, need, rank, _bundles(xs, have, need))
    results: list[Tensor] = list(xs)
    for route in plan.routes:
        x = xs[route.tensors[0]]
        batch, tokens, rows, inner = x.shape[0], _length(route.need.tokens), route.need.rows, x.shape[3]
        if plan.in_order:
            whole = x.new_empty(tokens, batch, rows, inner).permute(1, 2, 0, 3)
        else:
            whole = x.new_empty(batch, tokens, rows, inner).permute(0, 2, 1, 3)
        _hand_out(route, whole, results)
    return results


@dataclass(frozen=True)
class Movement:
    """What an exchange moves on one rank. `packs`, `assembles`: whether there is a copy before what is sent, and after."""

    sent: int  # bytes, to other ranks
    received: int  # bytes, from other ranks
    messages: int  # to other ranks
    packs: bool
    assembles: bool


def movement(xs: Sequence[Tensor], have: Boxes, need: Boxes, rank: int = 0) -> Movement:
    """What `exchange` of these arguments moves; `xs` may be fakes."""
    have, need = _boxes(have), _boxes(need)
    if is_local(have, need):
        return Movement(0, 0, 0, False, False)
    sent, received = [0] * len(have[0]), 0
    for x, held, wanted in zip(xs, have, need, strict=True):
        place = x.shape[0] * x.shape[3] * x.element_size()
        for r in range(len(held)):
            if r != rank:
                sent[r] += area(overlap(held[rank], wanted[r])) * place
                received += area(overlap(held[r], wanted[rank])) * place
    plan = _plan(have, need, rank, _bundles(xs, have, need))
    view = len(xs) == 1 and len(_merged(plan.routes[0].send)) == 1 and xs[0].permute(2, 0, 1, 3).is_contiguous()
    return Movement(sum(sent), received, sum(map(bool, sent)), any(sent) and not view, not plan.in_order)


def overlap(one: Box, other: Box) -> Box:
    """What two boxes share; the box of nothing if they share nothing."""
    (a, b), (c, d) = ((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(one, other, strict=True))
    return ((a, b), (c, d)) if a < b and c < d else ((0, 0), (0, 0))


@lru_cache(maxsize=4096)
def is_local(have: Boxes, need: Boxes) -> bool:
    """Whether nothing moves: no rank needs what another holds."""
    return all(
        area(overlap(held[p], wanted[r])) == 0
        for held, wanted in zip(have, need, strict=True)
        for p in range(len(held))
        for r in range(len(held))
        if p != r
    )


def whole_of(held: Sequence[Box]) -> Box:
    """All heads and tokens of a tensor that ranks hold in boxes."""
    full = [box for box in held if area(box)]
    return ((0, max((box[0][1] for box in full), default=0)), (0, max((box[1][1] for box in full), default=0)))


def area(box: Box) -> int:
    """Heads times tokens."""
    return _length(box[0]) * _length(box[1])


# Plan ------------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """A part of a bundle: some tokens, the same of each tensor, and some heads of each."""

    tokens: Interval
    heads: tuple[Interval, ...]

    @property
    def rows(self) -> int:
        """Heads of all tensors."""
        return sum(map(_length, self.heads))

    @property
    def size(self) -> int:
        return _length(self.tokens) * self.rows


class _Piece(NamedTuple):
    """Rows `[start, stop)` and tokens `[first, last)`, both local, of the block that a rank got from `source`."""

    source: int
    tokens: Interval
    rows: Interval


@dataclass(frozen=True)
class _Route:
    """A bundle on one rank: what it sends to each rank and receives from each, in global indices.

    `own` is what it holds and needs itself. The result is the pieces of a band side by side along the rows, and the bands
    one after the other along the tokens.
    """

    tensors: tuple[int, ...]
    held: _Block
    need: _Block
    own: _Block
    send: tuple[_Block, ...]
    receive: tuple[_Block, ...]
    bands: tuple[tuple[_Piece, ...], ...]


@dataclass(frozen=True)
class _Plan:
    """One rank's side of an exchange.

    through    this rank's own part is a message too, to itself: packing or what arrives is in order only with it
    in_order   what arrives is the result
    shares     what is sent is equal shares of heads of the same tokens: so many, or 0 where it is not
    times      how often they are sent: the first share to the ranks 0, shares, 2 * shares, ... of those that get any
    """

    routes: tuple[_Route, ...]
    through: bool
    in_order: bool
    shares: int
    times: int


def _bundles(xs: Sequence[Tensor], have: Boxes, need: Boxes) -> tuple[tuple[int, ...], ...]:
    """The tensors that travel together: those of the same batch, tokens on every rank and inner size."""
    bundles: list[list[int]] = []
    for i, x in enumerate(xs):
        for bundle in bundles:
            j = bundle[0]
            tokens = [[box[1] for box in (*have[k], *need[k])] for k in (i, j)]
            if tokens[0] == tokens[1] and x.shape[0] == xs[j].shape[0] and x.shape[3] == xs[j].shape[3]:
                bundle.append(i)
                break
        else:
            bundles.append([i])
    return tuple(map(tuple, bundles))


@lru_cache(maxsize=4096)
def _plan(have: Boxes, need: Boxes, rank: int, bundles: tuple[tuple[int, ...], ...]) -> _Plan:
    routes = [_route(bundle, have, need, rank) for bundle in bundles]
    alone = len(routes) == 1
    in_order = alone and _in_order(routes[0])
    shares, times = _shares(routes[0].send)
    if not alone and any(len(route.send) != shares or _shares(route.send) != (shares, 1) for route in routes):
        shares = 0  # messages of several bundles alternate
    through = bool(in_order or shares or (alone and len(_merged(routes[0].send)) == 1))
    if not through:
        nothing = _Block((0, 0), ((0, 0),))
        routes = [
            replace(
                route,
                send=tuple(nothing if p == rank else block for p, block in enumerate(route.send)),
                receive=tuple(nothing if p == rank else block for p, block in enumerate(route.receive)),
            )
            for route in routes
        ]
    return _Plan(tuple(routes), through, in_order, shares, times)


def _route(bundle: tuple[int, ...], have: Boxes, need: Boxes, rank: int) -> _Route:
    def block(boxes: Sequence[Box]) -> _Block:
        tokens = next((tokens for _, tokens in boxes if _length(tokens)), boxes[0][1])
        return _Block(tokens, tuple(heads for heads, _ in boxes))

    def between(source: int, target: int) -> _Block:
        return block([overlap(have[i][source], need[i][target]) for i in bundle])

    world = range(len(have[0]))
    receive = tuple(between(p, rank) for p in world)
    wanted = block([need[i][rank] for i in bundle])
    return _Route(
        bundle,
        block([have[i][rank] for i in bundle]),
        wanted,
        receive[rank],
        tuple(between(rank, p) for p in world),
        receive,
        tuple(_bands(wanted, receive)),
    )


def _bands(need: _Block, receive: Sequence[_Block]) -> Iterator[tuple[_Piece, ...]]:
    """The result in bands of tokens, each made of whole rows of what came from one rank after another."""
    if not need.size:
        return
    cuts = sorted({cut for block in receive if block.size for cut in block.tokens})
    for first, last in pairwise(cuts):
        here = [p for p, b in enumerate(receive) if b.size and b.tokens[0] <= first and last <= b.tokens[1]]
        band: list[_Piece] = []
        for i in range(len(need.heads)):
            for p in sorted((p for p in here if _length(receive[p].heads[i])), key=lambda p: receive[p].heads[i]):
                block = receive[p]
                start = sum(map(_length, block.heads[:i]))
                stop = start + _length(block.heads[i])
                if band and band[-1].source == p:  # the tensor before this one stands next to it in the message too
                    start = band.pop().rows[0]
                band.append(_Piece(p, (first - block.tokens[0], last - block.tokens[0]), (start, stop)))
        yield tuple(band)


def _in_order(route: _Route) -> bool:
    """Whether the messages, end to end, are the result: tokens in order, and so all the needed heads in each."""
    blocks = [block for block in route.receive if block.size]
    return all(a.tokens[1] == b.tokens[0] for a, b in pairwise(blocks))


def _merged(blocks: Sequence[_Block]) -> list[_Block]:
    """Blocks that are sent one after the other, as fewer: those of the same heads whose tokens follow."""
    merged: list[_Block] = []
    for block in blocks:
        if not block.size:
            continue
        if merged and merged[-1].heads == block.heads and merged[-1].tokens[1] == block.tokens[0]:
            block = _Block((merged.pop().tokens[0], block.tokens[1]), block.heads)
        merged.append(block)
    return merged


def _shares(blocks: Sequence[_Block]) -> tuple[int, int]:
    """Of how many equal shares of heads, one after the other, the blocks that are sent are made, and how often; or (0, 0)."""
    sent = [block for block in blocks if block.size]
    if not sent:
        return 0, 0
    shares = next((n for n in range(1, len(sent)) if sent[n] == sent[0]), len(sent))
    times, rest = divmod(len(sent), shares)
    first = sent[:shares]
    even = all(block.tokens == first[0].tokens for block in first) and all(
        a[1] == b[0] and _length(a) == _length(b)
        for one, other in pairwise(first)
        for a, b in zip(one.heads, other.heads, strict=True)
    )
    return (shares, times) if even and not rest and sent == first * times else (0, 0)


# Tensors ---------------------------------------------------------------------------------------------------------------


def _message(route: _Route, flat: Sequence[Tensor], block: _Block) -> Tensor:
    """A block of what this rank holds, `[tokens, batch, rows, inner]`."""
    parts = [
        flat[i]
        .narrow(0, block.tokens[0] - route.held.tokens[0], _length(block.tokens))
        .narrow(2, h[0] - held[0], _length(h))
        for i, held, h in zip(route.tensors, route.held.heads, block.heads, strict=True)
        if _length(h)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _packed(plan: _Plan, flat: Sequence[Tensor]) -> Tensor:
    """All messages end to end, 1-D."""
    world = range(len(plan.routes[0].send))
    if plan.shares:
        shares = [_in_shares(route, flat, plan.shares) for route in plan.routes]
        packed = shares[0] if len(shares) == 1 else torch.cat([share.flatten(1) for share in shares], 1)
        return packed.expand(plan.times, *packed.shape).reshape(-1)
    if len(plan.routes) == 1:
        ordered = [(plan.routes[0], block) for block in _merged(plan.routes[0].send)]
    else:
        ordered = [(route, route.send[p]) for p in world for route in plan.routes if route.send[p].size]
    messages = [_message(route, flat, block).reshape(-1) for route, block in ordered]
    if not messages:
        return flat[0].new_empty(0)
    return messages[0] if len(messages) == 1 else torch.cat(messages)


def _in_shares(route: _Route, flat: Sequence[Tensor], shares: int) -> Tensor:
    """Messages of equal shares of heads, `[shares, tokens, batch, rows, inner]`: a tensor is cut by no more than a view."""
    block = next(block for block in route.send if block.size)
    first, parts = block.tokens[0] - route.held.tokens[0], []
    for i, held, (start, stop) in zip(route.tensors, route.held.heads, block.heads, strict=True):
        if stop > start:
            x = flat[i].narrow(0, first, _length(block.tokens))
            heads = x.narrow(2, start - held[0], shares * (stop - start)).unflatten(2, (shares, stop - start))
            parts.append(heads.permute(2, 0, 1, 3, 4))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


def _assembled(route: _Route, blocks: Sequence[Tensor], nothing: Tensor, inner: int) -> Tensor:
    """The result, dense `[batch, tokens, rows * inner]`: with three dimensions `cat` has only one layout to choose."""
    bands = []
    for band in route.bands:
        pieces = [
            blocks[p].narrow(1, first, last - first).narrow(2, start * inner, (stop - start) * inner)
            for p, (first, last), (start, stop) in band
        ]
        bands.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2))
    if not bands:
        return nothing
    return bands[0].contiguous() if len(bands) == 1 else torch.cat(bands, 1)


def _hand_out(route: _Route, whole: Tensor, results: list[Tensor]) -> None:
    """Each tensor's heads of a bundle `[batch, rows, tokens, inner]`."""
    parts = whole.split([_length(heads) for heads in route.need.heads], 1) if len(route.tensors) > 1 else (whole,)
    for i, part in zip(route.tensors, parts, strict=True):
        results[i] = part


def _cut(x: Tensor, held: Box, wanted: Box) -> Tensor:
    """A view of a box, of which this rank holds more."""
    heads, tokens = map(_length, wanted)
    if not heads * tokens:
        return x.new_empty(x.shape[0], heads, tokens, x.shape[3])
    return x.narrow(1, wanted[0][0] - held[0][0], heads).narrow(2, wanted[1][0] - held[1][0], tokens)


# Checks ----------------------------------------------------------------------------------------------------------------


def _length(interval: Interval) -> int:
    return interval[1] - interval[0]


def _boxes(boxes: Boxes) -> Boxes:
    return tuple(tuple(((h[0], h[1]), (t[0], t[1])) for h, t in ranks) for ranks in boxes)


@lru_cache(maxsize=4096)
def _check(have: Boxes, need: Boxes, rank: int) -> None:
    world = len(have[0]) if have else 0
    if not have or len(need) != len(have) or any(len(boxes) != world for boxes in (*have, *need)):
        raise ValueError(f"have and need are boxes of each tensor, and of each of as many ranks: {have}, {need}")
    if not 0 <= rank < world:
        raise ValueError(f"there are boxes of {world} ranks; rank must be 0 to {world - 1}, not {rank}")
    for i, (held, wanted) in enumerate(zip(have, need, strict=True)):
        if any(a < 0 or a > b for box in (*held, *wanted) for a, b in box):
            raise ValueError(f"tensor {i}: an interval is (first, last + 1), both at least 0: {held}, {wanted}")
        grid = whole_of(held)
        shared = sum(area(overlap(a, b)) for a, b in combinations(held, 2))
        if shared or sum(map(area, held)) != area(grid):
            raise ValueError(f"tensor {i}: what ranks hold must tile {grid} (heads, tokens), each place once: {held}")
        if any(area(box) and overlap(box, grid) != box for box in wanted):
            raise ValueError(f"tensor {i}: what ranks need must lie within {grid} (heads, tokens): {wanted}")


def _check_tensors(xs: Sequence[Tensor], have: Boxes, rank: int) -> None:
    if len(xs) != len(have):
        raise ValueError(f"{len(xs)} tensors, and boxes of {len(have)}")
    if len({x.dtype for x in xs}) > 1:
        raise ValueError(f"tensors that travel together must have one dtype, not {[x.dtype for x in xs]}")
    for i, (x, held) in enumerate(zip(xs, have, strict=True)):
        expected = tuple(map(_length, held[rank]))
        if x.dim() != 4 or tuple(x.shape[1:3]) != expected:
            raise ValueError(
                f"tensor {i} is {tuple(x.shape)}; rank {rank} holds {held[rank]} (heads, tokens), that is "
                f"[batch, {expected[0]}, {expected[1]}, inner]"
            )
