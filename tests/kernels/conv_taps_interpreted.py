"""Property tests of `pvae::conv_taps` under Triton's interpreter; see `interpreted.py` for how they are run."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
import triton
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps import refusal
from pvae.kernels.conv_taps_config import Config, default_config
from tests.kernels.conv_taps_cases import FLOATS, LAYOUTS, Case, cases
from tests.kernels.interpreted import depth

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"
torch.set_num_threads(1)

CONFIGS = (
    None,
    Config(1, 16, 16, 0, 16, 4, 3),
    Config(4, 8, 32, 16, 16, 4, 2),
    Config(8, 16, 16, 16, 32, 8, 4),
    Config(2, 2, 64, 32, 64, 4, 3),
    Config(1, 1, 16, 32, 32, 4, 3),
)
STEPS = 64  # of one launch; the interpreter takes three milliseconds and more for each


def check(case: Case, config: Config | None = None, seed: int = 0) -> None:
    """The kernel took the operands, and errs no more than fp32 sums with one rounding."""
    operands = case.make(seed=seed)
    assert refusal(operands.x, operands.weight) is None
    y = operands.run(config.numbers() if config else [])
    assert y.is_contiguous(memory_format=FORMATS[y.dim()]) and list(y.shape) == case.out_shape()
    found = operands.agrees(y)
    # The interpreter truncates to bf16 where a GPU rounds. Of fp32 few elements say little, and numpy sums its own way.
    slack = {torch.bfloat16: 2.0, torch.float32: 2.0, torch.float16: 1.0}[case.dtype]
    assert found.error <= slack * found.bound, str(found)


def steps(case: Case, config: Config | None) -> int:
    """Iterations of all programs."""
    _, _, *sizes, height, width = case.out_shape()
    if case.upsample:
        height, width = height // 2, width // 2
    cut = config or default_config(case.x[1], case.out, height, width, case.dtype)
    blocks = -(-height // cut.height) * -(-width // cut.width) * -(-case.out // (cut.columns0 + cut.columns1))
    programs = case.x[0] * prod(sizes) * blocks * (4 if case.upsample else 1)
    return programs * prod(case.kernel) * -(-case.x[1] // cut.depth)


@st.composite
def launches(draw: st.DrawFn, upsample: bool | None = None) -> tuple[Case, Config | None]:
    """A case and a cut that makes few steps of it."""
    case = draw(cases(upsample=upsample))
    quick = [config for config in CONFIGS if steps(case, config) <= STEPS]
    assume(quick)
    return case, draw(st.sampled_from(quick))


@given(launches(), st.integers(0, 1000))
@depth(60)
def test_any_convolution(launch: tuple[Case, Config | None], seed: int) -> None:
    check(*launch, seed)


VIDEO = Case((1, 16, 2, 2, 3), 8, (3, 1, 1), padding=(0, 0, 0, 0, 0, 0), before=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("channels", [16, 9])
def test_frames_before_x_wherever_they_lie(channels: int, before: int, layout: str) -> None:
    front = max(0, 2 - before)
    padding = (front, 1, 0, 0, 0, 0)  # a frame behind as well: what lies there in memory is NaN
    check(replace(VIDEO, x=(1, channels, *VIDEO.x[2:]), before=before, padding=padding, layout=layout))


def test_one_frame_before_one_frame() -> None:
    """Strides in time of both mean nothing then, whatever they are."""
    case = replace(VIDEO, x=(1, 16, 1, 2, 3), before=1, padding=(1, 0, 0, 0, 0, 0))
    for layout in LAYOUTS:
        check(replace(case, layout=layout))


@given(launches(upsample=True))
@example((Case((2, 24, 1, 3, 5), 20, (1, 2, 2), upsample=True, residual=True, activation="silu"), CONFIGS[2]))
@depth(15)
def test_enlarged(launch: tuple[Case, Config | None]) -> None:
    check(*launch)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 8, 5, 7), 20, (3, 3), stride=(2, 2), padding=(1, 2, 0, 1)),
        Case((1, 8, 5, 6), 20, (3, 3), dilation=(2, 1), padding=(2, 2, 1, 1), layout="gaps"),
        Case((1, 8, 3, 5), 20, (2, 2), upsample=True, layout="gaps"),
    ],
)
def test_many_tiles_in_every_direction(case: Case) -> None:
    check(case, Config(2, 2, 16, 0, 16, 4, 2))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("channels", "out"), [(96, 96), (192, 200), (16, 384), (96, 3), (3, 96)])
def test_widths_of_decoders(channels: int, out: int, dtype: torch.dtype) -> None:
    check(Case((1, channels, 5, 9), out, (3, 3), residual=True, activation="silu", dtype=dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_a_convolution(bad: float) -> None:
    """And not into what padding reads, nor along masked channels."""
    case = Case((1, 9, 2, 4, 5), 7, (2, 1, 3), padding=(0, 0, 0, 0, 1, 1), before=1)
    operands = case.make()
    operands.x[0, 3, 1, 2, 4] = bad
    y, exact = operands.run(), operands.reference(torch.float64)
    assert torch.equal(y.isfinite(), exact.isfinite()) and not y.isfinite().all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 8, 0, 4), (0, 8, 2, 4, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    case = Case(shape, 4, (1,) * (len(shape) - 2))
    y = case.make().run()
    assert list(y.shape) == case.out_shape() and not y.numel()


def test_no_taps_inside() -> None:
    """Windows wholly in the padding are bias alone."""
    case = Case((1, 8, 2, 2), 4, (1, 1), stride=(2, 2), padding=(2, 2, 2, 2))
    operands = case.make()
    assert operands.bias is not None
    assert torch.equal(operands.run()[:, :, 0, 0], operands.bias[None])
    check(case)
