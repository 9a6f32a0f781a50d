"""From Dynamo's graph, or from a module's forward, to the one IR: ATen before decomposition, functional, weights as inputs.

Dynamo's graph is re-traced through `fx.Interpreter`, never by its generated code, which drops parentheses around negative
bases.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pvae.passes.ir import aten, output_node, placeholders
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import FakeTensor, FakeTensorMode, functional_graph, static_fake

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Capture:
    """A graph whose placeholders are the traced call's flat inputs, one to one, and whose output is a flat tuple."""

    gm: GraphModule
    fake_mode: FakeTensorMode | None
    weights: frozenset[str]
    mutated: tuple[int, ...]
    seconds: float


def _finish(gm: GraphModule, mutated: list[int], mode: FakeTensorMode | None) -> None:
    """Turn the trailing new values of written inputs into `copy_` nodes, and make the output one flat tuple.

    `view` becomes `reshape`: a view is a promise about strides, which passes change. Constants get a fake of `mode`.
    """
    graph = gm.graph
    for node in graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
        elif node.op == "get_attr" and mode is not None:
            node.meta["val"] = static_fake(mode, getattr(gm, node.target))
    out = output_node(graph)
    leaves = list(torch.utils._pytree.tree_leaves(out.args, is_leaf=lambda x: x is None))
    inputs = placeholders(graph)
    written: dict[Any, Node] = {}
    for index in reversed(mutated):
        written[leaves[-1]] = inputs[index]
        with graph.inserting_before(out):
            node = graph.call_function(aten.copy_.default, (inputs[index], leaves.pop()))
        node.meta["val"] = inputs[index].meta["val"]
    out.args = (tuple(written.get(leaf, leaf) for leaf in leaves),)  # a written input is returned as itself
    gm.recompile()


def capture_graph(gm: GraphModule, inputs: Sequence[Any], *, static: bool = False) -> Capture:
    """Re-trace Dynamo's `gm`. `inputs` are the real inputs; parameters among them mark which placeholders are weights.

    `static` fixes symbolic sizes to today's, so that Dynamo compiles anew for others. A `ShardedTensor` is traced as the
    whole tensor.
    """
    start = time.perf_counter()
    nodes = placeholders(gm.graph)
    examples = [n.meta.get("example_value", n.meta.get("val")) for n in nodes]
    examples = [e if e is not None else i for e, i in zip(examples, inputs, strict=True)]
    examples = [e.whole() if isinstance(e, ShardedTensor) else e for e in examples]
    mode = next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), None)
    if static and mode is not None:
        examples = [_with_todays_sizes(e, mode) for e in examples]

    def run(*args: Any) -> list[Any]:
        result = torch.fx.Interpreter(gm).run(*args)
        return list(torch.utils._pytree.tree_leaves(result, is_leaf=lambda x: x is None))

    traced, mutated = _trace(run, examples, mode, stack_traces=False)
    _finish(traced, mutated, mode)
    names = [n.name for n in placeholders(traced.graph)]
    weights = frozenset(n for n, i in zip(names, inputs, strict=True) if isinstance(i, torch.nn.Parameter))
    return Capture(traced, mode, weights, tuple(mutated), time.perf_counter() - start)


def _with_todays_sizes(example: Any, mode: FakeTensorMode) -> Any:
    """`int(size)` makes Dynamo guard on the size."""
    if isinstance(example, torch.SymInt):
        return int(example)
    if not isinstance(example, torch.Tensor):
        return example
    with mode:
        sizes, strides = [int(n) for n in example.shape], [int(n) for n in example.stride()]
        return torch.empty_strided(sizes, strides, dtype=example.dtype, device=example.device)


def capture_run(
    run: Callable[..., list[Any]], inputs: Sequence[torch.Tensor], weights: Sequence[str], mode: FakeTensorMode
) -> Capture:
    """Trace `run(*inputs)`, fakes of `mode` of which the last are the weights called so; `run` returns a flat list."""
    start = time.perf_counter()
    traced, mutated = _trace(run, inputs, mode, stack_traces=True)
    nodes = placeholders(traced.graph)[len(inputs) - len(weights) :]
    for node, name in zip(nodes, weights, strict=True):
        node._rename(re.sub(r"\W", "_", name))  # a dump then says which weight it is
    _finish(traced, mutated, mode)
    return Capture(traced, mode, frozenset(n.name for n in nodes), tuple(mutated), time.perf_counter() - start)


def _trace(
    run: Callable[..., list[Any]], inputs: Sequence[Any], mode: FakeTensorMode | None, *, stack_traces: bool
) -> tuple[GraphModule, list[int]]:
    if mode is None:
        return functional_graph(run, inputs, stack_traces=stack_traces)
    with mode:
        return functional_graph(run, inputs, stack_traces=stack_traces)


def tensor_constants(gm: GraphModule) -> list[Node]:
    """Tensors that tracing baked into the graph: neither inputs nor weights."""
    return [node for node in gm.graph.nodes if node.op == "get_attr"]
