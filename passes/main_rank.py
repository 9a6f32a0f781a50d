"""Regions that run on rank 0 only: `Owned(0)` of the algebra (DESIGN section 4), in graphs.

Nodes that were traced under `with pvae.main_rank():` carry a mark. `MAIN_RANK`, before sharding, makes each region of them
one node, which other passes cannot look into, and lets what leaves it travel by the one primitive:

    rank 0          region = main_rank_1f2e3d4c(x, w)          others          region = elsewhere(likes)
                    a = region[0]      # [n, ...]                              a = region[0]      # [0, ...]
                    whole = fetch(a, 0, (0, n, n), all, ...)                   whole = fetch(a, 0, (0, n, n), all, ...)

So the ranks' graphs have the same nodes where sharding looks: it gathers what a region reads on all of them or on none.
`INLINE_MAIN_RANK`, after it, puts rank 0's nodes back into its graph; from the others' everything that only the region
needed goes as dead code, except exchanges, in which all ranks take part.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from pvae.passes import dump
from pvae.passes.ir import Builder, aten, output_node, placeholders, source_line, static, value
from pvae.passes.rule import Context, Pass, Record, Report
from pvae.runtime.exchange import exchange
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import fetch_plan
from pvae.runtime.main_rank import elsewhere
from pvae.runtime.mesh import Mesh

MARK = "pvae_main_rank"  # in `node.meta["custom"]`


class MainRankError(ValueError):
    """A region that cannot be given to one rank inside a graph; the message says what would work."""


def mark(node: Node) -> None:
    """Put `node` into a region."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: True}


def mark_modules(graph: Graph, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put the nodes that Dynamo traced in these submodules into regions. Returns the paths of which there is no node, and
    all that there are."""
    known: set[str] = set()
    found: set[str] = set()
    for node in graph.nodes:
        for name, _ in (node.meta.get("nn_module_stack") or {}).values():
            path = _plain_path(name)
            known.add(path)
            if path in paths and node.op not in ("placeholder", "get_attr", "output"):
                mark(node)
                found.add(path)
    return [p for p in paths if p not in found], sorted(known - {""})


def _plain_path(name: str) -> str:
    """`encoder.blocks.0` of Dynamo's `L['self']._modules['encoder'].blocks[0]`."""
    keys = re.findall(r"\[['\"]?(.*?)['\"]?\]|\.([^.\[]+)", name)
    return ".".join(a or b for a, b in keys[1:] if (a or b) not in ("_modules", "_orig_mod"))


def is_marked(node: Node) -> bool:
    """Whether `node` is of a region. Inputs and constants never are: every rank has them."""
    return node.op not in ("placeholder", "get_attr", "output") and MARK in (node.meta.get("custom") or {})


def has_regions(graph: Graph) -> bool:
    return any(map(is_marked, graph.nodes))


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """A region's graph, called as one op: takes what the region reads, returns the tuple of what leaves it."""

    gm: GraphModule
    __name__: str

    __module__ = __name__

    def __call__(self, *inputs: Any) -> Any:
        return torch.fx.Interpreter(self.gm).run(*inputs)

    def __repr__(self) -> str:
        return self.__name__


# --- which nodes make up a region ----------------------------------------------------------------------------------------


def _is_write(node: Node) -> bool:
    """The copies into inputs that end a graph."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _depths(graph: Graph, members: set[Node]) -> dict[Node, int]:
    """How often the longest path to a node leaves a region. Marked nodes of one depth are one region: no path leads out of
    it and back in."""
    depths: dict[Node, int] = {}
    for node in graph.nodes:
        before = [depths[n] + (n in members and node not in members) for n in node.all_input_nodes]
        depths[node] = max(before, default=0)
    return depths


def _regions(graph: Graph) -> list[list[Node]]:
    """The regions of the graph, first to last, each in graph order.

    Reorders the graph where something that a region reads stands behind something that reads the region.
    """
    members: set[Node] = set()
    for node in graph.nodes:
        if is_marked(node) or (node.target is operator.getitem and members.issuperset(node.all_input_nodes)):
            members.add(node)
    depths = _depths(graph, members)
    apart = [[n for n in graph.nodes if n in members and depths[n] == d] for d in sorted({depths[m] for m in members})]
    if not all(map(_in_one_place, apart)):
        ends = [n for n in graph.nodes if n.op == "output" or _is_write(n)]
        body = sorted(set(graph.nodes) - {*ends, *placeholders(graph)}, key=lambda n: (depths[n], n in members, n))
        for before, after in pairwise([*placeholders(graph), *body, *ends]):
            before.append(after)
    return [sorted(region) for region in apart]


def _read(region: Sequence[Node]) -> list[Node]:
    """What the region reads, each once."""
    inside = set(region)
    return list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in inside))


def _in_one_place(region: Sequence[Node]) -> bool:
    """Whether all that the region reads stands before all that reads it."""
    inside = set(region)
    users = [u for n in region for u in n.users if u not in inside]
    return not users or all(i < min(users) for i in _read(region))


# --- one node for a region -----------------------------------------------------------------------------------------------


def _outline(region: Sequence[Node], read: Sequence[Node], results: Sequence[Node]) -> Region:
    """The region's nodes as a graph of their own. Its name tells it from every other."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in read:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in region:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[n] for n in results))
    text = dump.text(graph, strides=True, source=False)
    gm = GraphModule(torch.nn.Module(), graph)
    return Region(gm, f"main_rank_{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _check(node: Node) -> None:
    val = value(node)
    if isinstance(val, torch.Tensor) and all(static(n) is not None for n in val.shape):
        return
    what = "a tensor whose size is known only when it runs" if isinstance(val, torch.Tensor) else f"{val!r}, no tensor"
    raise MainRankError(
        f"a main-rank region leaves {what} ({node.name}, {source_line(node)}); in a graph only tensors of known sizes "
        "leave one: make it a function, fn = pvae.main_rank(function), which is a part of no graph"
    )


def _fetched(anchor: Node, x: Node, like: torch.Tensor, world: Mesh) -> Node:
    """`x`, which rank 0 has and of which the others have no rows, on every rank."""
    build = _plain_builder(anchor)
    if like.dtype is torch.bool:  # not every backend of torch.distributed moves these two
        x = build(aten.to.dtype, x, torch.uint8)
    elif like.is_complex():
        x = build(aten.view_as_real.default, x)
    if world.rank == 0 and not like.dim():
        x = build(aten.unsqueeze.default, x, 0)
    rows, ranks = like.shape[0] if like.dim() else 1, world.shape[0]
    x = build(fetch, x, 0, (0, *[rows] * ranks), ((0, rows),) * ranks, world.rank, "zeros", world.groups[0])
    if not like.dim():
        x = build(aten.squeeze.dim, x, 0)
    if like.dtype is torch.bool:
        return build(aten.to.dtype, x, torch.bool)
    return build(aten.view_as_complex.default, x) if like.is_complex() else x


def _plain_builder(anchor: Node) -> Builder:
    """Adds nodes that are of no region, whatever the anchor is."""
    build = Builder(anchor)
    build.inherited = {k: v for k, v in build.inherited.items() if k != "custom"}
    return build


def _nothing_like(val: Any) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Shape, dtype and device of no rows of a result. One that stays on rank 0 may be of any size, or no tensor."""
    if not isinstance(val, torch.Tensor) or any(static(n) is None for n in val.shape):
        return (0,), torch.uint8, torch.device("cpu")
    return (0, *val.shape[1:]), val.dtype, val.device


def own_regions(graph: Graph, context: Context, report: Report) -> None:
    """Make each region one node, rank 0's own, and fetch from there what the nodes outside read of it."""
    world = context.world
    if world is None or world.shape == (1,) or not has_regions(graph):
        return
    graph.eliminate_dead_code()
    regions = _regions(graph)
    members = {n for region in regions for n in region}
    owned: dict[Node, Node] = {}  # results of earlier regions, for later ones
    for region in regions:
        inside = set(region)
        results = [n for n in region if not inside.issuperset(n.users)]
        sent = [n for n in results if not members.issuperset(n.users)]
        for node in sent:
            _check(node)
        read = _read(region)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        build = _plain_builder(max([*inputs, *read]).next if inputs or read else next(iter(graph.nodes)))
        if world.rank == 0:
            node = build(_outline(region, read, results), *(owned.get(n, n) for n in read))
        else:  # with the same operands: sharding then does the same here as on rank 0
            likes = tuple(_nothing_like(value(n)) for n in results)
            node = build(elsewhere, likes, *(owned.get(n, n) for n in read))
        items = {n: build(operator.getitem, node, i) for i, n in enumerate(results)}
        owned.update(items)
        size = 0
        for result in sent:
            like = value(result)
            size += like.numel() * like.element_size()
            first = min(u for u in result.users if u not in members)
            moved = _fetched(first, items[result], like, world)
            result.replace_all_uses_with(moved, lambda user: user not in members)
        note = f"{len(region)} nodes, on rank 0 only; {len(sent)} results, {size} bytes for each other rank"
        report.matches.append(Record("main_rank", node.name, source_line(region[0]), note))
        report.counters["bytes"] += size
    for node in sorted(members, reverse=True):
        graph.erase_node(node)


# --- after sharding ------------------------------------------------------------------------------------------------------


def _moves(node: Node) -> bool:
    """Whether all ranks take part in `node`."""
    if node.target is fetch:
        _, _, have, need, _, fill, *_ = node.args
        return fetch_plan(tuple(have), tuple(need), fill).kind != "local"
    return node.target is exchange


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """`nodes` and all that they depend on."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def inline_regions(graph: Graph, context: Context, report: Report) -> None:
    """Put the nodes of rank 0's regions into its graph; keep of what others brought for them only the exchanges."""
    for node in list(graph.nodes):
        if isinstance(node.target, Region):
            _inline(graph, node, node.target)
            report.matches.append(Record("inline_main_rank", node.name, source_line(node), "on this rank"))
        elif node.target is elsewhere:
            brought = _ancestors(node.all_input_nodes)
            node.args = node.args[:1]
            live = _ancestors(n for n in graph.nodes if n.op == "output" or _is_write(n))
            stay = [n for n in graph.nodes if n in brought and _moves(n) and n not in live]
            node.args = (*node.args, *stay)
            note = f"on rank 0; {len(stay)} exchanges for it stay here"
            report.matches.append(Record("inline_main_rank", node.name, source_line(node), note))


def _inline(graph: Graph, node: Node, region: Region) -> None:
    inner = region.gm.graph
    env = dict(zip(placeholders(inner), node.args, strict=True))
    with graph.inserting_before(node):
        for n in inner.nodes:
            if n.op not in ("placeholder", "output"):
                env[n] = graph.node_copy(n, lambda m: env[m])
    results = output_node(inner).args[0]
    assert isinstance(results, tuple)
    for item in list(node.users):
        item.replace_all_uses_with(env[results[item.args[1]]])
        graph.erase_node(item)
    graph.erase_node(node)


MAIN_RANK = Pass(
    name="main_rank",
    summary="regions under `with pvae.main_rank()` become one node on rank 0, and what leaves them travels by fetch",
    rules=lambda context, settings: [],
    before=own_regions,
)
INLINE_MAIN_RANK = Pass(
    name="inline_main_rank",
    summary="the nodes of regions back into rank 0's graph; out of the others' goes what only a region read",
    rules=lambda context, settings: [],
    before=inline_regions,
)
