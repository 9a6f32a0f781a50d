"""The norm family: schemas and fakes, refusals, layouts of operands, configurations, the kernel under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from pvae.kernels import layer_norm_modulate, residual_gate, rms_norm_modulate
from pvae.kernels import residual_gate_layer_norm_modulate as residual_layer
from pvae.kernels import residual_gate_rms_norm_modulate as residual_rms
from pvae.kernels.norm_config import Work, by_rule, candidates
from pvae.kernels.norm_examples import FORMS, examples
from pvae.kernels.norm_launch import supports
from pvae.kernels.norm_layout import Layout, Memory, Operands, aligned, find_layout
from tests.kernels.interpreted import run_interpreted

SHAPE = (2, 6, 24)
HALF, FULL = torch.bfloat16, torch.float32


def arguments(**options: Any) -> dict[str, Any]:
    """Keyword arguments of the ops from `examples`."""
    found = examples(SHAPE, HALF, frames=3, **options)._asdict()
    found["index"] = found.pop("select")
    return found


def calls() -> list[tuple[OpOverload, dict[str, Any]]]:
    """Every op, plain and with two sets, with and without the optional dtypes."""
    layer, rms = layer_norm_modulate.layer_norm_modulate, rms_norm_modulate.rms_norm_modulate
    pair = residual_layer.residual_gate_layer_norm_modulate
    rms_pair = residual_rms.residual_gate_rms_norm_modulate
    found = []
    for select in (False, True):
        plain, gated = arguments(select=select, affine=True, strided=True), arguments(select=select, residual=True)
        for names in ("residual", "gate", "gate1"):
            plain.pop(names)
        found.append((layer, plain | {"eps": 1e-6}))
        found.append((layer, plain | {"eps": 1e-6, "out_dtype": FULL, "scale": None, "scale1": None}))
        found.append((rms, {k: v for k, v in plain.items() if k != "bias"} | {"eps": 1e-6, "scale_constant": 0.0}))
        found.append((pair, gated | {"eps": 1e-6, "h_dtype": FULL}))
        found.append((rms_pair, {k: v for k, v in gated.items() if k != "bias"} | {"eps": 1e-6, "out_dtype": FULL}))
        gate = {k: gated[k] for k in ("residual", "x", "gate", "gate1", "index")}
        found.append((residual_gate.residual_gate, gate))
    return found


@pytest.mark.parametrize("case", range(len(calls())))
def test_schema_and_fake(case: int) -> None:
    op, kwargs = calls()[case]
    torch.library.opcheck(op, (), kwargs, test_utils=("test_schema", "test_faketensor"))
    real = op(**kwargs)
    with FakeTensorMode() as mode:
        fake = op(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()})
    for r, f in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_a_backward_pass_warns() -> None:
    """The ops are for inference and have no formula; that must not be silent."""
    x = torch.randn(2, 8, requires_grad=True)
    y = rms_norm_modulate.rms_norm_modulate(x, None, None, None, 1e-6)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        (x + y).sum().backward()


def test_dynamic_shapes_compile_once() -> None:
    """The ops stay one node with symbolic sizes."""

    def f(x: Tensor, scale: Tensor) -> Tensor:
        return layer_norm_modulate.layer_norm_modulate(x, None, None, scale, None, 1e-6) + 1

    compiled = torch.compile(f, backend="eager", dynamic=True, fullgraph=True)
    for rows in (3, 7):
        x, scale = torch.randn(2, rows, 8), torch.randn(2, 1, 8)
        torch.testing.assert_close(compiled(x, scale), f(x, scale))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_what_models_write(form: str) -> None:
    o = examples(SHAPE, torch.float64, residual=True, form=form, gate_form=form, frames=3, affine=True)
    assert o.residual is not None and o.gate is not None and o.scale is not None and o.shift is not None
    gate, scale, shift = (aligned(t, o.x.shape).expand(SHAPE) for t in (o.gate, o.scale, o.shift))
    h = o.residual + gate * o.x
    y = F.layer_norm(h, SHAPE[-1:], o.weight, o.bias, 1e-6) * (1 + scale) + shift
    torch.testing.assert_close(residual_layer.reference(o, 1e-6), (h, y))
    torch.testing.assert_close(
        rms_norm_modulate.reference(o._replace(residual=None, gate=None, bias=None), 1e-6),
        F.rms_norm(o.x, SHAPE[-1:], o.weight, 1e-6) * (1 + scale) + shift,
    )


REFUSED = {
    "stride 2": {"x": torch.randn(2, 6, 48)[..., ::2]},
    "torch.float64": {"x": torch.randn(SHAPE, dtype=torch.float64)},
    "last dimension of scale": {"scale": torch.randn(48)[::2]},
    "different numbers of frames": {"scale": torch.randn(2, 3, 1, 24), "shift": torch.randn(2, 2, 1, 24)},
    "lie differently": {
        "scale": torch.randn(2, 1, 24),
        "scale1": torch.randn(2, 1, 48).chunk(2, -1)[0],
        "select": torch.zeros(2, 6, dtype=torch.bool),
    },
    "scale is torch.float32 and scale1 is torch.bfloat16": {
        "scale": torch.randn(24),
        "scale1": torch.randn(24).bfloat16(),
        "select": torch.zeros(2, 6, dtype=torch.bool),
    },
    "16384": {"x": torch.randn(1, 1, 16385)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    said = supports("layer", Operands(**({"x": torch.randn(SHAPE)} | REFUSED[reason])))
    assert said is not None and reason in said


MISFITS = {
    "neither": {"scale": torch.randn(2, 4, 24)},
    "differ in shape": {"residual": torch.randn(2, 5, 24)},
    "is not \\[C\\]": {"weight": torch.randn(23)},
    "needs scale and index": {"scale": torch.randn(24), "scale1": torch.randn(24)},
    "one number a row": {"select": torch.zeros(2, 5, dtype=torch.bool)},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_shapes_that_do_not_fit_are_errors(reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        supports("layer", Operands(**({"x": torch.randn(SHAPE)} | MISFITS[reason])))


def layout(x: Tensor, **operands: Tensor) -> Layout:
    found = find_layout(Operands(x, **operands))
    assert isinstance(found, Layout)
    return found


def test_layouts() -> None:
    x = torch.empty(2, 6, 8)
    table = torch.empty(2, 1, 48)
    assert layout(x, scale=torch.empty(8)) == Layout(
        1, 12, 1, {"x": Memory("row", 0, 8), "scale": Memory("batch", 0, 0)}
    )
    assert layout(x, scale=table.chunk(6, -1)[1]).operands["scale"] == Memory("batch", 48, 0)
    assert layout(x, scale=torch.empty(2, 6, 8)).operands["scale"] == Memory("row", 0, 8)
    assert layout(x, scale=torch.empty(1, 6, 8)) == Layout(
        2, 6, 1, {"x": Memory("row", 48, 8), "scale": Memory("row", 0, 8)}
    )
    frames = layout(x, scale=torch.empty(2, 3, 1, 8), shift=torch.empty(2, 1, 8))
    assert (frames.batches, frames.rows, frames.group) == (2, 6, 2)
    assert frames.operands["scale"] == Memory("frame", 24, 8)
    assert frames.operands["x"] == Memory("row", 48, 8)
    # One sample: its frames become the batch, and each frame's vector is shared by all rows of a program.
    assert layout(x[:1], scale=torch.empty(1, 3, 1, 8)) == Layout(
        3, 2, 1, {"x": Memory("row", 16, 8), "scale": Memory("batch", 8, 0)}
    )
    assert layout(x[:, 2:]).operands["x"] == Memory("row", 48, 8)
    cycle = layout(torch.empty(2, 3, 4, 8), scale=torch.empty(1, 1, 4, 8), gate=torch.empty(2, 1, 1, 8))
    assert cycle.operands["scale"] == Memory("cycle", 0, 8)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("channels", [8, 64, 1000, 1536, 3072, 3073, 5120, 8192, 16384])
def test_configurations(channels: int, lanes: int, residual: bool) -> None:
    for rows in (1, 256, 75600):
        work = Work(channels, rows, rows, residual, lanes)
        for config in candidates(work):
            for size in (config.block, config.rows, config.warps):
                assert size & (size - 1) == 0 and size > 0
            assert config.rows <= max(1, rows) and config.warps * lanes <= 1024
            assert channels <= 20 * config.block
        assert by_rule(work) in candidates(work)
    assert by_rule(Work(5120, 75600, 75600)).block * 5 == 5120  # no lane idle


def test_under_the_interpreter() -> None:
    run_interpreted("norms_interpreted.py")
