"""fuse_modulation and fuse_residual_gate: every spelling of a chain becomes one op, near misses say why, the rest is left.

A case is a pair of functions of named tensors (`TENSORS`); those called as in `WEIGHTS` are weights of the model.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from pvae.options import parse_options
from pvae.passes.ir import placeholders
from pvae.passes.pipeline import Pipeline, run_pipeline
from pvae.passes.rule import Context, Report, RewriteCounter
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import agreement, assert_rewrites_to, capture, refusals, structure

Function = Callable[..., Any]
PASSES = "canonicalize,fuse_modulation,fuse_residual_gate"
ON = {"modulation": "on"}
EPS = 1e-6
HALF, FULL = torch.bfloat16, torch.float32

aten = torch.ops.aten
layer_op = torch.ops.pvae.layer_norm_modulate.default
rms_op = torch.ops.pvae.rms_norm_modulate.default
residual_layer_op = torch.ops.pvae.residual_gate_layer_norm_modulate.default
residual_rms_op = torch.ops.pvae.residual_gate_rms_norm_modulate.default
gate_op = torch.ops.pvae.residual_gate.default

B, L, C = 2, 6, 8
WEIGHTS = {"w", "b", "table", "w4", "wide"}
randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
TENSORS: dict[str, Tensor] = {
    "x": randn(B, L, C),
    "y": randn(B, L, C),
    "xh": randn(B, L, C, dtype=HALF),
    "yh": randn(B, L, C, dtype=HALF),
    "sh": randn(B, 1, C, dtype=HALF),
    "th": randn(B, 1, C, dtype=HALF),
    **{name: randn(B, 1, C) for name in ("s", "t", "g", "s1", "t1", "g1")},
    "mod": randn(B, 1, 3 * C),  # chunked along channels
    "flat": randn(B, 3 * C),
    "rows": randn(B, 3, C),  # one row a chunk
    "table": randn(1, 3, C),
    "token": randn(B, L, C),
    "frame": randn(B, 3, 1, C),
    "position": randn(L, C),
    "index": torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]),
    "other": torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0]]),
    "line": torch.tensor([0, 1, 1, 0, 0, 1]),
    "mask": randn(B, L, 1) > 0,
    "flag": torch.tensor(True),
    "sample": torch.tensor([True, False]),
    "cos": randn(L, C // 2),
    "sin": randn(L, C // 2),
    "w": randn(C),
    "b": randn(C),
    "w4": randn(C // 2),
    "wide": randn(2 * C, C),
}


def ln(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def rms(x: Tensor, w: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def rms_by_hand(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def names(function: Function) -> list[str]:
    return list(inspect.signature(function).parameters)


def fuse(
    function: Function, passes: str = PASSES, device: str = "", **options: Any
) -> tuple[GraphModule, list[Report]]:
    """What the passes make of `function`, its arguments taken from TENSORS (faked on `device`) by name."""
    args = [TENSORS[name] for name in names(function)]
    if device:
        with new_fake_mode():
            args = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device) for a in args]
    gm = capture(function, *args).gm
    inputs = zip(placeholders(gm.graph), names(function), strict=True)
    weights = frozenset(node.name for node, name in inputs if name in WEIGHTS)
    parsed = parse_options(ON | options, {})
    context = Context(parsed, weights, counter=RewriteCounter(parsed.rewrite_limit))
    reports = run_pipeline(gm, Pipeline.parse(passes), context)
    return gm, reports


def check(before: Function, expected: Function) -> list[Report]:
    """`assert_rewrites_to`, with weights."""
    gm, reports = fuse(before)
    got, want = structure(gm), structure(torch.fx.symbolic_trace(expected))
    assert got == want, "rewritten to:\n" + "\n".join(got) + "\nexpected:\n" + "\n".join(want)
    return reports


# --- norm, scale, shift -----------------------------------------------------------------------------------------------

ALIKE: dict[str, Function] = {
    "1 + s": lambda x, s, t: ln(x) * (1 + s) + t,
    "s + 1": lambda x, s, t: ln(x) * (s + 1) + t,
    "1.0 + s": lambda x, s, t: ln(x) * (1.0 + s) + t,
    "scale first": lambda x, s, t: t + (1 + s) * ln(x),
    "addcmul": lambda x, s, t: torch.addcmul(t, ln(x), 1 + s),
    "addcmul reversed": lambda x, s, t: torch.addcmul(t, 1 + s, ln(x)),
    "dropout": lambda x, s, t: F.dropout(ln(x) * (1 + s), 0.1, False) + t,
    "casts of nothing": lambda x, s, t: (ln(x.float()).type_as(x) * (1 + s.float()) + t).to(x.dtype),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike(name: str) -> None:
    reports = check(ALIKE[name], lambda x, s, t: (layer_op(x, None, None, s, t, EPS),))
    assert [(m.rule, m.note) for m in reports[1].matches] == [("norm_modulate", "layer norm, scale, shift")]


CASTS: dict[str, Function] = {
    "before the norm, back after it": lambda xh, sh, th: ln(xh.float()).to(HALF) * (1 + sh) + th,
    "back after the multiply": lambda xh, sh, th: (ln(xh.float()) * (1 + sh)).to(HALF) + th,
    "back at the end": lambda xh, sh, th: (ln(xh.float()) * (1 + sh.float()) + th.float()).type_as(xh),
    "around 1 + s": lambda xh, sh, th: ln(xh) * (1 + sh.float()).to(HALF) + th,
}


@pytest.mark.parametrize("name", CASTS)
def test_casts(name: str) -> None:
    check(CASTS[name], lambda xh, sh, th: (layer_op(xh, None, None, sh, th, EPS),))


def modulated(x: Tensor, pieces: Any) -> Tensor:
    scale, shift, _ = pieces
    return ln(x) * (1 + scale) + shift


def at(index: Any, position: int) -> Any:
    """Row `position` of [B, 3, C] as [B, 1, C]."""
    return aten.slice.Tensor(index, 1, position, position + 1)


def piece(mod: Any, dim: int, position: int) -> Any:
    """One of three chunks of the channels."""
    return aten.slice.Tensor(mod, dim, position * C, (position + 1) * C)


def unsqueezed(a: Any, b: Any) -> tuple[Any, Any]:
    return aten.unsqueeze.default(a, 1), aten.unsqueeze.default(b, 1)


def one(x: Any, scale: Any, shift: Any, **rest: Any) -> Any:
    return (layer_op(x, None, None, scale, shift, EPS, **rest),)


TABLES: dict[str, tuple[Function, Function]] = {
    "chunk": (
        lambda x, mod: modulated(x, mod.chunk(3, -1)),
        lambda x, mod: one(x, piece(mod, 2, 0), piece(mod, 2, 1)),
    ),
    "split": (
        lambda x, mod: modulated(x, mod.split(C, 2)),
        lambda x, mod: one(x, piece(mod, 2, 0), piece(mod, 2, 1)),
    ),
    "chunk of [B, 3C]": (
        lambda x, flat: modulated(x, [m.unsqueeze(1) for m in flat.chunk(3, -1)]),
        lambda x, flat: one(x, *unsqueezed(piece(flat, 1, 0), piece(flat, 1, 1))),
    ),
    "unsqueezed after 1 + s": (
        lambda x, flat: ln(x) * (1 + flat[:, :C])[:, None] + flat[:, C : 2 * C, None].transpose(1, 2),
        lambda x, flat: one(
            x,
            aten.unsqueeze.default(aten.add.Tensor(piece(flat, 1, 0), 1), 1),
            aten.transpose.int(aten.unsqueeze.default(piece(flat, 1, 1), 2), 1, 2),
            scale_constant=0.0,
        ),
    ),
    "unbind": (
        lambda x, rows: modulated(x, [m[:, None] for m in rows.unbind(1)]),
        lambda x, rows: one(x, *unsqueezed(aten.select.int(rows, 1, 0), aten.select.int(rows, 1, 1))),
    ),
    "slices of a table": (
        lambda x, rows: ln(x) * (1 + rows[:, 0:1]) + rows[:, 1:2],
        lambda x, rows: one(x, at(rows, 0), at(rows, 1)),
    ),
    "scale_shift_table": (
        lambda x, rows, table: modulated(x, (table + rows).chunk(3, 1)),
        lambda x, rows, table: (lambda total: one(x, at(total, 0), at(total, 1)))(aten.add.Tensor(table, rows)),
    ),
    "table in fp32": (
        lambda xh, rows, table: modulated(xh.float(), (table + rows.float()).chunk(3, 1)).type_as(xh),
        lambda xh, rows, table: (lambda total: one(xh, at(total, 0), at(total, 1)))(aten.add.Tensor(table, rows)),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    check(*TABLES[name])


def rows_of(x: Any, *sizes: int) -> Any:
    return aten.reshape.default(x, list(sizes))


SHAPES: dict[str, tuple[Function, Function]] = {
    "scale alone": (lambda x, s: ln(x) * (1 + s), lambda x, s: one(x, s, None)),
    "shift alone": (lambda x, t: ln(x) + t, lambda x, t: one(x, None, t)),
    "no constant": (lambda x, s: ln(x) * s, lambda x, s: one(x, s, None, scale_constant=0.0)),
    "constant 2": (lambda x, s, t: ln(x) * (2 + s) + t, lambda x, s, t: one(x, s, t, scale_constant=2.0)),
    "minus": (
        lambda x, s: ln(x) * (1 - s),
        lambda x, s: one(x, aten.rsub.Scalar(s, 1), None, scale_constant=0.0),
    ),
    "alpha": (
        lambda x, s, t: torch.add(ln(x) * torch.add(s, 1, alpha=2), t, alpha=3),
        lambda x, s, t: (
            aten.add.Tensor(one(x, aten.add.Tensor(s, 1, alpha=2), None, scale_constant=0.0)[0], t, alpha=3),
        ),
    ),
    "per token": (lambda x, token, t: ln(x) * (1 + token) + t, lambda x, token, t: one(x, token, t)),
    "[L, C]": (
        lambda x, position, t: ln(x) * (1 + position) + t,
        lambda x, position, t: one(x, aten.unsqueeze.default(position, 0), t),
    ),
    "per frame": (
        lambda x, frame: (ln(x).unflatten(1, (3, -1)) * (1 + frame) + frame).flatten(1, 2),
        lambda x, frame: (rows_of(one(rows_of(x, B, 3, 2, C), frame, frame)[0], B, L, C),),
    ),
    "slice of the tokens": (
        lambda x, s, t: ln(x)[:, 2:] * (1 + s) + t,
        lambda x, s, t: one(aten.slice.Tensor(x, 1, 2, 2**63 - 1), s, t),
    ),
    "reshape": (
        lambda x, s: (ln(x).reshape(B, 3, 2, C) * (1 + s[:, None])).relu(),
        lambda x, s: (
            (lambda s: aten.relu.default(one(rows_of(x, B, 3, 2, C), s, None)[0]))(aten.unsqueeze.default(s, 1)),
        ),
    ),
    "transpose": (
        lambda x, position: (ln(x).transpose(0, 1) * (1 + position[:, None])).sum(),
        lambda x, position: (
            (lambda s: aten.sum.default(one(aten.transpose.int(x, 0, 1), s, None)[0]))(
                aten.unsqueeze.default(position, 1)
            ),
        ),
    ),
    "weight and bias": (
        lambda x, w, b, s, t: ln(x, w, b) * (1 + s) + t,
        lambda x, w, b, s, t: (layer_op(x, w, b, s, t, EPS),),
    ),
    "FP32LayerNorm": (
        lambda xh, w, b, sh, th: ln(xh.float(), w.float(), b.float()).to(HALF) * (1 + sh) + th,
        lambda xh, w, b, sh, th: (layer_op(xh, w, b, sh, th, EPS),),
    ),
    "left in fp32": (
        lambda xh, s, t: ln(xh.float()) * (1 + s) + t,
        lambda xh, s, t: one(xh, s, t, out_dtype=FULL),
    ),
    "narrowed before the norm": (
        lambda x, sh: ln(x.to(HALF)) * (1 + sh),
        lambda x, sh: one(aten._to_copy.default(x, dtype=HALF), sh, None),
    ),
    "no further than shift": (
        lambda x, s, t: (ln(x) + t) * (1 + s),
        lambda x, s, t: (aten.mul.Tensor(one(x, None, t)[0], aten.add.Tensor(s, 1)),),
    ),
    "two chains of one norm": (
        lambda x, s, t, s1, t1: (lambda n: (n * (1 + s) + t, n * (1 + s1) + t1))(ln(x)),
        lambda x, s, t, s1, t1: (*one(x, s, t), *one(x, s1, t1)),
    ),
    "two chains on slices": (
        lambda x, s, s1: (lambda n: (n[:, :2] * (1 + s), n[:, 2:] * (1 + s1)))(ln(x)),
        lambda x, s, s1: (
            *one(aten.slice.Tensor(x, 1, 0, 2), s, None),
            *one(aten.slice.Tensor(x, 1, 2, 2**63 - 1), s1, None),
        ),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes(name: str) -> None:
    check(*SHAPES[name])


# --- RMS norms --------------------------------------------------------------------------------------------------------

RMS: dict[str, tuple[Function, Function]] = {
    "scale": (lambda x, w, s: rms(x, w) * (1 + s), lambda x, w, s: (rms_op(x, w, s, None, EPS),)),
    "by hand": (
        lambda xh, sh, th: rms_by_hand(xh) * (1 + sh) + th,
        lambda xh, sh, th: (rms_op(xh, None, sh, th, EPS),),
    ),
    "by hand, then weight": (
        lambda xh, w, sh: (rms_by_hand(xh).to(w.dtype) * w).to(HALF) * (1 + sh),
        lambda xh, w, sh: (rms_op(xh, w, sh, None, EPS),),
    ),
    "weight first": (lambda x, w, s: w * rms_by_hand(x) * (1 + s), lambda x, w, s: (rms_op(x, w, s, None, EPS),)),
    "gate and residual behind the norm": (
        lambda x, y, g, w: x + torch.tanh(g) * rms(y, w),
        lambda x, y, g, w: (rms_op(y, w, aten.tanh.default(g), x, EPS, scale_constant=0.0),),
    ),
    "the same by hand": (
        lambda x, y, g, w: x + torch.tanh(g) * (rms_by_hand(y) * w),
        lambda x, y, g, w: (rms_op(y, w, aten.tanh.default(g), x, EPS, scale_constant=0.0),),
    ),
}


@pytest.mark.parametrize("name", RMS)
def test_rms(name: str) -> None:
    check(*RMS[name])


# --- gated residuals --------------------------------------------------------------------------------------------------

GATES: dict[str, tuple[Function, Function]] = {
    "residual first": (lambda x, y, g: x + g * y, lambda x, y, g: (gate_op(x, y, g),)),
    "product first": (lambda x, y, g: y * g + x, lambda x, y, g: (gate_op(x, y, g),)),
    "addcmul": (lambda x, y, g: torch.addcmul(x, g, y), lambda x, y, g: (gate_op(x, y, g),)),
    "in fp32": (lambda xh, yh, g: (xh.float() + yh * g).type_as(xh), lambda xh, yh, g: (gate_op(xh, yh, g),)),
    "left in fp32": (
        lambda xh, yh, g: xh.float() + yh.float() * g,
        lambda xh, yh, g: (gate_op(xh, yh, g, out_dtype=FULL),),
    ),
    "gate [L, C]": (
        lambda x, y, position: x + position * y,
        lambda x, y, position: (gate_op(x, y, aten.unsqueeze.default(position, 0)),),
    ),
    "by index": (
        lambda x, y, index, g, g1: x + torch.where(index.unsqueeze(-1) == 0, g, g1) * y,
        lambda x, y, index, g, g1: (gate_op(x, y, g, gate1=g1, index=index),),
    ),
    "one behind the other": (
        lambda x, y, g, token, s: (x + g * y) + s * token,
        lambda x, y, g, token, s: (gate_op(gate_op(x, y, g), token, s),),
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name: str) -> None:
    reports = check(*GATES[name])
    assert not reports[1].matches and reports[2].matches[0].note.startswith("residual + gate * x")


def pair(op: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    both = op(*args, **kwargs)
    return operator.getitem(both, 0), operator.getitem(both, 1)


def then(function: Function) -> Function:
    """h and function(h)."""
    return lambda h: (h, function(h))


RESIDUALS: dict[str, tuple[Function, Function]] = {
    "gate": (
        lambda x, y, g, s, t: then(lambda h: ln(h) * (1 + s) + t)(x + g * y),
        lambda x, y, g, s, t: pair(residual_layer_op, x, y, g, None, None, s, t, EPS),
    ),
    "addcmul": (
        lambda x, y, g, s, t: then(lambda h: torch.addcmul(t, ln(h), 1 + s))(torch.addcmul(x, y, g)),
        lambda x, y, g, s, t: pair(residual_layer_op, x, y, g, None, None, s, t, EPS),
    ),
    "no gate": (
        lambda x, y, s, t: then(lambda h: ln(h) * (1 + s) + t)(x + y),
        lambda x, y, s, t: pair(residual_layer_op, x, y, None, None, None, s, t, EPS),
    ),
    "no scale": (
        lambda x, y, g, w, b: then(lambda h: ln(h, w, b))(x + g * y),
        lambda x, y, g, w, b: pair(residual_layer_op, x, y, g, w, b, None, None, EPS),
    ),
    "no scale, weight by hand": (
        lambda x, y, g, w: then(lambda h: rms_by_hand(h) * w)(x + g * y),
        lambda x, y, g, w: pair(residual_rms_op, x, y, g, w, None, None, EPS),
    ),
    "RMS": (
        lambda x, y, g, w, s: then(lambda h: rms(h, w) * (1 + s))(x + g * y),
        lambda x, y, g, w, s: pair(residual_rms_op, x, y, g, w, s, None, EPS),
    ),
    "in fp32 and back": (
        lambda xh, yh, g, s, t: then(lambda h: (ln(h.float()) * (1 + s) + t).type_as(h))(
            (xh.float() + yh * g).type_as(xh)
        ),
        lambda xh, yh, g, s, t: pair(residual_layer_op, xh, yh, g, None, None, s, t, EPS),
    ),
    "h kept in fp32": (
        lambda xh, yh, g, s, t: then(lambda h: (ln(h) * (1 + s) + t).to(HALF))(xh.float() + yh * g),
        lambda xh, yh, g, s, t: pair(residual_layer_op, xh, yh, g, None, None, s, t, EPS, h_dtype=FULL),
    ),
    "operands made after h": (
        lambda x, y, g, flat: then(lambda h: ln(h) * (1 + flat[:, None, :C]))(x + g * y),
        lambda x, y, g, flat: (lambda s: pair(residual_layer_op, x, y, g, None, None, s, None, EPS))(
            aten.slice.Tensor(aten.unsqueeze.default(flat, 1), 2, 0, C)
        ),
    ),
    "operands made of h": (
        lambda x, y, g: then(lambda h: ln(h) * (1 + h.mean(1, True)))(x + g * y),
        lambda x, y, g: (lambda h: (h, *one(h, aten.mean.dim(h, [1], True), None)))(gate_op(x, y, g)),
    ),
    "views behind the norm": (
        lambda x, y, g, s: then(lambda h: ln(h)[:, 1:] * (1 + s))(x + g * y),
        lambda x, y, g, s: (lambda h: (h, *one(aten.slice.Tensor(h, 1, 1, 2**63 - 1), s, None)))(gate_op(x, y, g)),
    ),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals(name: str) -> None:
    check(*RESIDUALS[name])


def test_residual_before_two_chains() -> None:
    def before(x: Tensor, y: Tensor, g: Tensor, s: Tensor, t: Tensor, s1: Tensor) -> Any:
        h = x + g * y
        n = ln(h)
        return h, n * (1 + s) + t, n * (1 + s1)

    def expected(x: Tensor, y: Tensor, g: Tensor, s: Tensor, t: Tensor, s1: Tensor) -> Any:
        h, first = pair(residual_layer_op, x, y, g, None, None, s, t, EPS)
        return h, first, layer_op(h, None, None, s1, None, EPS)

    reports = check(before, expected)
    assert [m.note for m in reports[1].matches] == [
        "residual + gate * x, layer norm, scale, shift; layer norm, scale",
    ]


# --- two sets, chosen by an index -------------------------------------------------------------------------------------


def choose(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(index.unsqueeze(-1) == 0, first, second)


def chosen(x: Any, s: Any, s1: Any, index: Any, **rest: Any) -> Any:
    return one(x, s, None, **rest, scale1=s1, index=index)


SELECTS: dict[str, tuple[Function, Function]] = {
    "== 0": (
        lambda x, index, s, s1: ln(x) * (1 + choose(index, s, s1)),
        lambda x, index, s, s1: chosen(x, s, s1, index),
    ),
    "!= 0": (
        lambda x, index, s, s1: ln(x) * (1 + torch.where(index[..., None] != 0, s, s1)),
        lambda x, index, s, s1: chosen(x, s1, s, index),
    ),
    "== 0 before the unsqueeze": (
        lambda x, index, s, s1: ln(x) * (1 + torch.where((index == 0).unsqueeze(-1), s, s1)),
        lambda x, index, s, s1: chosen(x, s, s1, index),
    ),
    "a mask": (
        lambda x, mask, s, s1: ln(x) * (1 + torch.where(mask, s, s1)),
        lambda x, mask, s, s1: chosen(x, s1, s, aten.squeeze.dim(mask, -1)),
    ),
    "1 + inside": (
        lambda x, index, s, s1: ln(x) * choose(index, 1 + s, 1 + s1),
        lambda x, index, s, s1: chosen(x, aten.add.Tensor(s, 1), aten.add.Tensor(s1, 1), index, scale_constant=0.0),
    ),
    "cast": (
        lambda xh, index, s, s1: (ln(xh.float()) * (1 + choose(index, s, s1).to(HALF))).to(HALF),
        lambda xh, index, s, s1: chosen(xh, s, s1, index),
    ),
    "one number against a tensor": (
        lambda x, mask, s: ln(x) * (1 + torch.where(mask, s, 0.0)),
        lambda x, mask, s: one(x, aten.where.ScalarOther(mask, s, 0.0), None),
    ),
    "scale and shift by different indexes": (
        lambda x, index, other, s, s1, t, t1: ln(x) * (1 + choose(index, s, s1)) + choose(other, t, t1),
        lambda x, index, other, s, s1, t, t1: (
            lambda shift: (layer_op(x, None, None, s, shift, EPS, scale1=s1, index=index),)
        )(aten.where.self(aten.eq.Scalar(aten.unsqueeze.default(other, -1), 0), t, t1)),
    ),
}


@pytest.mark.parametrize("name", SELECTS)
def test_selects(name: str) -> None:
    check(*SELECTS[name])


def test_select_as_in_qwen_image() -> None:
    """The gate's two sets go into the residual; nothing of size [B, L, C] is chosen."""

    def before(x: Tensor, y: Tensor, index: Tensor, g: Tensor, g1: Tensor, s: Tensor, s1: Tensor, t: Tensor) -> Any:
        gate, scale, shift = choose(index, g, g1), choose(index, s, s1), choose(index, t, g1)
        h = x + gate * y
        return h, ln(h) * (1 + scale) + shift

    def expected(x: Tensor, y: Tensor, index: Tensor, g: Tensor, g1: Tensor, s: Tensor, s1: Tensor, t: Tensor) -> Any:
        kwargs = {"gate1": g1, "index": index, "scale1": s1, "shift1": g1}
        return pair(residual_layer_op, x, y, g, None, None, s, t, EPS, **kwargs)

    reports = check(before, expected)
    note = "residual + gate * x, layer norm, scale, shift, two sets by index"
    assert [m.note for m in reports[1].matches] == [note]


# What may be fused in one way or another but must be right: odd conditions, operands by different indexes, wide norms.
ODD: dict[str, Function] = {
    "gate and scale by different indexes": lambda x, y, index, other, g, g1, s, s1: then(
        lambda h: ln(h) * (1 + choose(other, s, s1))
    )(x + choose(index, g, g1) * y),
    "one flag": lambda x, flag, s, s1: ln(x) * (1 + torch.where(flag, s, s1)),
    "one flag [1]": lambda x, flag, s, s1: ln(x) * (1 + torch.where(flag.reshape(1), s, s1)),
    "one flag a sample": lambda x, sample, s, s1: ln(x) * (1 + torch.where(sample[:, None, None], s, s1)),
    "one index [L] for all samples": lambda x, line, s, s1: ln(x) * (1 + choose(line, s, s1)),
    "[L, C] chosen by [L]": lambda x, line, position: ln(x) * (1 + choose(line, position, 2 * position)),
    "a vector and one a sample": lambda x, mask, w, s: ln(x) * (1 + torch.where(mask, w, s)),
    "norm in float64": lambda x, s: ln(x.double()) * (1 + s.double()),
    "norm in float64 and back": lambda x, s: (ln(x.double()) * (1 + s.double())).float(),
    "residual in float64": lambda x, y, g, s: then(lambda h: (ln(h) * (1 + s)).float())(x.double() + g.double() * y),
    "gate in float64": lambda x, y, g: x.double() + g.double() * y.double(),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_ones_are_right(name: str) -> None:
    function = ODD[name]
    gm, _ = fuse(function)
    args = [TENSORS[n] for n in names(function)]
    wide = [a.double() if a.is_floating_point() else a for a in args]
    eager = function(*args)
    got = gm(*args)
    found = agreement(got, [eager] if isinstance(eager, Tensor) else list(eager), function(*wide))
    assert found.ok, str(found)


# --- what is refused, and why -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Function, str]] = {
    "two dimensions": (lambda x, s: F.layer_norm(x, (L, C)) * (1 + s), "the norm is over the last 2 dimensions"),
    "returned": (
        lambda x, s, t: (lambda n: (n, n * (1 + s) + t))(ln(x)),
        "the norm's result is also used otherwise, so it is written anyway",
    ),
    "used otherwise": (
        lambda x, s, t: (lambda n: (n.relu(), n * (1 + s) + t))(ln(x)),
        "the norm's result is also used otherwise, so it is written anyway",
    ),
    "cat": (
        lambda x, y, s: torch.cat([ln(x), y], 1) * (1 + s),
        "aten.cat.default stands between the norm and its scale",
    ),
    "index_select": (
        lambda x, line, s: ln(x).index_select(1, line) * (1 + s),
        "aten.index_select.default stands between the norm and its scale",
    ),
    "indexed": (
        lambda x, line, s: ln(x)[:, line] * (1 + s),
        "aten.index.Tensor stands between the norm and its scale",
    ),
    "a slice with two uses": (
        lambda x, s, s1: (lambda n: (n * (1 + s), n * (1 + s1)))(ln(x)[:, 1:]),
        "aten.slice.Tensor stands between the norm and its scale",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    before, reason = REFUSED[name]
    _, reports = fuse(before)
    assert not reports[1].matches and refusals(reports[1:]) == [reason]


def test_auto_on_the_cpu_and_off() -> None:
    reason = "on cpu there is no Triton, and Inductor fuses this itself (modulation=on forces)"
    for before in (ALIKE["1 + s"], GATES["addcmul"][0], RESIDUALS["gate"][0]):
        _, reports = fuse(before, modulation="auto")
        assert set(refusals(reports)) == {reason} and not any(r.matches for r in reports[1:])
        _, reports = fuse(before, modulation="off")
        assert not refusals(reports) and not any(r.matches for r in reports[1:])


def test_auto_on_a_gpu() -> None:
    """It need not be there."""
    for before in (ALIKE["1 + s"], RESIDUALS["gate"][0], SELECTS["== 0"][0]):
        assert fuse(before, device="cuda", modulation="auto")[1][1].counters["norm_modulate"] == 1
    _, reports = fuse(GATES["addcmul"][0], device="cuda", modulation="auto")
    assert refusals(reports) == ["Inductor writes a pointwise chain in one pass too (modulation=on forces)"]
    _, reports = fuse(lambda x, s: ln(x.double()) * (1 + s.double()), device="cuda", modulation="auto")
    assert len(refusals(reports)) == 1 and "float64" in refusals(reports)[0]


# --- what is no chain -------------------------------------------------------------------------------------------------


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, C // 2)).transpose(1, 2)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def rotate_complex(x: Tensor, angle: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def rotate_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :2], x[..., 2:]
    return torch.cat([turned * cos + rotate_half(turned) * sin, rest], -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


LEFT: dict[str, Function] = {
    "rotary, halves": lambda x, w4, cos, sin: rotated(rms(heads(x), w4), cos, sin),
    "rotary, pairs": lambda x, w4, cos, sin: (lambda q: (q.float() * cos + rotate_pairs(q).float() * sin).to(q.dtype))(
        rms(heads(x), w4)
    ),
    "rotary, complex": lambda x, w4, cos: rotate_complex(rms(heads(x), w4), cos[:, :2]),
    "rotary, heads after the norm": lambda x, w4, cos, sin: rotated(
        rms(x.unflatten(-1, (2, -1)), w4).transpose(1, 2), cos, sin
    ),
    "rotary, broadcast over heads": lambda x, w4, cos, sin: rotated(
        rms(x.unflatten(-1, (2, -1)), w4), cos[:, None], sin[:, None]
    ),
    "rotary, RMS norm by hand": lambda x, w4, cos, sin: rotated(rms_by_hand(heads(x)) * w4, cos, sin),
    "rotary, split": lambda x, w4, cos, sin: rotate_split(rms(heads(x), w4), cos[:, :2], sin[:, :2]),
    "rotary, part of the head": lambda x, w4, cos, sin: rotate_part(rms(heads(x), w4), cos[:, :2], sin[:, :2]),
    "rotary, whole width": lambda x, w, b, position: rotated(ln(x, w, b), position, position),
    "rotary, a table a sample": lambda x, w, token: rotated(rms(x, w), token, token),
    "rotary, image tokens only": lambda x, w, position: (
        lambda q: torch.cat([q[:, :2], rotated(q[:, 2:], position[2:], position[:4])], 1)
    )(rms(x, w)),
    "affine": lambda x, w, b: ln(x, w, b),
    "affine by hand": lambda x, w, b: ln(x) * w + b,
    "affine by hand, 1 + w": lambda x, w: rms_by_hand(x) * (1 + w),
    "affine from a table": lambda x, table: ln(x) * (1 + table[:, 0:1]) + table[:, 1:2],
    "post-norm residual": lambda x, y, w, b: x + ln(y, w, b),
    "post-norm residual, weight by hand": lambda x, y, w: x + rms_by_hand(y) * w,
    "pre-norm behind a plain residual": lambda x, y, w, b: then(lambda h: ln(h, w, b))(x + y),
    "a number": lambda x: ln(x) * 0.5 + 1,
    "GEGLU": lambda mod: (lambda a, b: a * F.gelu(b))(*mod[..., : 2 * C].chunk(2, -1)),
    "GEGLU of a norm": lambda x, wide: (lambda a, b: a * F.gelu(b))(*F.linear(ln(x), wide).chunk(2, -1)),
    "gated by itself": lambda x: (lambda n: n * F.gelu(n))(ln(x)),
    "product of full tensors": lambda x, y, token: x + y * F.silu(token),
    "layer scale": lambda x, y, w: x + w * y,
    "layer scale by a table": lambda x, y, table: x + table[:, 0:1] * y,
    "layer scale before a norm": lambda x, y, w, b: then(lambda h: ln(h, w, b))(x + w * y),
    "one number a token": lambda x, y, mask: x + mask * y,
    "group norm": lambda x, s: F.group_norm(x, 3) * (1 + s),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    gm, reports = fuse(LEFT[name])
    assert not any(r.matches for r in reports[1:]), structure(gm)
    assert refusals(reports[1:]) == []


@pytest.mark.parametrize("limit", [0, 1])
def test_rewrite_limit(limit: int) -> None:
    """Either pass may be cut short; two gated residuals and a norm between them stay right."""

    def before(x: Tensor, y: Tensor, g: Tensor, s: Tensor, t: Tensor) -> Any:
        h = x + g * y
        return h + s * torch.tanh(ln(h) * (1 + s) + t)

    gm, reports = fuse(before, passes="fuse_modulation,fuse_residual_gate", rewrite_limit=limit)
    args = [TENSORS[n] for n in names(before)]
    torch.testing.assert_close(gm(*args)[0], before(*args))
    assert sum(len(r.matches) for r in reports) == limit


def test_through_the_public_helper() -> None:
    """What users call: every argument counts as an input."""
    args = [TENSORS[n] for n in ("x", "s", "t")]
    expected = lambda x, s, t: (layer_op(x, None, None, s, t, EPS),)  # noqa: E731
    assert_rewrites_to(ALIKE["1 + s"], expected, *args, passes=PASSES, options=ON)


def test_rows_that_are_transposed_are_copied_once() -> None:
    """Tokens from `conv(x).flatten(2).transpose(1, 2)`: the norm and the residual behind it share one copy."""

    def before(x: Tensor, y: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.transpose(1, 2)
        first = ln(tokens) * (1 + s) + t
        return first, ln(tokens + s * y) * (1 + t) + s

    def expected(x, y, s, t):  # type: ignore[no-untyped-def]
        tokens = torch.ops.aten.contiguous.default(torch.ops.aten.transpose.int(x, 1, 2))
        first = layer_op(tokens, None, None, s, t, EPS)
        pair = torch.ops.pvae.residual_gate_layer_norm_modulate.default(tokens, y, s, None, None, t, s, EPS)
        return first, operator.getitem(pair, 1)

    x, y = torch.randn(2, 8, 6), torch.randn(2, 6, 8)
    s, t = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    assert_rewrites_to(before, expected, x, y, s, t, passes=PASSES, options=ON)
