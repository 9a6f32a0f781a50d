"""A graph as a problem of layouts (`layout_cut.py`): what each value costs contiguous and channels_last, in ms.

Every tensor in which a channel dimension can be followed from a convolution or an input of four or five dimensions is a
value of the problem; its two layouts are that dimension right behind the batch, or innermost. What a node costs in each:

    convolution       its best form in that layout; a form that nothing is known of pins the layout that the rule takes
    view, permute     nothing, or a copy in the layout in which it cannot be a view
    group_norm        its bytes; in channels_last twice that, for ATen's and Inductor's reductions (H200), unless pvae's kernel
                      (fuse_norm_act.py) takes it
    nearest upsample  interpreted: its bytes, in channels_last 2.4 times that (sglang #38182); Inductor fuses it
    product on tokens a copy unless channels are innermost
    input             a copy, unless it comes so; only compiled code's own caches come in any
    result            a copy, unless eager returns it so; caches are stored as the graph works
    anything else     the same in both

Reading a value in the other layout is one copy of it, however many read it so. Inductor fuses some of these copies into
what stands before or behind, so conversions are rather overrated: a layout changes only for a clear gain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from pvae.kernels import conv_taps, wide_attention
from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.passes.conv_forms import Forms
from pvae.passes.enlarged import UPSAMPLES
from pvae.passes.ir import VIEW_OPS, aten, output_node, value
from pvae.passes.layout_cut import CHANNELS_LAST, CONTIGUOUS, IMPOSSIBLE, LayoutProblem

LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
REDUCES = 8  # times fewer results than inputs
NORM_CHANNELS_LAST, UPSAMPLE_CHANNELS_LAST = 2.0, 2.4
PRODUCTS = frozenset({aten.linear.default, aten.matmul.default, aten.addmm.default, aten.mm.default, aten.bmm.default})


def layout_problem(
    graph: Graph,
    forms: Mapping[Node, Forms],
    copy: float,
    *,
    interpreted: bool,
    own_norms: bool,
    weights: Collection[str],
    free_outputs: Collection[int],
) -> tuple[LayoutProblem, dict[Node, Node]]:
    """The problem of a graph whose sizes are all known; `copy` is bytes/s, read and written together.

    `interpreted`: Inductor fuses nothing; `own_norms`: pvae's kernels take norms in channels_last.
    The values of the problem are nodes. `free_outputs` are results that may come in either layout. Also returned: which
    value each one is laid out like, if nothing else is done.
    """
    problem = LayoutProblem()
    channel: dict[Node, int] = {}  # the channel dimension of every value
    like: dict[Node, Node] = {}

    def ms(x: Node, times: float = 2.0) -> float:
        tensor = value(x)
        return 1e3 * times * tensor.numel() * tensor.element_size() / copy

    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.op == "placeholder":
            if value(node).dim() in (4, 5) and node.name not in weights:
                channel[node] = 1
                problem.add(node, *_as_it_comes(node, ms(node)))
            continue
        found = forms.get(node)
        read = node.all_input_nodes if found is None else [found.conv.x]
        inputs = [n for n in read if n in channel]
        if found is not None:
            channel[node] = 1
            problem.add(node, *_of_forms(found))
        elif inputs:
            source = max(inputs, key=lambda n: value(n).numel())
            dim, costs = _followed(node, source, channel[source])
            if node.target is aten.group_norm.default and not own_norms:
                costs = 2.0, 2.0 * NORM_CHANNELS_LAST
            elif node.target in UPSAMPLES and interpreted:
                costs = 1.25, 1.25 * UPSAMPLE_CHANNELS_LAST
            if dim is None:
                # Rows as they are written are wanted by what makes as much of them; a reduction takes any order.
                for n in (n for n in inputs if REDUCES * value(node).numel() >= value(n).numel()):
                    problem.add(n, *(ms(n) * (not row_major(value(n).dim(), channel[n], at)) for at in LAYOUTS))
                continue
            channel[node] = dim
            like[node] = source
            problem.add(node, *(ms(node, times) for times in costs))
        for n in inputs:
            problem.read(n, node, ms(n))
    leaves = torch.utils._pytree.tree_leaves(output_node(graph).args)
    for index, leaf in enumerate(leaves):
        if leaf in channel and index not in free_outputs and leaf.op != "placeholder":
            problem.add(leaf, *_as_it_comes(leaf, ms(leaf)))
    return problem, like


def _of_forms(found: Forms) -> tuple[float, float]:
    """What a convolution costs in each layout. Nothing known: it stays where the rule puts it."""
    best = [found.best(layout) for layout in LAYOUTS]
    if found.ruled.ms is None:
        return tuple(0.0 if layout == found.ruled.layout else IMPOSSIBLE for layout in LAYOUTS)  # type: ignore[return-value]
    costs = [IMPOSSIBLE if form is None or form.ms is None else form.ms for form in best]
    return costs[0], costs[1]


def _as_it_comes(node: Node, conversion: float) -> tuple[float, float]:
    """(contiguous, channels_last): a copy where `node`, by the strides that it has, is in the other layout."""
    val = value(node)
    last = val.dim() in FORMATS and is_channels_last(val)
    if last == val.is_contiguous():
        return 0.0, 0.0  # both, or neither
    return (conversion, 0.0) if last else (0.0, conversion)


def order(ndim: int, channel: int, layout: str) -> list[int]:
    """Dimensions from the outermost in memory: the channels behind the first one, or innermost."""
    others = [d for d in range(ndim) if d not in (0, channel)]
    if channel == 0:
        return [0, *others] if layout == CONTIGUOUS else [*others, 0]
    return [0, channel, *others] if layout == CONTIGUOUS else [0, *others, channel]


def row_major(ndim: int, channel: int, layout: str) -> bool:
    return order(ndim, channel, layout) == list(range(ndim))


def _in_order(shape: Any, dims: list[int]) -> torch.Tensor:
    """A tensor without values, dense, whose dimensions lie in memory as `dims` says."""
    inverse = [dims.index(d) for d in range(len(dims))]
    return torch.empty([shape[d] for d in dims], device="meta").permute(inverse)


def _lies(x: torch.Tensor, dims: list[int]) -> bool:
    """Whether the memory of `x` goes through its dimensions in that order, gaps allowed."""
    steps = [x.stride(d) for d in dims if x.shape[d] > 1]
    return all(a >= b for a, b in pairwise(steps))


def _followed(node: Node, source: Node, channel: int) -> tuple[int | None, tuple[float, float]]:
    """Where the channels of `source` are in `node`, and how often its bytes move in each layout; None where they are lost."""
    val, target = value(node), node.target
    if target in VIEW_OPS or target in (aten.unflatten.int, aten.flatten.using_ints, aten.movedim.intlist):
        return _viewed(node, source, channel)
    if val.dim() != value(source).dim():
        return None, (0.0, 0.0)
    if target is conv_taps.OP:
        return 1, (4.0, 0.0)  # it copies in and out
    if target in PRODUCTS:
        return (channel, (2.0, 0.0)) if channel == val.dim() - 1 else (None, (0.0, 0.0))
    if target in (aten.scaled_dot_product_attention.default, wide_attention.OP):
        return None, (0.0, 0.0)
    return channel, (0.0, 0.0)


def _viewed(node: Node, source: Node, channel: int) -> tuple[int | None, tuple[float, float]]:
    """A view, tried in both layouts: where the channels come out, and which layout needs a copy for it."""
    x = value(source)
    laid = [_in_order(x.shape, order(x.dim(), channel, layout)) for layout in LAYOUTS]
    views = [_try_view(node, source, tensor) for tensor in laid]
    # The channels are where their stride is found again, in the layout that the view works in.
    at = 1 if views[1] is not None else 0
    seen, step = views[at], laid[at].stride(channel)
    if seen is None or seen.shape != value(node).shape:
        return None, (0.0, 0.0)
    found = [d for d in range(seen.dim()) if seen.shape[d] == x.shape[channel] and seen.stride(d) == step]
    if not found:
        return None, (0.0, 0.0)
    dim = channel if channel in found else found[0]
    fits = [y is not None and _lies(y, order(y.dim(), dim, layout)) for y, layout in zip(views, LAYOUTS, strict=True)]
    return dim, (0.0 if fits[0] else 2.0, 0.0 if fits[1] else 2.0)


def _try_view(node: Node, source: Node, x: torch.Tensor) -> torch.Tensor | None:
    """The view of `x`, or None where it needs a copy."""
    target = aten.view.default if node.target is aten.reshape.default else node.target
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: x if n is source else value(n))
    assert callable(target)
    try:
        y = target(*args, **kwargs)
    except (RuntimeError, ValueError):
        return None  # "view size is not compatible with input tensor's size and stride"; where a fake mode is on, ValueError
    return y if isinstance(y, torch.Tensor) else None
