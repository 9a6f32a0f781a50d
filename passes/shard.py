"""Shards a graph over a mesh: the picture plane or the tokens are split over ranks, and what an op reads beyond its piece
is fetched.

This is one algebra (DESIGN section 4): `placement.py` says where values lie, `sharder.py` walks the graph, the rules of ops
are in `shard_views.py`, `shard_windows.py`, `shard_sums.py`, `shard_attention.py` and `shard_index.py`. This file decides
what is split at the start and what is gathered at the end.

    halo      exact: what lies beyond a piece is fetched where an op reads it
    patch     approximate: each rank gets its piece of the inputs with some context around it, computes that as if it were
              the whole picture, and crops
    sequence  exact: the tokens of a diffusion transformer (`sequence.py`)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log2
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.passes import shard_attention, shard_index, shard_sums, shard_views, shard_windows
from pvae.passes.demand_order import in_demand_order
from pvae.passes.ir import Builder, is_tensor, output_node, placeholders, static, value
from pvae.passes.machine import machine_named
from pvae.passes.placement import Bounds, Factor, Placement, even, spanning
from pvae.passes.rule import Context, Pass, Record, Report
from pvae.passes.sequence import NO_TOKENS, token_cuts
from pvae.passes.sharder import Sharder, ShardError
from pvae.runtime.exchange import exchange, is_local
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import fetch_plan
from pvae.runtime.mesh import Mesh
from pvae.runtime.sharded_tensor import Piece

RULES = (shard_views, shard_windows, shard_sums, shard_attention, shard_index)  # they register themselves
NO_PICTURE = "no input is a picture [N, C, H, W] or [N, C, T, H, W]"


def spatial_inputs(graph: Graph, weights: frozenset[str]) -> list[Node]:
    """The inputs with a picture plane: `[N, C, H, W]` and `[N, C, T, H, W]`, weights excepted."""
    found = [n for n in placeholders(graph) if n.name not in weights and is_tensor(n)]
    return [n for n in found if value(n).dim() in (4, 5) and min(value(n).shape[-2:]) > 1]


def _stride(graph: Graph, main: Node, dim: int) -> int:
    """Rows of the first picture that become one of the first result (an encoder's); 1 where the result has no fewer."""
    size = value(main).shape[dim]
    outputs = [n for n in torch.utils._pytree.tree_leaves(output_node(graph).args) if isinstance(n, Node)]
    planes = [value(n).shape[dim] for n in outputs if is_tensor(n) and value(n).dim() in (4, 5)]
    if not planes or not 0 < planes[0] < size:
        return 1
    return 2 ** round(log2(size / planes[0]))  # sizes that the stride does not divide lose or gain a row


def _scaled(bounds: Bounds, size: int) -> Bounds:
    """`bounds` for a picture of the same plane at another size."""
    n = bounds[-1]
    return (0, *(b * size // n for b in bounds[1:-1]), size)


def _with_context(size: int, axis: int, bounds: Bounds, rows: int, stride: int) -> Factor:
    """A patch form's pieces. An empty one holds rows that it does not own."""
    around = [rows if lo < hi else max(rows, stride) for lo, hi in pairwise(bounds)]  # no op runs on no rows
    spans = [(max(lo - n, 0), min(hi + n, size)) for (lo, hi), n in zip(pairwise(bounds), around, strict=True)]
    return spanning(size, axis, bounds, spans)


def shard_graph(graph: Graph, context: Context, report: Report) -> None:
    """Rewrite `graph` in place to the local form of the rank at `context.mesh`."""
    mesh, options = context.mesh, context.options
    if mesh is None or options.shard in ("none", "tile"):
        return
    if max(mesh.shape) == 1:
        report.refusals.append(Record("shard", "mesh", "", "a world of one rank"))
        return
    forms = {"halo": _picture_cuts, "patch": _picture_cuts, "sequence": token_cuts}
    if options.shard not in forms:  # auto is decided before the pipeline runs
        raise ShardError(f"shard={options.shard!r} is not a form of a graph; the forms are {', '.join(forms)}")
    sequence = options.shard == "sequence"
    machine = machine_named(options.machine)
    sharder = Sharder(graph, mesh, report, patch=options.shard == "patch", sequence=sequence, machine=machine)
    if any(static(n) is None for node in placeholders(graph) if is_tensor(node) for n in value(node).shape):
        raise ShardError("sharding needs static sizes; compile with dynamic=False")
    cuts = forms[options.shard](graph, sharder, context)
    if not cuts and not context.held:
        report.refusals.append(Record("shard", "inputs", "", NO_TOKENS if sequence else NO_PICTURE))
        return
    for node, placement in cuts.items():
        _cut(sharder, node, placement)
    for node in placeholders(graph):
        if node.name in context.held:
            _enter(sharder, node, context.held[node.name])
    if not sharder.placed:
        return
    sharder.run()
    _leave(sharder, context)
    if sequence and not in_demand_order(graph):
        text = "its order means something (it writes inputs or draws random numbers): no exchange starts earlier"
        report.refusals.append(Record("demand_order", "graph", "", text))


def _picture_cuts(graph: Graph, sharder: Sharder, context: Context) -> dict[Node, Placement]:
    """The pictures among the inputs, split along rows, columns or both."""
    mesh, options = sharder.mesh, context.options
    planes = spatial_inputs(graph, context.weights)
    if not planes:
        return {}
    plane_dims = {"h": (-2,), "w": (-1,), "hw": (-2, -1)}[shard_dims(options.shard_dims, mesh)]
    ranks = dict(zip(plane_dims, mesh.shape, strict=True))
    strides = {d: _stride(graph, planes[0], d) for d in plane_dims}
    first = {d: even(value(planes[0]).shape[d], ranks[d], strides[d]) for d in strides}
    cuts = {}
    for node in planes:
        if node.name in context.held:
            continue
        placement = Placement.whole(value(node).shape)
        for axis, dim in enumerate(plane_dims):
            if mesh.shape[axis] == 1:
                continue
            size = value(node).shape[dim]
            bounds = first[dim] if node is planes[0] else _scaled(first[dim], size)
            factor = Factor(size, axis, bounds)
            if sharder.patch:
                scale = size / value(planes[0]).shape[dim]
                stride = max(1, int(strides[dim] * scale))
                factor = _with_context(size, axis, bounds, options.patch_context * stride, stride)
            placement = placement.with_dim(len(placement.dims) + dim, [factor])
        cuts[node] = placement
    return cuts


def shard_dims(choice: str, mesh: Mesh) -> str:
    """`h`, `w` or `hw` for what the options say; `auto` is rows on a mesh of one axis, else both."""
    name = choice if choice != "auto" else ("h" if len(mesh.shape) == 1 else "hw")
    if len(name) != len(mesh.shape):
        raise ShardError(
            f"shard_dims={choice!r} splits {len(name)} dimensions, the mesh {mesh.shape} has {len(mesh.shape)} axes"
        )
    return name


def _cut(sharder: Sharder, node: Node, placement: Placement) -> None:
    """This rank's piece of a value that every rank has whole."""
    users, anchor = list(node.users), node.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    sharder.build = Builder(anchor)
    cut = node
    for dim in range(placement.ndim):
        cut = sharder.recut(cut, dim, placement.dims[dim])
    for user in users:
        user.replace_input_with(node, cut)
    where = ", ".join(
        f"dimension {d} at {f.bounds}" for d, dim in enumerate(placement.dims) for f in dim if f.axis is not None
    )
    sharder.report.matches.append(Record("cut", node.name, "", f"split along {where}"))


def _enter(sharder: Sharder, node: Node, pieces: Sequence[Piece]) -> None:
    """An input that arrives as this rank's piece: from here on its meta is of that."""
    placement = Placement.whole(value(node).shape)
    for piece in pieces:
        axis = sharder.mesh.groups.index(piece.group)
        factor = spanning(piece.bounds[-1], axis, piece.bounds, piece.held)
        placement = placement.with_dim(piece.dim, [factor])
    val = value(node)
    local = node.meta.get("local")
    if local is None:
        with val.fake_mode:
            local = val.new_empty(placement.local(sharder.mesh.coordinates))
    node.meta["val"] = local
    sharder.place(node, placement)


def pieces_of(placement: Placement, mesh: Mesh) -> tuple[Piece, ...] | None:
    """The placement as a `ShardedTensor` has it, or None where a dimension is split within."""
    pieces = []
    for dim in range(placement.ndim):
        if not placement.splits(dim):
            continue
        factor = placement.one(dim)
        if factor is None or factor.axis is None:
            return None
        group, rank = mesh.groups[factor.axis], mesh.coordinates[factor.axis]
        pieces.append(Piece(dim, factor.bounds, factor.spans, group, rank))
    return tuple(pieces)


def _leave(sharder: Sharder, context: Context) -> None:
    """Outputs: whole, or left as this rank's piece where the context allows."""
    out = output_node(sharder.graph)
    sharder.build = Builder(out)
    leaves: list[Any] = list(out.args[0]) if isinstance(out.args[0], (tuple, list)) else [out.args[0]]
    for index, node in enumerate(leaves):
        if not isinstance(node, Node) or node not in sharder.placed:
            continue
        stays = index in context.free_strides or context.options.gather == "off"
        pieces = pieces_of(sharder.placed[node], sharder.mesh) if stays else None
        if pieces is None:
            leaves[index] = sharder.whole(node)
        else:
            context.left[index] = pieces
    out.args = (tuple(leaves),)


def collectives(graph: Graph) -> Iterator[str]:
    """What the graph asks of other ranks, in order, as texts that are equal on all of them."""
    for node in graph.nodes:
        if node.target is fetch:
            x, dim, have, need, _, fill, *rest = node.args
            if len(need) > 1 and fetch_plan(tuple(have), tuple(need), fill).kind != "local":
                yield f"fetch {value(x).dtype} dim {dim} of {have}: {need} {fill} {rest[1:]}"
        elif node.target is exchange and not is_local(*node.args[1:3]):
            xs, have, need, *_ = node.args
            kinds = [(value(x).dtype, value(x).shape[0], value(x).shape[3]) for x in xs]
            yield f"exchange {kinds} of {have}: {need}"


SHARD = Pass(
    name="shard",
    summary="split the picture plane or the tokens over ranks; fetch what an op reads beyond its piece",
    rules=lambda context, settings: [],
    before=shard_graph,
    exact="only rounding can differ (halo, sequence); approximate (patch)",
)

__all__ = ["SHARD", "ShardError", "collectives", "shard_dims", "shard_graph"]
