"""The norm kernel on a GPU, against float64 and beside eager."""

from __future__ import annotations

import itertools

import pytest
import torch

from pvae.kernels.norm_config import Config, candidates
from pvae.kernels.norm_examples import FORMS, examples
from pvae.kernels.norm_launch import make_plan, refusal, run, work_of
from pvae.kernels.norm_layout import Operands
from pvae.kernels.norm_reference import TOLERANCES, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(norm: str, operands: Operands, dtype: torch.dtype, config: Config | None = None) -> None:
    h_dtype = dtype if operands.residual is not None else None
    y_dtype = dtype if norm != "none" else None
    assert refusal(norm, operands, h_dtype, y_dtype) is None
    got = run(norm, operands, 1e-6, 1.0, h_dtype, y_dtype, config)
    want = reference(norm, operands, 1e-6, 1.0, torch.float64)
    rtol, atol = TOLERANCES[dtype]
    for result, exact in zip(got, want, strict=True):
        if result is not None:
            torch.testing.assert_close(result.double(), exact, rtol=rtol * 1.01, atol=atol, equal_nan=True)


LEFT_OUT = {"layer": (), "rms": ("bias",), "none": ("scale", "scale1", "shift", "shift1")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("channels", [8, 100, 1024, 1536, 3073, 3080, 5120, 16384])
def test_every_form(channels: int, norm: str, dtype: torch.dtype) -> None:
    for form, residual, select in itertools.product(FORMS, (False, True), (False, True)):
        if norm == "none" and not residual:
            continue
        operands = examples(
            (2, 60, channels), dtype, residual=residual, select=select, form=form, gate_form=form, frames=5,
            strided=True, affine=norm == "layer" and select, device="cuda",
        )  # fmt: skip
        check(norm, operands._replace(**dict.fromkeys(LEFT_OUT[norm])), dtype)


def test_every_candidate() -> None:
    for channels, select in itertools.product((512, 1536, 5120), (False, True)):
        operands = examples((2, 1000, channels), torch.bfloat16, residual=True, select=select, device="cuda")
        for config in candidates(work_of(operands)):
            assert not isinstance(make_plan("layer", operands, None, None, config), str)
            check("layer", operands, torch.bfloat16, config=config)


def test_a_large_mean_loses_nothing() -> None:
    operands = examples((1, 64, 5120), torch.float32, device="cuda")
    check("layer", operands._replace(x=operands.x + 1e4), torch.float32)


def test_more_than_two_to_the_31_elements() -> None:
    operands = examples((1, 300_000, 8192), torch.bfloat16, form="channel", device="cuda")
    y = run("layer", operands, 1e-6, 1.0, None, torch.bfloat16)[1]
    tail = operands._replace(x=operands.x[:, -4:])
    want = reference("layer", tail, 1e-6, 1.0, torch.float64)[1]
    assert y is not None
    torch.testing.assert_close(y[:, -4:].double(), want, rtol=2**-8 * 1.01, atol=1e-5)
