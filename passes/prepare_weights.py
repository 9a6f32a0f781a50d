"""Splits off what depends on weights alone, for `weights="frozen"`: it then runs once instead of in every call.

Not a rewrite (it changes which graph a node is in, not what is computed), so it is no member of the pipeline.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, GraphModule, Node

from pvae.passes.ir import VIEW_OPS, placeholders
from pvae.runtime.fetch import fetch


def split_weight_work(gm: GraphModule, weights: Collection[str]) -> tuple[GraphModule, list[int]] | None:
    """Move weight-only nodes of `gm` into a graph of their own; None if there are none that cost anything.

    Returns the prepare graph, which takes some of gm's inputs and returns a tuple, and the positions of those inputs.
    `gm` gets one more placeholder, at the end, for each result.
    """
    inputs = placeholders(gm.graph)
    constant: set[Node] = {n for n in inputs if n.name in weights}
    costly: set[Node] = set()
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function" or not sources or not constant.issuperset(sources):
            continue
        if node.target is fetch:  # all ranks come to it in every call, for all of whom it may not be weight work
            continue
        if isinstance(node.meta.get("val"), torch.Tensor):
            constant.add(node)
            if node.target not in VIEW_OPS or costly.intersection(sources):
                costly.add(node)
    results = [n for n in gm.graph.nodes if n in costly and any(u not in constant for u in n.users)]
    if not results:
        return None
    needed: set[Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    graph, copies = Graph(), dict[Node, Node]()
    indexes = [i for i, n in enumerate(inputs) if n in needed]
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in results))
    prepare = GraphModule(gm, graph)
    anchor = inputs[-1]
    for number, node in enumerate(results):
        with gm.graph.inserting_after(anchor):
            anchor = gm.graph.placeholder(f"prepared_{number}")
        anchor.meta = {"val": node.meta["val"]}
        new = anchor
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in constant)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return prepare, indexes
