"""channels_last where the policy chose it (conv_policy.py): convolution weights are re-laid, and the activations follow.

Inductor and cuDNN both take a convolution's layout from its weight, so nothing else has to be rewritten: with every weight
in channels_last the whole region between them stays so. The reverse needs copies: one channels_last operand is enough for
cuDNN to work so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, Node

from pvae.kernels import channels_last as kernel
from pvae.kernels.compact import OP as COMPACT
from pvae.kernels.conv3d_unfold import OP as UNFOLD
from pvae.kernels.conv_taps import OP as TAPS
from pvae.passes.conv_forms import layout_mode
from pvae.passes.conv_policy import chosen
from pvae.passes.conv_rules import no_gain
from pvae.passes.ir import Builder, ConvNode, aten, value
from pvae.passes.layout_cut import CHANNELS_LAST as LAST
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule
from pvae.runtime.fetch import fetch

OURS = {UNFOLD: 1, TAPS: 2}  # where our convolutions have their weight
FETCH_ARGUMENTS = 8  # of `fetch` with its memory format given


def mode(options: Any) -> str:
    """What the options ask for, taken together: "auto", "on" or "off"."""
    return layout_mode(options.conv3d, options.channels_last)


class WeightChannelsLast:
    """`conv(x, w)` -> `conv(x, pvae::channels_last(w))`."""

    name = "channels_last"

    def __init__(self, context: Context, forced: bool) -> None:
        self.context = context
        self.forced = forced

    def match(self, node: Node) -> Match | Refusal | None:
        conv, choice = ConvNode.of(node), chosen(node, self.context)
        if conv is None or choice is None:
            return None
        if laid_last(conv.weight):
            return None
        if not self.forced and choice.layout != LAST:
            return Refusal(node, choice.why_not("channels_last") or f"{choice.layout} is chosen")
        return Match(node, conv)

    def rewrite(self, graph: Graph, match: Match) -> None:
        conv = match.facts
        weight = Builder(match.node)(kernel.OP, conv.weight)
        match.node.replace_input_with(conv.weight, weight)


class InputsContiguous:
    """`conv(x, w)` -> `conv(compact(x), compact(w))` where figures speak against channels_last, and these are in it."""

    name = "contiguous"

    def __init__(self, context: Context) -> None:
        self.context = context

    def match(self, node: Node) -> Match | Refusal | None:
        conv, choice = ConvNode.of(node), chosen(node, self.context)
        if conv is None or choice is None or choice.form != "native" or not choice.against("channels_last"):
            return None
        operands = [conv.weight] if laid_last(conv.weight) else []
        operands += [conv.x] if choice.converted else []
        return Match(node, operands) if operands else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        build = Builder(match.node)
        for operand in match.facts:
            match.node.replace_input_with(operand, build(COMPACT, operand, list(range(value(operand).dim()))))


def laid_last(x: Node) -> bool:
    """Whether the strides of `x` are channels_last and nothing else."""
    val = value(x)
    return val.dim() in kernel.FORMATS and kernel.is_channels_last(val) and not val.is_contiguous()


def works_channels_last(graph: Graph) -> bool:
    """Whether a convolution of this graph, torch's or one of ours, has a channels_last weight."""
    return any(laid_last(weight) for weight in map(conv_weight, graph.nodes) if weight is not None)


def conv_weight(node: Node) -> Node | None:
    """The weight of a convolution, torch's or one of ours; None of any other node."""
    conv = ConvNode.of(node)
    if conv is not None:
        return conv.weight
    weight: Any = node.args[OURS[node.target]] if node.target in OURS else None
    return weight


def reads_last(user: Node) -> bool:
    """Whether `user` is a convolution, or has its operand copied to channels_last for one."""
    copied = user.target is aten.contiguous.default and user.kwargs.get("memory_format") in kernel.FORMATS.values()
    return copied or conv_weight(user) is not None


class FetchChannelsLast:
    """`conv(fetch(x))` -> `conv(fetch(x, channels_last=True))`: rows travel and arrive in the order that the convolution reads.

    Decided by what every rank knows alike, never by the strides of a piece.
    """

    name = "fetch"

    def __init__(self, forced: bool) -> None:
        self.forced = forced

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target is not fetch or node.kwargs or len(node.args) == FETCH_ARGUMENTS:
            return None
        if not any(map(reads_last, node.users)):
            return None
        x = value(node)
        reason = None if self.forced else no_gain(x)
        return Match(node) if reason is None and x.dim() in kernel.FORMATS else None

    def rewrite(self, graph: Graph, match: Match) -> None:
        node = match.node
        build = Builder(node)
        build.replace(build(fetch, *node.args, True))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    choice = settings.get("layout", mode(context.options))
    forced = choice == "on"
    if choice == "off":
        return []
    own = [] if forced else [InputsContiguous(context)]
    return [*own, WeightChannelsLast(context, forced), FetchChannelsLast(forced)]


CHANNELS_LAST = Pass(
    name="channels_last",
    summary="convolution weights in channels_last, so that activations stay so between convolutions",
    rules=_rules,
    options={"layout": "auto|on|off"},
)

__all__ = ["CHANNELS_LAST", "mode", "no_gain"]
