"""Group norm of each frame of a video, as one typed view: frames are folded into the batch, normalised and unfolded.

    x [N, C, T, H, W] -> permute [N, T, C, H, W] -> reshape [N*T, C, H, W] -> group_norm -> reshape -> permute

The norm may be made in pieces of some frames each, joined by `cat` (Mochi takes eight at a time).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from pvae.passes.ir import CATS, aten, known, static, value

_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)


@dataclass(frozen=True)
class FrameNorm:
    """`end` [N, C, T, H, W] is x with each frame normalised; `pieces` are the group norms of which it is made, in order."""

    pieces: tuple[Node, ...]
    x: Node
    end: Node

    @classmethod
    def of(cls, node: Node) -> FrameNorm | None:
        """The norm of frames that the group norm `node` is a piece of."""
        pieces, joined = _pieces(node)
        folded = _whole(pieces)
        if folded is None:
            return None
        x = _unfolded(folded)
        if x is None or len(joined.users) != 1:
            return None
        (view,) = joined.users
        n, c, t, h, w = value(x).shape
        if view.target not in _RESHAPES or not _same(value(view).shape, (n, t, c, h, w)) or len(view.users) != 1:
            return None
        (end,) = view.users
        return cls(pieces, x, end) if _swaps_frames(end) else None


def _pieces(node: Node) -> tuple[tuple[Node, ...], Node]:
    """The group norms that `node` is joined with, and the value of all of them."""
    if len(node.users) == 1:
        (cat,) = node.users
        parts = cat.args[0] if cat.target in CATS else None
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        if isinstance(parts, (list, tuple)) and dim == 0 and all(_alike(part, node, cat) for part in parts):
            return tuple(p for p in parts if isinstance(p, Node)), cat
    return (node,), node


def _alike(part: object, node: Node, cat: Node) -> bool:
    """Whether `part` is a group norm with the arguments of `node`, for `cat` alone."""
    same = isinstance(part, Node) and part.target is node.target and part.kwargs == node.kwargs
    return same and part.args[1:] == node.args[1:] and set(part.users) == {cat}  # type: ignore[attr-defined]


def _whole(pieces: tuple[Node, ...]) -> Node | None:
    """What the inputs of `pieces` are consecutive slices of, all together."""
    whole: Node | None = None
    position = 0
    for piece in pieces:
        part = piece.args[0]
        assert isinstance(part, Node)
        if part.target is not aten.slice.Tensor:
            return part if len(pieces) == 1 else None
        source, dim, start, _ = [*part.args, 0, 0, None][:4] if len(part.args) < 4 else part.args[:4]
        size = static(value(part).shape[0])
        if dim != 0 or start != position or size is None or len(part.args) > 4 or source is not (whole or source):
            return part if len(pieces) == 1 else None
        assert isinstance(source, Node)
        whole, position = source, position + size
    if whole is None or value(whole).shape[0] != position:
        return None
    return whole


def _unfolded(node: Node) -> Node | None:
    """x [N, C, T, H, W] of frames [N*T, C, H, W]."""
    swapped = node.args[0] if node.target in _RESHAPES else None
    if not isinstance(swapped, Node) or value(node).dim() != 4 or not _swaps_frames(swapped):
        return None
    x = swapped.args[0]
    assert isinstance(x, Node)
    return x if _same(value(node).shape[1:], value(swapped).shape[2:]) else None


def _swaps_frames(node: Node) -> bool:
    """`permute(x, [0, 2, 1, 3, 4])`, or `transpose(x, 1, 2)`."""
    if node.target is aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3, 4]
    return node.target is aten.transpose.int and set(node.args[1:]) in ({1, 2}, {-4, -3}) and value(node).dim() == 5


def _same(a: object, b: object) -> bool:
    first, second = list(a), list(b)  # type: ignore[call-overload]
    return len(first) == len(second) and all(known(p == q) for p, q in zip(first, second, strict=True))
