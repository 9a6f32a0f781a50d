"""What one rank's graph costs on a machine: seconds, FLOPs, bytes, exchanges and memory, by shapes alone.

    seconds = sum over kernels of max(FLOPs / rate, bytes / bandwidth) + launch,  plus the exchanges

What is a kernel and what it reads is in `fusion.py`, the constants are in `machine.py`. Memory is live bytes in the graph's
order: values that are computed where they are read take none, views keep their base, and an exchange's buffers and an
unfold's workspace count while they run.

What it leaves out: contiguous copies that a library makes inside, caches of the chip, waiting for a slower rank, and that
exchanges could overlap with arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

from pvae.kernels import conv3d_unfold
from pvae.passes.fusion import (
    LONG_ROW,
    NORMS,
    Fusion,
    bytes_of,
    elements,
    exchange_arguments,
    fetch_arguments,
    kind_of,
    row_length,
    tensors_of,
)
from pvae.passes.ir import VIEW_OPS, ConvNode, aten, output_node, placeholders, source_line, value
from pvae.passes.machine import Machine, interpolate
from pvae.runtime.exchange import exchange, is_local, movement, whole_of
from pvae.runtime.fetch import fetch
from pvae.runtime.fetch_plan import Kind, fetch_plan

__all__ = ["Cost", "CostError", "Exchange", "graph_cost"]

WIDEST_HEAD = 256


class CostError(ValueError):
    """A graph whose sizes are not all known."""


# Arithmetic -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kernel:
    """One launch: so many FLOPs at that rate and so many bytes; `scratch` is what it holds besides, in bytes."""

    flops: float
    rate: float
    bytes: float
    scratch: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / self.rate, self.bytes / machine.memory)


def _flops(node: Node) -> int:
    """Multiply-adds times two as written: by torch's own counter, which takes composite ops apart."""
    if node.target is conv3d_unfold.OP:
        weight = value(node.args[1])
        return 2 * elements(node) * math.prod(weight.shape[1:])
    conv = ConvNode.of(node)
    if conv is not None and conv.flops is not None:
        return conv.flops
    if getattr(node.target, "namespace", "") != "aten":
        return 0

    def shape_only(n: Node) -> Any:
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), value(n)
        )

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), shape_only)
    kwargs = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
    assert callable(node.target)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return counter.get_total_flops()


def _alone(node: Node, moved: float, machine: Machine) -> list[_Kernel]:
    """The kernels of a node that stands alone and moves `moved` bytes in and out."""
    flops, y = _flops(node), tensors_of(node)[0]
    if not flops:
        return [_Kernel(0, 1, moved)]
    if node.target is aten.scaled_dot_product_attention.default:
        query = value(node.args[0])
        wide = query.shape[-1] > WIDEST_HEAD
        share = machine.wide_attention if wide else machine.attention
        rate = machine.product_rate(y.dtype) * share * machine.busy(query.numel() // query.shape[-1], query.shape[-1])
        return [_Kernel(flops, rate, moved)]
    weight = value(node.args[1]) if len(node.args) > 1 and isinstance(node.args[1], Node) else None
    if node.target is conv3d_unfold.OP:
        return _unfolded(node, flops, moved, machine)
    if weight is not None and "conv" in str(node.target):
        rate = _convolution_rate(y, min(weight.shape[:2]), machine, three_d=weight.dim() == 5)
        return [_Kernel(flops, rate, moved)]
    columns = y.shape[-1]
    rate = machine.product_rate(y.dtype) * machine.busy(y.numel() // max(columns, 1), columns)
    return [_Kernel(flops, rate, moved)]


def _convolution_rate(y: torch.Tensor, channels: int, machine: Machine, *, three_d: bool = False) -> float:
    share = interpolate(machine.convolution3d if three_d else machine.convolution, channels)
    busy = machine.busy(y.numel() // max(y.shape[1], 1), y.shape[1])
    return machine.product_rate(y.dtype, convolution=True) * share * busy


def _unfolded(node: Node, flops: float, moved: float, machine: Machine) -> list[_Kernel]:
    """A copy of the frames that every output frame reads, in chunks, and a 2-D convolution of each chunk."""
    x, weight = value(node.args[0]), value(node.args[1])
    y = value(node)
    share = y.shape[2] / max(x.shape[2], 1)
    unfolded = int(node.args[3]) * x.numel() * x.element_size() * share
    chunk = conv3d_unfold.EXTRA_RATIO * (x.numel() + y.numel()) * x.element_size() + conv3d_unfold.EXTRA_BYTES
    channels = min(weight.shape[0], weight.shape[1] // int(node.args[3]))
    conv = _Kernel(flops, _convolution_rate(y, channels, machine), moved + unfolded, min(unfolded, chunk))
    return [_Kernel(0, 1, x.numel() * x.element_size() + unfolded), conv]


# Exchanges ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """One `fetch` or `exchange` of a graph, seen from its rank, per call. `times` is how often its graph runs.

    kind      local: nothing moves; exchange: one all-to-all; gather: one all-gather (`runtime.fetch_plan`);
              boxes: one all-to-all of boxes of heads x tokens (`runtime.exchange`), for which dim, have, need and shape are
              the tokens of its first tensor, taken whole
    whole     every rank needs all of the dimension: the tensor is no longer split by it
    result    what is fetched leaves the graph
    sent, received, messages   bytes and messages of this rank, in one call
    """

    node: str
    source: str
    dim: int
    kind: Kind | Literal["boxes"]
    group: str | None
    have: tuple[int, ...]
    need: tuple[tuple[int, int], ...]
    whole: bool
    result: bool
    shape: tuple[int, ...]
    sent: int
    received: int
    messages: int
    seconds: float
    times: int = 1


def _leaves(node: Node) -> bool:
    """Whether the graph returns what is fetched, or a view or another fetch of it."""
    return any(
        user.op == "output" or ((user.target in VIEW_OPS or user.target in (fetch, exchange)) and _leaves(user))
        for user in node.users
    )


def _exchange(node: Node, machine: Machine) -> Exchange:
    return _of_boxes(node, machine) if node.target is exchange else _of_rows(node, machine)


def _of_boxes(node: Node, machine: Machine) -> Exchange:
    given = exchange_arguments(node)
    moved = movement([value(x) for x in given["xs"]], given["have"], given["need"], given["rank"])
    kind: Literal["boxes", "local"] = "local" if is_local(given["have"], given["need"]) else "boxes"
    seconds = machine.exchange_seconds(max(moved.sent, moved.received)) if kind == "boxes" else 0.0
    _, tokens = whole_of(given["have"][0])
    shape = tuple(value(given["xs"][0]).shape)
    what = (node.name, source_line(node), 2, kind, given["group"], tokens, (tokens,), False, _leaves(node), shape)
    return Exchange(*what, moved.sent, moved.received, moved.messages, seconds)


def _of_rows(node: Node, machine: Machine) -> Exchange:
    given = fetch_arguments(node)
    x: torch.Tensor = value(given["x"])
    dim = range(x.dim())[given["dim"]]
    plan = fetch_plan(given["have"], given["need"], given["fill"])
    mine, others = plan.ranks[given["rank"]], len(given["need"]) - 1
    row = math.prod(size for d, size in enumerate(x.shape) if d != dim) * x.element_size()
    if plan.kind == "gather":
        sent = received = others * plan.longest * row
        messages, seconds = others, machine.gather_seconds(received)
    else:
        sent, received = sum(mine.send_splits) * row, sum(mine.receive_splits) * row
        messages = sum(n > 0 for n in mine.send_splits)
        seconds = machine.exchange_seconds(max(sent, received)) if plan.kind == "exchange" else 0.0
    whole = all(interval == (0, given["have"][-1]) for interval in given["need"])
    return Exchange(
        node.name,
        source_line(node),
        dim,
        plan.kind,
        given["group"],
        given["have"],
        given["need"],
        whole,
        _leaves(node),
        tuple(x.shape),
        sent,
        received,
        messages,
        seconds,
    )


# The sum --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a rank's work takes. Seconds by what bounds them; weights, inputs and peak in bytes of device memory.

    `peak` is the most that is alive at once besides weights and inputs. Costs add: seconds, FLOPs and bytes sum up, of
    memory the larger counts, for the calls come one after another.
    """

    arithmetic: float = 0.0
    traffic: float = 0.0
    launch: float = 0.0
    exchange: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    exchanges: tuple[Exchange, ...] = ()
    weights: int = 0
    inputs: int = 0
    peak: int = 0

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.traffic + self.launch + self.exchange

    @property
    def memory(self) -> int:
        """Device memory, bytes."""
        return self.weights + self.inputs + self.peak

    def __add__(self, other: Cost) -> Cost:
        larger = max((self, other), key=lambda cost: cost.inputs + cost.peak)
        return Cost(
            self.arithmetic + other.arithmetic,
            self.traffic + other.traffic,
            self.launch + other.launch,
            self.exchange + other.exchange,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            self.exchanges + other.exchanges,
            max(self.weights, other.weights),
            larger.inputs,
            larger.peak,
        )

    def times(self, calls: int) -> Cost:
        """The cost of so many calls, one after another."""
        return replace(
            self,
            arithmetic=self.arithmetic * calls,
            traffic=self.traffic * calls,
            launch=self.launch * calls,
            exchange=self.exchange * calls,
            flops=self.flops * calls,
            bytes=self.bytes * calls,
            kernels=self.kernels * calls,
            exchanges=tuple(replace(e, times=e.times * calls) for e in self.exchanges if calls),
        )

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        return reduce(add, costs, cls())


def graph_cost(graph: Graph, machine: Machine, weights: Collection[str] = ()) -> Cost:
    """What one call of `graph` costs its rank. `weights` are the names of the placeholders that are weights.

    Raises CostError where a size is symbolic.
    """
    _check_static(graph)
    fusion = Fusion(graph)
    arithmetic = traffic = 0.0
    kernels: dict[Node, list[_Kernel]] = {}
    exchanges: list[Exchange] = []
    for node in graph.nodes:
        if node.target in (fetch, exchange):
            exchanges.append(_exchange(node, machine))
        kernels[node] = list(_kernels(node, fusion, machine))
        for kernel in kernels[node]:
            if kernel.flops / kernel.rate > kernel.bytes / machine.memory:
                arithmetic += kernel.seconds(machine)
            else:
                traffic += kernel.seconds(machine)
    every = [kernel for found in kernels.values() for kernel in found]
    own = {node.name: bytes_of(node) for node in placeholders(graph)}
    in_weights = sum(size for name, size in own.items() if name in set(weights))
    return Cost(
        arithmetic,
        traffic,
        machine.launch * len(every),
        sum(e.seconds for e in exchanges),
        sum(kernel.flops for kernel in every),
        sum(kernel.bytes for kernel in every),
        len(every),
        tuple(e for e in exchanges if e.kind != "local"),
        in_weights,
        sum(own.values()) - in_weights,
        _peak(graph, fusion, kernels),
    )


def _check_static(graph: Graph) -> None:
    for node in graph.nodes:
        if any(not isinstance(size, int) for t in tensors_of(node) for size in t.shape):
            raise CostError(
                f"%{node.name} has symbolic sizes; the cost model needs them all (capture with dynamic=False)"
            )


def _kernels(node: Node, fusion: Fusion, machine: Machine) -> Iterator[_Kernel]:
    if node.op != "call_function" or not tensors_of(node):
        return
    read = sum(n * _element_size(source) for source, n in fusion.reads(node).items())
    if node.target in NORMS and row_length(node) > LONG_ROW:
        yield _Kernel(0, 1, read)
    if node not in fusion.kernels:
        return
    if node.target is fetch:
        yield from _fetch_kernels(node, read, machine)
    elif node.target is exchange:
        yield from _exchange_kernels(node, read)
    elif kind_of(node) == "alone":
        yield from _alone(node, read + bytes_of(node), machine)
    else:
        yield _Kernel(0, 1, read + bytes_of(node))


def _fetch_kernels(node: Node, read: float, machine: Machine) -> Iterator[_Kernel]:
    """Packing what is sent, and assembling the result from what this rank holds and received."""
    found = _exchange(node, machine)
    if found.kind == "exchange":
        yield _Kernel(0, 1, 2 * found.sent, found.sent + found.received)
    yield _Kernel(0, 1, read + found.received + bytes_of(node), found.received)


def _exchange_kernels(node: Node, read: float) -> Iterator[_Kernel]:
    """Packing the messages, one's own to oneself among them, and bringing what arrived in order where it is not."""
    given = exchange_arguments(node)
    moved = movement([value(x) for x in given["xs"]], given["have"], given["need"], given["rank"])
    if moved.packs:
        yield _Kernel(0, 1, read + moved.sent, moved.sent)
    if moved.assembles:
        yield _Kernel(0, 1, 2 * bytes_of(node), moved.received)


def _element_size(node: Node) -> int:
    return tensors_of(node)[0].element_size()


def _peak(graph: Graph, fusion: Fusion, kernels: dict[Node, list[_Kernel]]) -> int:
    """The most bytes alive at once besides the graph's inputs, when its nodes run in order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last: dict[Node, int] = {}
    for node in (*fusion.kernels, output_node(graph)):
        for source in fusion.reads(node):
            last[source] = max(last.get(source, 0), order[node])
    leaving: dict[int, list[Node]] = {}
    for node in fusion.kernels:
        leaving.setdefault(last.get(node, order[node]), []).append(node)
    alive = peak = 0
    for node, index in order.items():
        if node in fusion.kernels:
            alive += bytes_of(node)
        scratch = max((kernel.scratch for kernel in kernels[node]), default=0.0)
        peak = max(peak, alive + int(scratch))
        alive -= sum(bytes_of(gone) for gone in leaving.get(index, ()))
    return peak
