"""Which nodes depend on what."""

from __future__ import annotations

from torch.fx import Node


class Ancestry:
    """Which nodes depend on what. Answers about weights are kept: rewrites do not change them."""

    def __init__(self, weights: frozenset[str]) -> None:
        self.weights = weights
        self.known: dict[Node, bool] = {}

    def from_input(self, node: Node) -> bool:
        """Whether `node` depends on an input of the graph that is not a weight."""
        todo = [node]
        while todo:
            at = todo[-1]
            if at in self.known:
                todo.pop()
                continue
            if at.op == "placeholder":
                self.known[at] = at.name not in self.weights
                continue
            missing = [n for n in at.all_input_nodes if n not in self.known]
            if missing:
                todo += missing
            else:
                self.known[at] = any(self.known[n] for n in at.all_input_nodes)
        return self.known[node]

    @staticmethod
    def cone(nodes: list[Node], after: Node) -> list[Node]:
        """`nodes` and all that they are made of, as far as it stands at or behind `after`, in graph order."""
        found: set[Node] = set()
        todo = [n for n in nodes if not n < after]
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo += [n for n in at.all_input_nodes if not n < after]
        return sorted(found)

    def depends(self, node: Node, on: Node) -> bool:
        return on in self.cone([node], on)
