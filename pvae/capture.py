"""From Dynamo's graph, or from a module's forward, to the one IR: ATen before decomposition, functional, weights as inputs.

Dynamo's graph is re-traced through `fx.Interpreter`, never by its generated code, which drops parentheses around negative
bases.
"""

from __future__ import annotations

import inspect
import operator
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from pvae.call_structure import positional_names
from pvae.kernels.compact import OP as COMPACT
from pvae.passes.ir import Builder, aten, output_node, placeholders, repropagate, value
from pvae.passes.output_layout import dimension_order
from pvae.passes.verify import Signature
from pvae.runtime.sharded_tensor import ShardedTensor
from pvae.runtime.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    argument_path,
    current_frame,
    functional_graph,
    static_fake,
    traced_locals,
)

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


@dataclass(frozen=True)
class Capture:
    """A graph whose placeholders are the traced call's flat inputs, one to one, and whose output is a flat tuple."""

    gm: GraphModule
    fake_mode: FakeTensorMode | None
    weights: frozenset[str]
    mutated: tuple[int, ...]
    seconds: float
    promised: Signature  # the outputs, in eager's strides
    arguments: Mapping[str, str] = field(default_factory=dict)  # placeholder -> the name that forward has for it


def _finish(gm: GraphModule, mutated: list[int], mode: FakeTensorMode | None) -> None:
    """Turn the trailing new values of written inputs into `copy_` nodes, and make the output one flat tuple.

    `view` becomes `reshape`: a view is a promise about strides, which passes change. What reads memory by strides of its own
    (`as_strided`) reads a copy laid out as traced, and strides that the graph reads are those. Constants get a fake of `mode`.
    """
    graph = gm.graph
    for node in graph.nodes:
        if node.target in VIEWS:
            node.target = aten.reshape.default
        elif node.op == "get_attr" and mode is not None:
            node.meta["val"] = static_fake(mode, getattr(gm, node.target))
    for op in (aten.sym_stride.int, aten.sym_storage_offset.default):
        for node in graph.find_nodes(op="call_function", target=op):
            _state(node)
    for op, required in ((aten.as_strided.default, 3), (aten.as_strided_scatter.default, 4)):
        for node in graph.find_nodes(op="call_function", target=op):
            _read_a_copy(node, required)
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


def _state(node: Node) -> None:
    """A stride or offset that the graph reads from an activation -> what it is in eager, of the activation's sizes."""
    x: Any = node.args[0]
    if x.op == "placeholder":
        return  # as the caller gave it
    val, build = value(x), Builder(node)
    if node.target is aten.sym_stride.int and torch.ops.aten.is_non_overlapping_and_dense.default(val):
        order = dimension_order(val.stride())
        stated = build.product(1, *(build.size(x, d) for d in order[order.index(node.args[1]) + 1 :]))
    else:
        stated = int(value(node))  # a guard
    if isinstance(stated, Node):
        node.replace_all_uses_with(stated)
    for user in list(node.users):
        user.args, user.kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda n: stated if n is node else n)
    node.graph.erase_node(node)


def _read_a_copy(node: Node, required: int) -> None:
    """`as_strided(x, size, stride, offset)` -> the same of a copy of the tensor in whose memory x is.

    `required` arguments come before the offset, which is counted from the start of that memory.
    """
    x: Any = node.args[0]
    base = x
    while node.target is aten.as_strided.default and (source := _viewed(base)) is not None:
        base = source
    whole = value(base)
    if not torch.ops.aten.is_non_overlapping_and_dense.default(whole):
        return  # an input with gaps: no pass lays it out
    build = Builder(node)
    offset = (*node.args, None)[required] if "storage_offset" not in node.kwargs else node.kwargs["storage_offset"]
    if offset is None:
        offset = int(value(x).storage_offset())  # a guard, where sizes are symbols
    offset = build(operator.sub, offset, int(whole.storage_offset()))
    node.args, node.kwargs = (build(COMPACT, base, dimension_order(whole.stride())), *node.args[1:required], offset), {}


def _viewed(node: Node) -> Node | None:
    """The tensor of which `node` is a view."""
    if node.op != "call_function":
        return None
    memory = value(node).untyped_storage()._cdata
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return next((n for n in sources if value(n).untyped_storage()._cdata == memory), None)


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
    code, _ = current_frame()
    called = zip(placeholders(traced.graph), (_argument_name(n, code) for n in nodes), strict=True)
    arguments = _named((node, name) for node, name in called if name is not None)
    seconds = time.perf_counter() - start
    return Capture(traced, mode, weights, tuple(mutated), seconds, Signature.of(traced.graph), arguments)


def _argument_name(node: Node, code: CodeType | None) -> str | None:
    """What the traced function, whose code it is, calls a placeholder of Dynamo's graph; as `argument_names` would."""
    path = argument_path(node)
    if path is None:
        return None
    name, *keys = path
    if code is not None and keys:
        starred = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
        var_positional = starred[0] if code.co_flags & inspect.CO_VARARGS else None
        var_keyword = starred[var_positional is not None] if code.co_flags & inspect.CO_VARKEYWORDS else None
        if name == var_keyword:
            name, *keys = keys
        elif name == var_positional:
            position, *keys = keys
            forward = _wrapped_forward(code)
            position += code.co_argcount
            name = positional_names(forward, position + 1)[position] if forward else f"{name}_{path[1]}"
    return "_".join(map(str, (name, *keys)))


def _wrapped_forward(code: CodeType) -> Callable[..., Any] | None:
    """The forward that is traced, if `code` is its own or that of a decorator around it."""
    owner = traced_locals().get(code.co_varnames[0]) if code.co_argcount else None
    forward = inner = getattr(type(owner), "forward", None)
    while inner is not None and getattr(inner, "__code__", None) is not code:
        inner = getattr(inner, "__wrapped__", None)
    return forward if inner is not None else None


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
    run: Callable[..., list[Any]],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[str],
    mode: FakeTensorMode,
    arguments: Sequence[str] = (),
) -> Capture:
    """Trace `run(*inputs)`, fakes of `mode`: the first are the arguments, the last the weights, that are called so.

    `run` returns a flat list.
    """
    start = time.perf_counter()
    traced, mutated = _trace(run, inputs, mode, stack_traces=True)
    nodes = placeholders(traced.graph)
    _named(zip(nodes[len(inputs) - len(weights) :], weights, strict=True))
    names = _named(zip(nodes, arguments, strict=False))
    _finish(traced, mutated, mode)
    own = frozenset(n.name for n in nodes[len(inputs) - len(weights) :])
    seconds = time.perf_counter() - start
    return Capture(traced, mode, own, tuple(mutated), seconds, Signature.of(traced.graph), names)


def lay_out_inputs(capture: Capture, strides: Sequence[Sequence[int]]) -> None:
    """Have the graph take inputs in other strides than it was traced with, in place.

    The strides that follow are derived anew; the outputs stay promised as they were.
    """
    graph = capture.gm.graph
    nodes = placeholders(graph)
    relaid = [(n, list(s)) for n, s in zip(nodes, strides, strict=True) if value(n).stride() != tuple(s)]
    for node, now in relaid:
        node.meta["val"] = value(node).new_empty_strided(value(node).shape, now)
    if relaid:
        repropagate(graph.nodes)
        capture.gm.recompile()


def _named(called: Iterable[tuple[Node, str]]) -> dict[str, str]:
    """Give nodes names, for people to read in dumps: by the node's name, which is near it and unique, the one asked for."""
    found = {}
    for node, name in called:
        node._rename(re.sub(r"\W", "_", name))
        found[node.name] = name
    return found


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
