"""The source of Hopper's `conv_taps` against torch, emulated: strides, pads, frames before and behind, tiles of every shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from pvae.kernels import conv_taps  # noqa: E402
from pvae.kernels import conv_taps_launch as launch  # noqa: E402
from pvae.testing import relative_error  # noqa: E402
from tests.kernels.conv_taps_cases import Case  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter has no Gluon")

BF16, FP32 = torch.bfloat16, torch.float32
DOWN = Case((1, 16, 12, 66), 16, (3, 3), stride=(2, 2), padding=(0, 1, 0, 1), dtype=BF16)  # diffusers' Downsample2D
VIDEO = Case((1, 16, 3, 11, 37), 16, (3, 3, 3), stride=(2, 2, 2), padding=(0, 0, 1, 1, 1, 1), before=2, dtype=BF16)
WIDE, NARROW = (2, 64, 16, 0, 16, 9, 2), (8, 16, 16, 0, 16, 9, 3)
CASES = {
    "down": (DOWN, WIDE),
    "down, odd": (replace(DOWN, x=(2, 16, 11, 67), padding=(1, 1, 1, 1)), WIDE),
    "down, in two products and blocks": (replace(DOWN, x=(1, 24, 17, 131), out=40), (4, 64, 16, 16, 16, 9, 3)),
    "down, narrow": (replace(DOWN, x=(1, 16, 21, 35), padding=(1, 0, 2, 1)), NARROW),
    "down, two rows a product": (replace(DOWN, x=(1, 16, 21, 70)), (8, 32, 16, 0, 16, 9, 2)),
    "down, shared rows of two": (replace(DOWN, x=(1, 16, 21, 70), kernel=(5, 3)), (8, 32, 16, 0, 16, 9, 2)),
    "rows": (replace(DOWN, stride=(2, 1)), WIDE),
    "columns": (replace(DOWN, stride=(1, 2), x=(1, 16, 5, 130)), WIDE),
    "columns, dilated": (replace(DOWN, stride=(1, 2), dilation=(1, 3), padding=(1, 1, 3, 3)), NARROW),
    "patches": (replace(DOWN, kernel=(2, 2), padding=(0,) * 4), WIDE),
    "1x1": (replace(DOWN, kernel=(1, 1), padding=(0,) * 4), NARROW),
    "4x5, pads wide": (replace(DOWN, kernel=(4, 5), padding=(3, 2, 4, 1)), NARROW),
    "gaps": (replace(DOWN, layout="gaps"), WIDE),
    "contiguous": (replace(DOWN, layout="contiguous"), WIDE),
    "tf32": (replace(DOWN, dtype=FP32), WIDE),
    "video": (VIDEO, NARROW),
    "video, no cache": (replace(VIDEO, before=None, padding=(2, 0, 0, 1, 0, 1), stride=(1, 2, 2)), WIDE),
    "stride 1": (replace(VIDEO, stride=(1, 1, 1)), WIDE),
    "stride 1, narrow": (replace(DOWN, stride=(1, 1), x=(1, 16, 9, 20)), NARROW),
    "stride 1, enlarged": (Case((1, 16, 5, 20), 16, (2, 2), upsample=True, dtype=BF16), NARROW),
    "turned": (replace(VIDEO, stride=(2, 1, 1), x=(1, 16, 3, 67, 5), residual=True), (64, 2, 16, 0, 16, 9, 2)),
    "turned, 2x4": (
        replace(DOWN, stride=(1, 1), x=(2, 16, 35, 9), kernel=(2, 4), dilation=(2, 1)),
        (32, 4, 16, 16, 16, 9, 2),
    ),
    "turned, enlarged": (Case((1, 16, 20, 5), 16, (2, 2), upsample=True, dtype=BF16), (16, 8, 16, 0, 16, 9, 3)),
}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.emulated_hopper import Launch

    monkeypatch.setattr(launch, "_processors", lambda device: 132)
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, "Launch", Launch)


def run(case: Case, config: tuple[int, ...], after: int = 0) -> tuple[Tensor, Tensor]:
    """The plan's result, and what it should be."""
    operands = case.make()
    x, before, weight, bias, residual = operands.args()[:5]
    later = operands.x[:, :, :1].repeat(1, 1, after, 1, 1) if after else None
    stride, padding, dilation, upsample, activation = case.rest
    tensors = (x, before, weight, bias, residual, later)
    memory = [None if t is None else launch.Memory(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    rest = (tuple(stride), tuple(padding), tuple(dilation), upsample, activation, config, True, True)
    shape = conv_taps.out_shape(x, before, weight, stride, padding, dilation, upsample, later)
    plan = launch.make_plan(launch.Call(*memory[:5], *rest, memory[5]), shape)  # type: ignore[arg-type]
    assert isinstance(plan, launch.HopperPlan)
    y = torch.empty(shape, dtype=x.dtype).contiguous(memory_format=launch.FORMATS[x.dim()]).fill_(float("nan"))
    plan.launch(launch.Operands(*tensors), y)
    exact = conv_taps.reference(*operands.args(torch.float64), None if later is None else later.double())
    return y, exact


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", CASES)
def test_is_the_convolution(name: str) -> None:
    y, exact = run(*CASES[name])
    assert relative_error(y, exact) < (2**-8 if y.dtype == BF16 else 1e-6)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
def test_frames_behind(stride: tuple[int, int, int]) -> None:
    y, exact = run(replace(VIDEO, stride=stride, padding=(0, 0, 1, 1, 1, 1)), NARROW, after=2)
    assert relative_error(y, exact) < 2**-8
