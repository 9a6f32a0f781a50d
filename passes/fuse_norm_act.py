"""Norm, activation and border of an autoencoder's activations as one kernel on channels-last memory.

    silu(group_norm(x)) -> replicate-pad -> conv     ->   conv(group_norm_act(x, ..., padding=...))
    normalize(x, 1) * scale * gamma + 0 -> silu      ->   channel_norm_act(x, gamma, None, "l2", ...)
    group_norm(x) * nearest(y) + nearest(b)          ->   group_norm_act(x, ..., scale=y, shift=b)

x is read once (twice by a group norm) and the result written once, with its border, instead of once a step.
passes/channel_norm.py says which spellings are read; the kernels are kernels/channel_norm_act.py and group_norm_act.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, Node

from pvae.kernels.channel_norm_act import OP as CHANNEL_NORM
from pvae.kernels.channel_norm_config import MAX_CHANNELS
from pvae.kernels.group_norm_act import OP as GROUP_NORM
from pvae.kernels.norm_launch import FLOATS
from pvae.passes.channel_norm import Chain, chains, is_innermost, norm_of, with_border
from pvae.passes.enlarged import Enlarged
from pvae.passes.ir import Builder, aten, known, repropagate, value
from pvae.passes.modulation_ops import TRITON_DEVICES
from pvae.passes.rule import Context, Match, Pass, Refusal, Report, Rule


class FuseNormAct:
    """A norm over channels or groups of them, with its affine, scale and shift, activation and border -> one op."""

    name = "norm_act"

    def __init__(self, forced: bool) -> None:
        self.forced = forced

    def match(self, node: Node) -> Match | Refusal | None:
        start = norm_of(node)
        if start is None:
            return None
        if isinstance(start, str):
            return Refusal(node, start)
        reason = None if self.forced else _unsuitable(start.x)
        if reason is not None:
            return Refusal(node, reason)
        dtype = value(start.x).dtype
        ends = [c for c in chains(start, innermost=not self.forced) if not c.last and value(c.node).dtype == dtype]
        if not ends:
            return Refusal(
                node, f"x is {dtype}, and what follows stays {value(start.node).dtype} or channels-last in name"
            )
        if ends[-1].narrow and dtype.itemsize > 4:
            return Refusal(node, f"it rounds {dtype} to less inside")
        found = with_border(ends[-1]) or ends[-1]
        return Match(node, found, _note(found))

    def rewrite(self, graph: Graph, match: Match) -> None:
        chain = match.facts
        build = Builder(chain.node)
        build.replace(_op(build, chain))


def _unsuitable(x: Node) -> str | None:
    """Why x is better left to Inductor, or None."""
    val = value(x)
    if val.device.type not in TRITON_DEVICES:
        return f"no kernel runs on {val.device.type}"
    if val.dtype not in FLOATS:
        return f"x is {val.dtype}"
    if not is_innermost(val):
        return "x is not channels-last"
    if not known(val.shape[1] <= MAX_CHANNELS):
        return f"more than {MAX_CHANNELS} channels"
    return None


def _note(chain: Chain) -> str:
    parts = [f"{chain.kind} norm" + (" of frames" if chain.per_frame else "")]
    for name in ("scale", "shift"):
        operand = getattr(chain, name)
        if operand is not None:
            parts.append(f"enlarged {name}" if isinstance(operand, Enlarged) else name)
    if chain.activation != "none":
        parts.append(chain.activation)
    if any(chain.widths):
        parts.append(f"{_mode(chain)} border")
    return " + ".join(parts)


def _mode(chain: Chain) -> str:
    """One mode for all dimensions, or one for each with commas between."""
    spatial = value(chain.x).dim() - 2
    used = {mode for i, mode in enumerate(chain.modes) if any(chain.widths[2 * i : 2 * i + 2])}
    return used.pop() if len(used) == 1 else ",".join(chain.modes[3 - spatial :])


def _op(build: Builder, chain: Chain) -> Node:
    rank = value(chain.x).dim()
    weight, bias = (_vector(build, node) for node in (chain.weight, chain.bias))
    more: dict[str, Any] = {}
    for name in ("scale", "shift"):
        operand = getattr(chain, name)
        if isinstance(operand, Enlarged):
            more[name] = operand.low(build)
        elif operand is not None:
            more[name] = _aligned(build, operand, rank)
    if any(chain.widths):
        more |= {"padding": list(chain.widths[2 * (5 - rank) :]), "mode": _mode(chain)}
    result: Node
    if chain.kind == "group":
        more |= {"per_frame": True} if chain.per_frame else {}
        result = build(GROUP_NORM, chain.x, chain.groups, weight, bias, chain.eps, chain.activation, **more)
    else:
        arguments = (chain.kind, chain.eps, chain.factor, chain.activation)
        result = build(CHANNEL_NORM, chain.x, weight, bias, *arguments, **more)
    return result


def _vector(build: Builder, node: Node | None) -> Node | None:
    """A weight or bias, in whatever shape it broadcasts, as [C]."""
    if node is None or value(node).dim() == 1:
        return node
    flat: Node = build(aten.reshape.default, node, [-1])
    return flat


def _aligned(build: Builder, node: Node, rank: int) -> Node:
    """A scale or shift with all dimensions of x: [C], [C, 1, 1] and the like get theirs in front, and behind."""
    missing = rank - value(node).dim()
    if missing == 0:
        return node
    for _ in range(missing):
        node = build(aten.unsqueeze.default, node, 0)
    return node


def _refresh(graph: Graph, context: Context, report: Report) -> None:
    """Layouts are decided by strides, which the verifier keeps up to date where it is on."""
    if context.options.verify == "off":
        repropagate(list(graph.nodes))


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    choice = settings.get("when", context.options.norm_act)
    return [] if choice == "off" else [FuseNormAct(choice == "on")]


FUSE_NORM_ACT = Pass(
    name="fuse_norm_act",
    summary="norm + activation + border of channels-last activations as one op",
    rules=_rules,
    options={"when": "auto|on|off"},
    before=_refresh,
)

__all__ = ["FUSE_NORM_ACT"]
