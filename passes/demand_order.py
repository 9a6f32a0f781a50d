"""Puts every node just before what first needs it, so that collectives start early and what they hide behind comes late.

A model computes queries, keys and values one after the other and only then attends. In the order of demand queries are
projected, normalised, rotated and sent before keys are projected: the exchange of the one runs beside the product of the
other, if whoever runs the graph waits for an exchange no earlier than its result is read (Inductor's `sink_waits`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.fx import Graph, Node

from pvae.passes.ir import aten, output_node
from pvae.passes.sharder import argument
from pvae.runtime.exchange import exchange
from pvae.runtime.fetch import fetch


def in_demand_order(graph: Graph) -> bool:
    """Reorder `graph` in place: depth first from the output, operands in their order. Dead nodes are removed.

    Collectives keep their order, which is that of all ranks: where pieces are empty, a rank's graph is of another shape.

    False, and nothing done, where order means something: inputs are written, or random numbers drawn.
    """
    if any(_is_bound(node) for node in graph.nodes):
        return False
    out = output_node(graph)
    collectives = [node for node in graph.nodes if node.target in (fetch, exchange)]
    before = {later: earlier for earlier, later in pairwise(collectives)}
    done: set[Node] = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    todo: list[tuple[Node, bool]] = [(node, False) for node in reversed(out.all_input_nodes)]
    while todo:
        node, ready = todo.pop()
        if ready:
            out.prepend(node)
        elif node not in done:
            done.add(node)
            todo.append((node, True))
            first = [before[node]] if node in before else []
            todo += [(n, False) for n in reversed([*first, *node.all_input_nodes]) if n not in done]
    for node in reversed(graph.nodes):
        if node not in done and node is not out:
            graph.erase_node(node)
    return True


def _is_bound(node: Node) -> bool:
    if node.target is aten.scaled_dot_product_attention.default:  # torch marks it random for its dropout
        return bool(argument(node, 4, "dropout_p", 0.0))
    tags = getattr(node.target, "tags", ())
    return node.target is aten.copy_.default or torch.Tag.nondeterministic_seeded in tags
