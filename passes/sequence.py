"""The sequence form: the tokens of a diffusion transformer are split over ranks (DESIGN section 4).

Every rank cuts its share where tokens come into being (`token_sources.py`): an input, or what a patch embedding makes of
one, which every rank computes whole. From there on the algebra does the rest: linear layers, norms and modulation are
local, rotary tables and masks are sliced where they meet split tokens, attention exchanges heads for tokens
(`shard_attention.py`), and what a model returns is gathered.

Text that is attended together with the picture is split as well. Text that only gives keys and values (cross attention) is
split where computing them on every rank would take longer than gathering them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from pvae.passes.ir import is_tensor, placeholders, value
from pvae.passes.placement import Factor, Placement, even
from pvae.passes.rule import Context
from pvae.passes.sharder import Sharder, ShardError
from pvae.passes.token_sources import TokenSource, token_sources

WAITING = 5  # a gather takes so many times what its bytes take (2.8 ms for six of 10 MB on four H200s): ranks wait
NO_TOKENS = "no attention over tokens of an input"


def token_cuts(graph: Graph, sharder: Sharder, context: Context) -> dict[Node, Placement]:
    """Where the nodes are to lie at which sharding begins: those that `shard_inputs` names, else those that are found.

    Raises ShardError for an input that there is not, or one that cannot be split so.
    """
    if context.options.shard_inputs is not None:
        return _named(graph, sharder, context)
    cuts = {}
    for source in token_sources(graph, context.weights):
        if source.node.name not in context.held and _worth_splitting(source, sharder):
            cuts[source.node] = _placed(sharder, source.node, source.dim)
    return {node: placement for node, placement in cuts.items() if not placement.is_whole}


def _worth_splitting(source: TokenSource, s: Sharder) -> bool:
    if "query" in source.feeds:
        return True
    world, machine = s.mesh.shape[-1], s.machine
    rate = machine.product_rate(value(source.node).dtype)
    saved = source.linear_flops * (1 - 1 / world) / rate
    return saved > WAITING * machine.gather_seconds(source.attended_bytes * (1 - 1 / world))


def _placed(s: Sharder, node: Node, dim: int) -> Placement:
    """Tokens split over the mesh's last axis, the batch over its first if it has two."""
    placement = _evenly(s, Placement.whole(value(node).shape), len(s.mesh.shape) - 1, dim)
    if len(s.mesh.shape) == 2 and dim != 0 and placement.shape[0] > 1:
        placement = _evenly(s, placement, 0, 0)
    if len(s.mesh.shape) == 2 and s.mesh.shape[0] > 1 and 0 not in placement.axes:
        raise ShardError(
            f"mesh={'x'.join(map(str, s.mesh.shape))} splits the batch over {s.mesh.shape[0]} ranks, and {node.name} has "
            f"a batch of {placement.shape[0]}: call the model with both branches of guidance in one batch, or use a mesh "
            "of one axis"
        )
    return placement


def _evenly(s: Sharder, placement: Placement, axis: int, dim: int) -> Placement:
    """With dimension `dim` split over an axis of the mesh, where that has several ranks."""
    size, ranks = placement.shape[dim], s.mesh.shape[axis]
    return placement if ranks == 1 else placement.with_dim(dim, [Factor(size, axis, even(size, ranks))])


def _named(graph: Graph, s: Sharder, context: Context) -> dict[Node, Placement]:
    inputs = {context.arguments.get(n.name, n.name): n for n in placeholders(graph) if n.name not in context.weights}
    inputs = {name: node for name, node in inputs.items() if is_tensor(node)}
    cuts = {}
    for name, dims in context.options.shard_inputs.items():
        if name not in inputs:
            there = ", ".join(f"{n} {list(value(node).shape)}" for n, node in inputs.items()) or "none"
            raise ShardError(f"shard_inputs: no tensor argument is called {name!r}; this call has {there}")
        node = inputs[name]
        if node.name in context.held:
            continue
        placement = Placement.whole(value(node).shape)
        for axis, dim in _per_axis(dims, s):
            if not -placement.ndim <= dim < placement.ndim:
                raise ShardError(f"shard_inputs: {name} {list(placement.shape)} has no dimension {dim}")
            placement = _evenly(s, placement, axis, dim % placement.ndim)
        if not placement.is_whole:
            cuts[node] = placement
    return cuts


def _per_axis(dims: int | Sequence[int | None], s: Sharder) -> list[tuple[int, int]]:
    """(axis of the mesh, dimension): one number is meant for the last axis, the tokens'."""
    if isinstance(dims, int):
        return [(len(s.mesh.shape) - 1, dims)]
    return [(axis, dim) for axis, dim in zip(range(len(s.mesh.shape)), dims, strict=True) if dim is not None]


__all__ = ["NO_TOKENS", "token_cuts"]
