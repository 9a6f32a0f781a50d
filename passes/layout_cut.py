"""Which of two layouts each value of a graph has, so that all costs together are least: a minimum s-t cut.

    cost = sum over values of cost[value, its layout]  +  sum over values that a reader wants otherwise of converting them

Values on the source's side of the cut are contiguous, those on the sink's side channels_last. An edge from the source to
a value is cut, and paid, if the value is channels_last, so its capacity is the cost of that; likewise to the sink. A value
that several readers want converted is converted once: between it and them stands one node for each direction, joined to
the readers by edges that no cut can afford. (Greig, Porteous, Seheult 1989; the shared node as for hyperedges.)
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
IMPOSSIBLE = float("inf")


@dataclass
class LayoutProblem:
    """Costs in any one unit. `costs`: (contiguous, channels_last) of each value, one of them may be IMPOSSIBLE.
    `reads`: the readers of a value, and what converting it costs."""

    costs: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    reads: dict[Hashable, tuple[list[Hashable], float]] = field(default_factory=dict)

    def add(self, value: Hashable, contiguous: float = 0.0, channels_last: float = 0.0) -> None:
        """A value, or more cost of one that is there."""
        a, b = self.costs.get(value, (0.0, 0.0))
        self.costs[value] = a + contiguous, b + channels_last

    def read(self, value: Hashable, reader: Hashable, conversion: float) -> None:
        """`reader` takes `value`, in its own layout."""
        readers, _ = self.reads.setdefault(value, ([], conversion))
        if reader not in readers:
            readers.append(reader)

    def cost(self, layouts: Mapping[Hashable, str]) -> float:
        """What an assignment of layouts costs."""
        total = sum(pair[layouts[value] == CHANNELS_LAST] for value, pair in self.costs.items())
        for value, (readers, conversion) in self.reads.items():
            if any(layouts[reader] != layouts[value] for reader in readers):
                total += conversion
        return total

    def solve(self) -> dict[Hashable, str]:
        """The layouts of least cost; of several such, one with fewest values in channels_last."""
        network = networkx.DiGraph()
        source, sink = ("source",), ("sink",)
        network.add_nodes_from([source, sink])
        for value, (contiguous, channels_last) in self.costs.items():
            _edge(network, source, ("value", value), channels_last)
            _edge(network, ("value", value), sink, contiguous)
        for value, (readers, conversion) in self.reads.items():
            here, ends = ("value", value), [("value", reader) for reader in readers if reader != value]
            if len(ends) == 1:
                _edge(network, here, ends[0], conversion)
                _edge(network, ends[0], here, conversion)
            elif ends:
                _shared(network, value, here, ends, conversion)
        _, (_, beyond) = networkx.minimum_cut(
            network, source, sink, flow_func=networkx.algorithms.flow.boykov_kolmogorov
        )
        return {value: CHANNELS_LAST if ("value", value) in beyond else CONTIGUOUS for value in self.costs}


def _edge(network: networkx.DiGraph, start: Hashable, end: Hashable, capacity: float) -> None:
    """Capacities of edges between the same two nodes add; one without `capacity` is never cut."""
    if capacity <= 0:
        return
    old = network.get_edge_data(start, end, {"capacity": 0.0}).get("capacity")
    network.add_edge(start, end)
    attributes = network[start][end]
    if old is None or capacity == IMPOSSIBLE:
        attributes.pop("capacity", None)
    else:
        attributes["capacity"] = old + capacity


def _shared(
    network: networkx.DiGraph, value: Hashable, here: Hashable, ends: Sequence[Hashable], conversion: float
) -> None:
    """One payment if any reader is on the other side, whichever side the value is on."""
    to_last, to_contiguous = ("converted", value, CHANNELS_LAST), ("converted", value, CONTIGUOUS)
    _edge(network, here, to_last, conversion)
    _edge(network, to_contiguous, here, conversion)
    for end in ends:
        _edge(network, to_last, end, IMPOSSIBLE)
        _edge(network, end, to_contiguous, IMPOSSIBLE)
