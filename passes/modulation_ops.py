"""From a chain to the op that computes it: the nodes that pass it its operands, and why it would not take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from pvae.kernels import layer_norm_modulate as _layer
from pvae.kernels import residual_gate as _gate
from pvae.kernels import residual_gate_layer_norm_modulate as _residual_layer
from pvae.kernels import residual_gate_rms_norm_modulate as _residual_rms
from pvae.kernels import rms_norm_modulate as _rms
from pvae.kernels.norm_layout import MODULATION, Operands, shape_error
from pvae.passes.ir import Builder, aten, known, static, value
from pvae.passes.modulation import Chain, Operand, Residual

NORMS: Mapping[str, Any] = {"layer": _layer, "rms": _rms}
RESIDUAL_NORMS: Mapping[str, Any] = {"layer": _residual_layer, "rms": _residual_rms}
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is ROCm too


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the channels of a row lie side by side."""
    return tensor.dim() == 0 or known(tensor.shape[-1] == 1) or known(tensor.stride(-1) == 1)


def dense(node: Node) -> Node:
    """`node` with the channels of a row side by side in memory, as the kernels need it.

    Tokens made by `conv(x).flatten(2).transpose(1, 2)` are not, and what is added to them keeps their strides. The copy is
    made once, where the tensor is made, and all that reads it reads the copy.
    """
    if _is_dense(value(node)):
        return node
    for user in node.users:
        if user.target is aten.contiguous.default:
            return user
    anchor = node.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    copy: Node = Builder(anchor)(aten.contiguous.default, node)
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy and user.op != "output")
    return copy


def _viewed(build: Builder, r: Residual) -> Node:
    if r.view is None:
        return dense(r.x)
    assert callable(r.view.target)
    result: Node = build(r.view.target, r.x, *r.view.args[1:], **r.view.kwargs)
    return dense(result)


def _shaped(build: Builder, node: Node | None, rows: Node) -> Node | None:
    """An operand [L, C] of rows [B, L, C] as [1, L, C]: two dimensions mean one vector a sample to the ops."""
    if node is None:
        return None
    node = dense(node)
    if value(node).dim() != 2 or value(rows).dim() <= 2:
        return node
    result: Node = build(aten.unsqueeze.default, node, 0)
    return result


def _sets(build: Builder, rows: Node, operands: Mapping[str, Operand | None]) -> dict[str, Node]:
    """The second sets and their index as keyword arguments."""
    found: dict[str, Node] = {}
    for name, operand in operands.items():
        if operand is not None and operand.second is not None and operand.index is not None:
            second = _shaped(build, operand.second, rows)
            assert second is not None
            found[f"{name}1"] = second
            index = operand.index
            found["index"] = build(aten.squeeze.dim, index, -1) if value(index).dim() == value(rows).dim() else index
    return found


def _constant(chain: Chain) -> dict[str, float]:
    return {} if chain.scale is None or chain.constant == 1 else {"scale_constant": chain.constant}


def _first_set(build: Builder, operand: Operand | None, rows: Node) -> Node | None:
    return None if operand is None else _shaped(build, operand.node, rows)


def norm_op(build: Builder, chain: Chain) -> Node:
    """The chain without a residual -> y."""
    x = chain.norm.x
    for view in chain.views:
        assert callable(view.target)
        x = build(view.target, x, *view.args[1:], **view.kwargs)
    x = dense(x)
    affine = (chain.weight, chain.bias) if chain.norm.kind == "layer" else (chain.weight,)
    scale, shift = _first_set(build, chain.scale, x), _first_set(build, chain.shift, x)
    chosen = _sets(build, x, {"scale": chain.scale, "shift": chain.shift})
    dtype = value(chain.end).dtype
    kept = {} if dtype == value(x).dtype else {"out_dtype": dtype}
    result: Node = build(
        NORMS[chain.norm.kind].OP, x, *affine, scale, shift, chain.norm.eps, **_constant(chain), **kept, **chosen
    )
    return result


def residual_norm_op(build: Builder, chain: Chain, r: Residual) -> Node:
    """The chain after a residual -> (h, y)."""
    affine = (chain.weight, chain.bias) if chain.norm.kind == "layer" else (chain.weight,)
    x = _viewed(build, r)
    gate, scale, shift = (_first_set(build, o, x) for o in (r.gate, chain.scale, chain.shift))
    chosen = _sets(build, x, {"gate": r.gate, "scale": chain.scale, "shift": chain.shift})
    h, y = value(r.node).dtype, value(chain.end).dtype
    kept = {} if h == value(r.residual).dtype else {"h_dtype": h}
    kept |= {} if y == value(x).dtype else {"out_dtype": y}
    op = RESIDUAL_NORMS[chain.norm.kind].OP
    result: Node = build(
        op, dense(r.residual), x, gate, *affine, scale, shift, chain.norm.eps, **_constant(chain), **kept, **chosen
    )
    return result


def residual_gate_op(build: Builder, r: Residual) -> Node:
    """residual + gate * x -> h."""
    x = _viewed(build, r)
    dtype = value(r.node).dtype
    kept = {} if dtype == value(r.residual).dtype else {"out_dtype": dtype}
    gates = _sets(build, x, {"gate": r.gate})
    result: Node = build(_gate.OP, dense(r.residual), x, _first_set(build, r.gate, x), **kept, **gates)
    return result


def _as_dense(node: Node) -> torch.Tensor:
    """The fake value of `dense(node)`."""
    tensor: torch.Tensor = value(node)
    return tensor if _is_dense(tensor) else tensor.contiguous()


def _as_operand(operand: Node | None, rows: Node) -> torch.Tensor | None:
    """The fake value of a modulation operand in the shape in which the op gets it."""
    if operand is None:
        return None
    tensor = _as_dense(operand)
    return tensor.unsqueeze(0) if tensor.dim() == 2 and value(rows).dim() > 2 else tensor


def operands_of(rows: Node, residual: Residual | None, chain: Chain | None) -> Operands:
    """What the kernel would be given, as fake tensors; `rows` has the shape of x."""
    sets: dict[str, Operand] = {}
    if residual is not None and residual.gate is not None:
        sets["gate"] = residual.gate
    if chain is not None:
        sets |= {name: o for name, o in (("scale", chain.scale), ("shift", chain.shift)) if o is not None}
    index = next((value(o.index) for o in sets.values() if o.index is not None), None)
    if index is not None and index.dim() == value(rows).dim():
        index = index.squeeze(-1)
    return Operands(
        x=_as_dense(rows),
        residual=None if residual is None else _as_dense(residual.residual),
        weight=None if chain is None or chain.weight is None else value(chain.weight),
        bias=None if chain is None or chain.bias is None else value(chain.bias),
        select=index,
        **{name: _as_operand(o.node, rows) for name, o in sets.items()},
        **{f"{name}1": _as_operand(o.second, rows) for name, o in sets.items()},
    )


def misfit(operands: Operands) -> str | None:
    """Why the operands do not go together, as far as their sizes are known."""
    if any(static(n) is None for t in operands if t is not None for n in t.shape):
        return None
    for name in MODULATION:
        operand = getattr(operands, name)
        if operand is not None and (error := shape_error(name, operand.shape, operands.x.shape)):
            return error
    return None


def against(operands: Operands, chain: Chain | None, residual: Residual | None) -> str | None:
    """Why `auto` leaves a chain to Inductor: no Triton on the device, or operands that the kernel does not take."""
    if operands.x.device.type not in TRITON_DEVICES:
        return f"on {operands.x.device.type} there is no Triton, and Inductor fuses this itself (modulation=on forces)"
    if any(static(n) is None for t in operands if t is not None for n in (*t.shape, *t.stride())):
        return None  # decided call by call, by the op
    module: Any = _gate
    if chain is not None:
        module = (NORMS if residual is None else RESIDUAL_NORMS)[chain.norm.kind]
    h = None if residual is None else value(residual.node).dtype
    y = None if chain is None else value(chain.end).dtype
    with torch.utils._python_dispatch._disable_current_modes():
        reason: str | None = module.supports(operands, h, y)
    return reason
