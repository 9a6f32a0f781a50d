"""A normalisation over the last dimension, however it is written, as one typed view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from pvae.passes.ir import CASTS, aten, is_tensor, known, value

_SQUARES = frozenset({aten.square.default})


@dataclass(frozen=True)
class NormNode:
    """`node` = norm(x) [* weight] [+ bias] over the last dimension of x `[*, C]`; kind is "layer" or "rms".

    `x` is what goes in before casts to a wider type. The several ways to write an RMS norm read alike:
    `rms_norm(x)`, `x * rsqrt(mean(x^2) + eps)`, `x / sqrt(mean(x^2) + eps)`, with or without casts to float32.
    """

    node: Node
    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float

    @classmethod
    def of(cls, node: object) -> NormNode | str | None:
        """The norm that `node` is; None if it is none; a reason, in words, if it is one of a kind not handled here."""
        if not isinstance(node, Node) or node.op != "call_function" or not is_tensor(node):
            return None
        if node.target is aten.layer_norm.default:
            x, shape, weight, bias, eps = _arguments(node, ("input", "normalized_shape", "weight", "bias", "eps"), 1e-5)
            kind = "layer"
        elif node.target is aten.rms_norm.default:
            x, shape, weight, eps = _arguments(node, ("input", "normalized_shape", "weight", "eps"), None)
            bias, kind = None, "rms"
            if eps is None:
                eps = torch.finfo(torch.promote_types(value(x).dtype, torch.float32)).eps  # what ATen computes in
        else:
            return _by_hand(node)
        if len(shape) != 1:
            return f"the norm is over the last {len(shape)} dimensions"
        weight, bias = (None if vector is None else before_widening(vector) for vector in (weight, bias))
        return cls(node, kind, before_widening(x), weight, bias, float(eps))


def _arguments(node: Node, names: tuple[str, ...], eps: float | None) -> list[Any]:
    defaults: list[Any] = [None] * (len(names) - 1) + [eps]
    given = list(node.args) + defaults[len(node.args) :]
    return [node.kwargs.get(name, arg) for name, arg in zip(names, given, strict=False)]


def before_widening(node: Node) -> Node:
    """What `node` was before it was cast from half precision to float32, in which the ops compute anyway."""
    while node.target in CASTS:
        source = node.args[0]
        if not isinstance(source, Node) or not _wider(value(node).dtype, value(source).dtype):
            break
        node = source
    return node


def _wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype == than or (dtype is torch.float32 and than in (torch.bfloat16, torch.float16))


def _by_hand(node: Node) -> NormNode | None:
    """`x * rsqrt(mean(x * x, -1, keepdim) + eps)` and `x / sqrt(...)`."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    pairs = [(first, second)] if node.target is aten.div.Tensor else [(first, second), (second, first)]
    root = aten.sqrt.default if node.target is aten.div.Tensor else aten.rsqrt.default
    for x, factor in pairs:
        if not isinstance(x, Node) or not isinstance(factor, Node):
            continue
        factor = _before_casts(factor)
        found = _mean_square(factor.args[0]) if factor.target is root else None
        if found is not None and before_widening(x) is before_widening(found[0]):
            return NormNode(node, "rms", before_widening(x), None, None, found[1])
    return None


def _before_casts(node: Node) -> Node:
    while node.target in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _mean_square(node: Any) -> tuple[Node, float] | None:
    """(x, eps) of `mean(x * x, -1, keepdim=True) + eps`."""
    if not isinstance(node, Node) or node.target not in (aten.add.Tensor, aten.add.Scalar) or node.kwargs:
        return None
    mean, eps = node.args[:2]
    if not isinstance(mean, Node):
        mean, eps = eps, mean
    if not isinstance(mean, Node) or not isinstance(eps, (int, float)) or mean.target is not aten.mean.dim:
        return None
    square, dims, keep = [*mean.args, False][:3]
    if not isinstance(square, Node) or not isinstance(dims, (list, tuple)) or not (keep or mean.kwargs.get("keepdim")):
        return None
    if [d % value(square).dim() for d in dims] != [value(square).dim() - 1]:
        return None
    x = square.args[0]
    squared = (
        square.target in _SQUARES
        or (square.target is aten.pow.Tensor_Scalar and square.args[1] == 2)
        or (square.target is aten.mul.Tensor and square.args[1] is x)
    )
    return (x, float(eps)) if squared and isinstance(x, Node) and known(value(x).shape[-1] > 0) else None
