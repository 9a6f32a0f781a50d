"""A normalisation of activations [N, C, *spatial], however it is written, with what follows it, as one typed view.

    norm -> [* number] -> [* weight] -> [+ bias] -> [* scale] -> [+ shift] -> [activation] -> [borders]

What autoencoders write for norm: `normalize(x, dim=1)`, `x * rsqrt(mean(x * x, 1) + eps)` and `x / sqrt(...)`, the same or
`layer_norm` between `movedim(1, -1)` and `movedim(-1, 1)`, `group_norm`, and `group_norm` of frames folded into the batch,
in chunks or not. Casts may stand anywhere. Borders are `pad`, and frames repeated by `cat`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from pvae.kernels.channel_norm_layout import NO_PADDING
from pvae.passes.enlarged import NOTHING, Enlarged, enlarged
from pvae.passes.frame_norm import FrameNorm
from pvae.passes.ir import CASTS, CATS, ConvNode, PadNode, aten, is_tensor, known, only_user, value
from pvae.passes.norm_node import NormNode, before_widening

ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}
RESULT, VECTOR, SAMPLE, LIKE = "result", "vector", "sample", "like"


@dataclass(frozen=True)
class Chain:
    """What was found so far; `node` is the value it ends with, `x` what goes in before casts to a wider type.

    weight and bias are vectors of C numbers in any shape that broadcasts; scale and shift those, [N, C, 1, ...], like x, or
    what is like x once enlarged.
    widths are (front, back) for T, H and W, modes one for each. `last`: the channels of `node` are its last dimension.
    """

    node: Node
    x: Node
    kind: str
    eps: float
    factor: float = 1.0
    weight: Node | None = None
    bias: Node | None = None
    groups: int = 1
    per_frame: bool = False
    last: bool = False
    scale: Node | Enlarged | None = None
    shift: Node | Enlarged | None = None
    activation: str = "none"
    widths: tuple[int, ...] = NO_PADDING
    modes: tuple[str, ...] = ("constant",) * 3
    narrow: bool = False  # something in it was rounded to less than x has

    @property
    def channels(self) -> Any:
        return value(self.x).shape[1]

    def operand_kind(self, node: Node) -> str:
        """How `node` broadcasts against the value that the chain ends with: a vector, one a sample, like it, or not."""
        shape, other = list(value(self.node).shape), list(value(node).shape)
        if not value(node).is_floating_point() or len(other) > len(shape):
            return ""
        other = [1] * (len(shape) - len(other)) + other
        axis = len(shape) - 1 if self.last else 1
        if not known(other[axis] == self.channels):
            return ""
        rest = [i for i in range(len(shape)) if i != axis]
        if all(known(other[i] == 1) for i in rest):
            return VECTOR
        if self.last:
            return ""
        if all(known(other[i] == 1) for i in rest[1:]):
            return SAMPLE if known(other[0] == shape[0]) else ""
        return LIKE if all(known(a == b) for a, b in zip(other, shape, strict=True)) else ""


def norm_of(node: Node) -> Chain | str | None:
    """The chain that begins with the norm that `node` is; None if it is none; a reason if it is one not handled here."""
    if node.op != "call_function" or not is_tensor(node) or not value(node).is_floating_point():
        return None
    match node.target:
        case aten.group_norm.default:
            return _group(node)
        case aten.layer_norm.default | aten.rms_norm.default:
            return _over_last(node)
        case aten.div.Tensor | aten.mul.Tensor:
            return _by_hand(node)
    return None


def _group(node: Node) -> Chain | str | None:
    frames = FrameNorm.of(node)
    if frames is not None:
        if node is not frames.pieces[-1]:
            return None  # the last piece stands for all
        x, end = frames.x, frames.end
    else:
        x, end = node.args[0], node
    assert isinstance(x, Node)
    if value(x).dim() not in (4, 5):
        return f"group norm of {value(x).dim()} dimensions, neither pictures nor videos"
    names = ("input", "num_groups", "weight", "bias", "eps")
    defaults = (None, None, None, None, 1e-5)
    given = [*node.args, *defaults[len(node.args) :]]
    _, groups, weight, bias, eps = (node.kwargs.get(n, a) for n, a in zip(names, given, strict=False))
    widened = before_widening(x)
    chain = Chain(end, widened, "group", float(eps), 1.0, weight, bias, groups, per_frame=frames is not None)
    return replace(chain, narrow=_narrow([x], widened))


def _over_last(node: Node) -> Chain | None:
    norm = NormNode.of(node)
    source = _moved_back(norm.x) if isinstance(norm, NormNode) else None
    if source is None or not isinstance(norm, NormNode):
        return None
    chain = Chain(node, source, norm.kind, norm.eps, weight=norm.weight, bias=norm.bias, last=True)
    return replace(chain, narrow=_narrow([node, *node.all_input_nodes[:1]], source))


def _by_hand(node: Node) -> Chain | None:
    """`x / clamp_min(norm(x), eps)`, `x * rsqrt(mean(x * x) + eps)` and `x / sqrt(...)`, over dimension 1 or the last."""
    pair = node.args
    if len(pair) != 2 or node.kwargs or not all(isinstance(a, Node) and is_tensor(a) for a in pair):
        return None
    for x, divisor in (pair,) if node.target is aten.div.Tensor else (pair, pair[::-1]):
        assert isinstance(x, Node) and isinstance(divisor, Node)
        found = _divisor(divisor, multiplied=node.target is aten.mul.Tensor)
        if found is None:
            continue
        kind, eps, inner, dim, between = found
        source = before_widening(x)
        if _uncast(inner) is not _uncast(x):
            continue
        rank = value(x).dim()
        last = dim % rank == rank - 1
        if last:
            moved = _moved_back(source)
            if moved is None:
                continue
            source = moved
        elif dim % rank != 1:
            continue
        if value(source).dim() in (4, 5):
            return Chain(node, source, kind, eps, last=last, narrow=_narrow([node, x, *between], source))
    return None


def _divisor(node: Node, multiplied: bool) -> tuple[str, float, Node, int, list[Node]] | None:
    """(kind, eps, x, dimension, nodes between) where `node` is a norm's divisor of x, or its inverse if `multiplied`."""
    between = [node]

    def inner(of: Any) -> Any:
        while isinstance(of, Node) and of.target in CASTS | {aten.expand.default}:
            between.append(of)
            of = of.args[0]
        if isinstance(of, Node):
            between.append(of)
        return of

    node = inner(node)
    if node.target is aten.clamp_min.default and not multiplied:
        eps, norm = node.args[1], inner(node.args[0])
        if not isinstance(norm, Node) or norm.target is not aten.linalg_vector_norm.default:
            return None
        x, order, dims, keep = [*norm.args, 2, None, False][:4] if len(norm.args) < 4 else norm.args[:4]
        kind = "l2"
        if order != 2:
            return None
    elif node.target is (aten.rsqrt.default if multiplied else aten.sqrt.default):
        total = inner(node.args[0])
        if not isinstance(total, Node) or total.target not in (aten.add.Tensor, aten.add.Scalar) or total.kwargs:
            return None
        mean, eps = total.args[:2] if isinstance(total.args[0], Node) else total.args[1::-1]
        mean = inner(mean)
        if not isinstance(mean, Node) or mean.target is not aten.mean.dim:
            return None
        square, dims, keep = [*mean.args, False][:3]
        keep = keep or mean.kwargs.get("keepdim", False)
        x, kind = _squared(inner(square)), "rms"
    else:
        return None
    if not isinstance(x, Node) or not isinstance(eps, (int, float)) or not keep:
        return None
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return kind, float(eps), x, dims[0], between


def _uncast(node: Node) -> Node:
    while node.target in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _squared(node: Any) -> Node | None:
    """x of `x * x`, `x ** 2` and `square(x)`."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    x = node.args[0]
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    product = node.target is aten.mul.Tensor and node.args[1] is x
    return x if power or product or node.target is aten.square.default else None


def _moved_back(node: Node) -> Node | None:
    """x [N, C, *spatial] of `x.movedim(1, -1)`, before casts to a wider type."""
    if node.target is not aten.permute.default or not isinstance(node.args[0], Node):
        return None
    rank = value(node).dim()
    if rank not in (4, 5) or [d % rank for d in node.args[1]] != [0, *range(2, rank), 1]:
        return None
    return before_widening(node.args[0])


def _narrow(nodes: list[Node], x: Node) -> bool:
    return any(value(n).dtype.itemsize < value(x).dtype.itemsize for n in nodes)


# What follows the norm ------------------------------------------------------------------------------------------------


def chains(start: Chain, innermost: bool) -> Iterator[Chain]:
    """`start`, and with each thing that may follow one more. `innermost`: operands like x have to be channels-last."""
    chain: Chain | None = start
    while chain is not None:
        yield chain
        user = only_user(chain.node)
        chain = None if user is None else _with(chain, user, innermost)


def _with(chain: Chain, user: Node, innermost: bool) -> Chain | None:
    """The chain that ends with `user`, its node's only user, or None."""
    if not is_tensor(user) or not value(user).is_floating_point():
        return None
    after = replace(chain, node=user, narrow=chain.narrow or _narrow([user], chain.x))
    if user.target in CASTS:
        return after
    if chain.last and user.target is aten.permute.default:
        rank = value(user).dim()
        back = [d % rank for d in user.args[1]] == [0, rank - 1, *range(1, rank - 1)]
        return replace(after, last=False) if back else None
    if chain.activation != "none":
        return None
    if user.target in ACTIVATIONS:
        exact = user.kwargs.get("approximate", "none") == "none" and len(user.args) == 1
        return replace(after, activation=ACTIVATIONS[user.target]) if exact else None
    if user.target not in (aten.mul.Tensor, aten.add.Tensor) or user.kwargs.get("alpha", 1) != 1:
        return None
    others = [a for a in user.args[:2] if a is not chain.node]
    if len(others) != 1:
        return None
    other, product = others[0], user.target is aten.mul.Tensor
    if not isinstance(other, Node) or not is_tensor(other):
        return _with_number(after, other, product)
    kind = chain.operand_kind(other)
    small = _enlarged(other) if kind == LIKE and not chain.last else None
    if not kind or (kind == LIKE and small is None and innermost and not is_innermost(value(other))):
        return None
    plain = chain.scale is None and chain.shift is None
    if kind == VECTOR and plain and chain.bias is None and not (product and chain.weight is not None):
        return replace(after, weight=other) if product else replace(after, bias=other)
    if chain.last or chain.shift is not None or (product and chain.scale is not None):
        return None
    operand = small or other
    return replace(after, scale=operand) if product else replace(after, shift=operand)


def _enlarged(node: Node) -> Enlarged | None:
    """The small value that a scale or shift is enlarged from. The norm reads that even where others read the large one."""
    found = enlarged(node, shared=True)
    return found if isinstance(found, Enlarged) and found.crop == NOTHING else None


def _with_number(after: Chain, number: Any, product: bool) -> Chain | None:
    if number == (1 if product else 0):
        return after
    later = (after.bias, after.scale, after.shift)
    if not product or not isinstance(number, (int, float)) or any(n is not None for n in later):
        return None
    return replace(after, factor=after.factor * number) if after.kind in ("rms", "l2") else None


def is_innermost(tensor: torch.Tensor) -> bool:
    """Whether channels lie side by side and nothing else does: the memory order that the kernels read."""
    if not (known(tensor.shape[1] == 1) or known(tensor.stride(1) == 1)):
        return False
    rest = [d for d in range(tensor.dim()) if d != 1]
    return all(known(tensor.shape[d] == 1) or known(tensor.stride(d) >= tensor.shape[1]) for d in rest)


# Borders --------------------------------------------------------------------------------------------------------------


def with_border(chain: Chain) -> Chain | None:
    """The chain with the border behind it, if a convolution reads that; None if there is none."""
    found = _with_pad(_with_frames(chain) or chain)
    found = found or _with_frames(chain)
    if found is None or not any(_is_convolution(user) for user in found.node.users):
        return None
    return found


def _is_convolution(node: Node) -> bool:
    """A convolution of ATen's, or one of ours, whose input may be laid out for it: that costs nothing behind our norms."""
    if node.target is aten.contiguous.default:
        return any(_is_convolution(user) for user in node.users)
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.name().startswith("pvae::conv")
    return ours or ConvNode.of(node) is not None


def _with_pad(chain: Chain) -> Chain | None:
    user = only_user(chain.node)
    pad = PadNode.of(user)
    if pad is None or chain.last or pad.mode not in ("constant", "replicate", "reflect") or pad.fill != 0.0:
        return None
    spatial = value(chain.node).dim() - 2
    widths, modes = list(chain.widths), list(chain.modes)
    for dim in range(max(spatial, len(pad.pads))):  # from the last dimension
        pair = pad.along(dim)
        if not any(pair):
            continue
        at = 2 - dim
        if dim >= spatial or min(pair) < 0 or any(widths[2 * at : 2 * at + 2]):
            return None
        widths[2 * at : 2 * at + 2] = pair
        modes[at] = pad.mode
    return replace(chain, node=pad.node, widths=tuple(widths), modes=tuple(modes))


def _with_frames(chain: Chain) -> Chain | None:
    """`cat([first, ..., y, ..., last], 2)` of y [N, C, T, H, W] and its own first and last frames, repeated or not."""
    y = chain.node
    joined = [user for user in y.users if user.target in CATS]
    if chain.last or value(y).dim() != 5 or len(joined) != 1:
        return None
    parts, dim = joined[0].args[0], joined[0].args[1] if len(joined[0].args) > 1 else joined[0].kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or dim not in (2, -3) or list(parts).count(y) != 1:
        return None
    middle = list(parts).index(y)
    seen, counts = {joined[0]}, []
    for side, frame in ((parts[:middle], 0), (parts[middle + 1 :], -1)):
        total = 0
        for part in side:
            found = _repeated_frame(part, y, frame, joined[0])
            if found is None:
                return None
            total += found[0]
            seen |= found[1]
        counts.append(total)
    if set(y.users) - seen:
        return None
    return replace(chain, node=joined[0], widths=(*counts, 0, 0, 0, 0), modes=("replicate", *chain.modes[1:]))


def _repeated_frame(part: Any, y: Node, frame: int, joined: Node) -> tuple[int, set[Node]] | None:
    """(how often, the nodes) where `part` is y's first (0) or last (-1) frame some times over, read by `joined` alone."""
    if not isinstance(part, Node):
        return None
    times, nodes = 1, {part}
    if part.target is aten.repeat.default:
        repeats = part.args[1]
        if not isinstance(repeats, (list, tuple)) or not isinstance(repeats[2], int):
            return None
        if list(repeats[:2]) != [1, 1] or list(repeats[3:]) != [1, 1] or set(part.users) != {joined}:
            return None
        times, part = repeats[2], part.args[0]
        assert isinstance(part, Node)
        nodes.add(part)
    if part.target is not aten.slice.Tensor or part.args[0] is not y or part.kwargs or part.args[1] not in (2, -3):
        return None
    if not set(part.users) <= {joined, *nodes} or not known(value(part).shape[2] == 1):
        return None
    start = part.args[2] if len(part.args) > 2 and part.args[2] is not None else 0
    if not isinstance(start, int):
        return None
    at_end = start == -1 or known(value(y).shape[2] == start + 1)
    return (times, nodes) if (start == 0 if frame == 0 else at_end) else None
