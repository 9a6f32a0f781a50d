"""Convolutions on tensor cores without a padded copy: `pvae::conv_taps` takes what stands around each one.

    conv(pad(cat([cache, x], 2)), w, b) + r  ->  conv_taps(x, cache, channels_last(w), b, r, ...)

Zero pads on any side, a causal cache in front, the residual sum behind it and an activation are the kernel's own; each
would be a pass over memory. The cache is not joined to x: the kernel reads both where they lie. Which convolutions are
rewritten is the policy's choice (conv_policy.py); kernels/conv_taps.py says what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from pvae.kernels import channels_last
from pvae.kernels import conv_taps as kernel
from pvae.passes.conv_policy import chosen
from pvae.passes.ir import Builder, ConvNode, PadNode, aten, known, repropagate, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Report, Rule

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True)
class Site:
    """A convolution and what is absorbed: what it reads, in front of that, its padding, and what follows."""

    conv: ConvNode
    x: Node
    before: Node | None
    padding: list[int]  # (front, back) a spatial dimension
    last: Node  # the node that is replaced
    residual: Node | None
    activation: str


def site_of(conv: ConvNode) -> Site:
    """What `conv_taps` can take in from around `conv`."""
    x, padding = _unpadded(conv)
    x, before = _joined(x)
    last: Node = conv.node
    residual, activation = None, "none"
    user = _only_user(last)
    if user is not None and user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
        other = user.args[1] if user.args[0] is last else user.args[0]
        if isinstance(other, Node) and other is not last and _alike(other, last) and _alike(user, last):
            last, residual = user, other
            user = _only_user(last)
    if user is not None and user.target in ACTIVATIONS and _alike(user, last):
        last, activation = user, ACTIVATIONS[user.target]
    return Site(conv, x, before, padding, last, residual, activation)


def _unpadded(conv: ConvNode) -> tuple[Node, list[int]]:
    """What the convolution reads before a zero pad, and that pad with its own: (front, back) from the first dimension."""
    pad = PadNode.of(conv.x)
    zeros = pad is not None and pad.mode == "constant" and pad.fill == 0.0
    if pad is None or not zeros or len(pad.pads) > conv.ndim or any(w < 0 for pair in pad.pads for w in pair):
        return conv.x, [w for pair in conv.padding for w in pair]
    widths: list[int] = []
    for dim, own in enumerate(conv.padding):
        widths += [a + b for a, b in zip(pad.along(conv.ndim - 1 - dim), own, strict=True)]
    return pad.x, widths


def _joined(x: Node) -> tuple[Node, Node | None]:
    """(x, cache) of `cat([cache, x], 2)` of one video, else (x, None)."""
    if x.target is not aten.cat.default or value(x).dim() != 5 or not known(value(x).shape[0] == 1):
        return x, None
    parts, dim = x.args[0], x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (2, -3):
        return x, None
    cache, rest = parts
    assert isinstance(cache, Node) and isinstance(rest, Node)
    if cache is rest or value(cache).dtype != value(rest).dtype:
        return x, None
    # `cat` leaves out what is empty, of one dimension or more.
    videos = value(cache).dim() == value(rest).dim() == 5
    return (rest, cache) if videos and known(value(cache).shape[2] > 0) else (x, None)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(a: Node, b: Node) -> bool:
    """Whether two tensors have the same dtype, device and sizes."""
    x, y = value(a), value(b)
    if not isinstance(x, torch.Tensor) or x.dtype != y.dtype or x.device != y.device or x.dim() != y.dim():
        return False
    return all(known(p == q) for p, q in zip(x.shape, y.shape, strict=True))


class ConvTaps:
    """`conv(pad(cat([cache, x])), w, b) + r` -> `pvae::conv_taps(x, cache, w, b, r)`."""

    name = "taps"

    def __init__(self, context: Context, form: str | None) -> None:
        self.context, self.form = context, form

    def match(self, node: Node) -> Match | Refusal | None:
        conv, choice = ConvNode.of(node), chosen(node, self.context, self.form)
        if conv is None or choice is None:
            return None
        reason = choice.why_not(self.name)
        if reason is not None:
            return Refusal(node, reason)
        site = site_of(conv)
        parts = [f"{conv.in_channels} -> {conv.out_channels} channels"]
        parts += [what for what, there in (("cache", site.before), ("residual", site.residual)) if there is not None]
        parts += [site.activation] if site.activation != "none" else []
        return Match(node, (site, choice.config), ", ".join(parts))

    def rewrite(self, graph: Graph, match: Match) -> None:
        site, config = match.facts
        conv, build = site.conv, Builder(site.last)
        weight = conv.weight
        if not channels_last.is_channels_last(value(weight)):
            weight = build(channels_last.OP, weight)
        build.replace(
            build(
                kernel.OP,
                site.x,
                site.before,
                weight,
                conv.bias,
                site.residual,
                list(conv.stride),
                site.padding,
                list(conv.dilation),
                False,
                site.activation,
                list(config),
            )
        )


def _refresh_strides(graph: Graph, context: Context, report: Report) -> None:
    """What follows a rewritten convolution is channels_last as well: later passes read that in the meta."""
    if report.changed:
        graph.eliminate_dead_code()
        repropagate(graph.nodes)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [ConvTaps(context, settings.get("form"))]


CONV_TAPS = Pass(
    name="conv_taps",
    summary="convolutions as shifted matrix products, with their pads, caches, residuals and activations",
    rules=_rules,
    options={"form": "auto|taps"},
    after=_refresh_strides,
)
