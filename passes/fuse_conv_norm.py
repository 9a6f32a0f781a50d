"""A norm over channels joins the convolution whose result it reads: `conv_taps` -> `channel_norm_act` -> `conv_taps_norm`.

Where one program of the convolution holds all channels of a position (kernels/conv_taps_norm.py), the norm costs its own
result's bytes and nothing else. What else reads the convolution, as a residual sum, gets it from the same launch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from pvae.kernels import conv_taps_norm as kernel
from pvae.kernels.channel_norm_act import OP as NORM
from pvae.kernels.conv_taps import OP as TAPS
from pvae.kernels.conv_taps_launch import why_no_norm
from pvae.passes.ir import Builder, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule

NORM_ARGUMENTS = ("x", "weight", "bias", "norm", "eps", "factor", "activation", "padding", "mode", "scale", "shift")
NORM_DEFAULTS = {"factor": 1.0, "activation": "none", "padding": None, "mode": "constant", "scale": None, "shift": None}
KINDS = ("rms", "l2")


@dataclass(frozen=True)
class Found:
    conv: Node
    norm: Mapping[str, object]
    keep: bool


class JoinNorm:
    """`channel_norm_act(conv_taps(...), w, b, ...)` -> the second result of `conv_taps_norm(...)`."""

    name = "conv_norm"

    def __init__(self, forced: bool) -> None:
        self.forced = forced

    def match(self, node: Node) -> Match | Refusal | None:
        if node.target is not NORM:
            return None
        norm = {**NORM_DEFAULTS, **dict(zip(NORM_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        conv = norm["x"]
        if not isinstance(conv, Node) or conv.target is not TAPS:
            return None
        reason = self._why_not(conv, norm)
        if reason is not None:
            return Refusal(node, reason)
        keep = len(conv.users) > 1
        return Match(node, Found(conv, norm, keep), "and its argument" if keep else "")

    def _why_not(self, conv: Node, norm: Mapping[str, object]) -> str | None:
        x, upsample, activation = conv.args[0], conv.args[8], conv.args[9]
        assert isinstance(x, Node)
        if norm["norm"] not in KINDS:
            return f"{norm['norm']} norm: its kernel of its own"
        if any(norm[name] is not None for name in ("padding", "scale", "shift")):
            return "it has a border, scale or shift"
        if upsample or activation != "none":
            return "the convolution enlarges, or has an activation"
        if any(user.target is NORM and user is not next(iter(conv.users)) for user in conv.users):
            return "another norm reads the convolution"
        if self.forced:
            return None
        return why_no_norm(value(x), value(conv.args[2]), value(conv))  # type: ignore[arg-type]

    def rewrite(self, graph: Graph, match: Match) -> None:
        found: Found = match.facts
        conv, norm = found.conv, found.norm
        for name in ("weight", "bias"):
            _hoist(norm[name], conv)
        build = Builder(conv)
        arguments = (*conv.args[:8], conv.args[10], *(norm[n] for n in NORM_ARGUMENTS[1:7]), found.keep)
        both = build(kernel.OP, *arguments)
        y, z = build(operator.getitem, both, 0), build(operator.getitem, both, 1)
        Builder(match.node).replace(z)
        if found.keep:
            build.replace(y)


def _hoist(node: object, anchor: Node) -> None:
    """Move a norm's weight, and the views that it is, in front of `anchor`; what stands there already stays."""
    if not isinstance(node, Node) or node.op != "call_function" or node < anchor:
        return
    for source in node.all_input_nodes:
        _hoist(source, anchor)
    anchor.prepend(node)


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [JoinNorm(settings.get("where") == "any")]


FUSE_CONV_NORM = Pass(
    name="fuse_conv_norm",
    summary="norms over channels in the convolutions that they read, where one program holds all channels",
    rules=_rules,
    options={"where": "auto|any"},
)
