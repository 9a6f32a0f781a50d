"""Convolutions on tensor cores without a padded copy: `pvae::conv_taps` takes what stands around each one.

    conv(pad(cat([cache, x], 2)), w, b) + r  ->  conv_taps(x, cache, channels_last(w), b, r, ...)

Zero pads on any side, a causal cache in front, the residual sum behind it and an activation are the kernel's own; each
would be a pass over memory. The cache is not joined to x: the kernel reads both where they lie. Which convolutions are
rewritten is the policy's choice (conv_policy.py); kernels/conv_taps.py says what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, Node

from pvae.kernels import channels_last
from pvae.kernels import conv_taps as kernel
from pvae.passes.conv_policy import chosen
from pvae.passes.conv_site import site_of
from pvae.passes.ir import Builder, ConvNode, value
from pvae.passes.rule import Context, Match, Pass, Refusal, Rule, refresh_strides


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
                [width for pair in site.padding for width in pair],
                list(conv.dilation),
                False,
                site.activation,
                list(config),
            )
        )


def _rules(context: Context, settings: Mapping[str, str]) -> list[Rule]:
    return [ConvTaps(context, settings.get("form"))]


CONV_TAPS = Pass(
    name="conv_taps",
    summary="convolutions as shifted matrix products, with their pads, caches, residuals and activations",
    rules=_rules,
    options={"form": "auto|taps"},
    after=refresh_strides,
)
