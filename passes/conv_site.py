"""What stands around a convolution and can be computed with it: a zero pad and a causal cache in front, a sum behind.

silu(conv(pad(cat([cache, x], 2)), w, b) + r)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from pvae.passes.canonicalize import same
from pvae.passes.ir import ConvNode, PadNode, aten, is_tensor, known, only_user, value

Pads = tuple[tuple[int, int], ...]  # (front, back) of each spatial dimension, the first one first
ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True)
class Site:
    """A convolution and what is absorbed: what it reads, in front of that, its padding, and what follows."""

    conv: ConvNode
    x: Node
    before: Node | None
    padding: Pads
    last: Node  # the node that is replaced
    residual: Node | None
    activation: str


def site_of(conv: ConvNode) -> Site:
    """What `conv_taps` can take in from around `conv`."""
    x, before, padding = front_of(conv)
    last: Node = conv.node
    residual, activation = None, "none"
    user = only_user(last)
    if user is not None and user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
        other = user.args[1] if user.args[0] is last else user.args[0]
        if is_tensor(other) and other is not last and same(other, last) and same(user, last):
            last, residual = user, other
            user = only_user(last)
    if user is not None and user.target in ACTIVATIONS and same(user, last):
        last, activation = user, ACTIVATIONS[user.target]
    return Site(conv, x, before, padding, last, residual, activation)


def passes_besides(conv: ConvNode, form: str, interpreted: bool) -> dict[str, int]:
    """Bytes that are moved besides the convolution where it is computed as `form`, by what for; `taps` takes all of it in.

    On GPUs torch adds a bias in a pass of its own, which Inductor fuses with the sum and activation behind; `linear` leaves
    it to cuBLAS, but for groups. Where all that follows is pointwise that pass is needed in any case (unless `interpreted`).
    A cache and a pad that the convolution cannot do are a copy of its input, unless others read that too; `unfold2d` pads
    by itself.
    """
    if form == "taps":
        return {}
    site, moved = site_of(conv), dict[str, int]()
    names = ["bias"] if conv.bias is not None and (form != "linear" or conv.groups > 1) else []
    names += ["residual"] if site.residual is not None else []
    names += [site.activation] if site.activation != "none" else []
    follows = not interpreted and bool(site.last.users) and all(map(_pointwise, site.last.users))
    if names and not follows:
        moved[" and ".join(names)] = (3 if site.residual is not None else 2) * _bytes(conv.node)
    pad = PadNode.of(conv.x)
    uneven = any(front != back for front, back in conv.padding)
    padded = uneven or (pad is not None and zero_pad(pad, conv.ndim))
    names = ["cache"] if site.before is not None else []
    names += ["pad"] if padded and form != "unfold2d" else []
    if names and len(conv.x.users) == 1:
        moved[" and ".join(names)] = 2 * _bytes(conv.x)
    return moved


def _pointwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _bytes(node: Node) -> int:
    val: torch.Tensor = value(node)
    return val.numel() * val.element_size()


def front_of(conv: ConvNode) -> tuple[Node, Node | None, Pads]:
    """What the convolution reads behind a zero pad and a causal cache: x, the cache, and all its padding."""
    x, pads = conv.x, conv.padding
    pad = PadNode.of(x)
    if pad is not None and zero_pad(pad, conv.ndim):
        x = pad.x
        outer = [pad.along(conv.ndim - 1 - dim) for dim in range(conv.ndim)]
        pads = tuple((a + front, b + back) for (a, b), (front, back) in zip(outer, pads, strict=True))
    return *_joined(x), pads


def zero_pad(pad: PadNode, spatial: int) -> bool:
    """Whether a convolution of so many spatial dimensions may take over the pad: zeros, and none of them elsewhere."""
    inner, outer = pad.pads[:spatial], pad.pads[spatial:]
    return (
        pad.mode == "constant"
        and pad.fill == 0.0
        and all(w >= 0 for pair in inner for w in pair)
        and all(pair == (0, 0) for pair in outer)
    )


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
