"""Property tests of the norm kernel under Triton's interpreter; see `interpreted.py` for how they are run."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pvae.kernels import norm_launch
from pvae.kernels.norm_config import Config
from pvae.kernels.norm_examples import FORMS, examples
from pvae.kernels.norm_launch import refusal, run
from pvae.kernels.norm_layout import TWINS, Operands
from pvae.kernels.norm_reference import TOLERANCES, reference
from tests.kernels.interpreted import depth

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"
torch.set_num_threads(1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
configs = st.builds(
    Config,
    warps=st.just(4),
    block=st.sampled_from((16, 64, 256)),
    rows=st.sampled_from((1, 2, 4)),
    early=st.booleans(),
)


def check(
    norm: str,
    operands: Operands,
    h_dtype: torch.dtype | None,
    y_dtype: torch.dtype | None,
    config: Config | None,
    scale_constant: float = 1.0,
) -> None:
    """The kernel took the operands, and each result is within its dtype's tolerance of float64."""
    assert refusal(norm, operands, h_dtype, y_dtype) is None
    got = run(norm, operands, 1e-6, scale_constant, h_dtype, y_dtype, config)
    want = reference(norm, operands, 1e-6, scale_constant, torch.float64)
    for result, exact, dtype in zip(got, want, (h_dtype, y_dtype), strict=True):
        assert (result is None) == (dtype is None)
        if result is not None:
            assert result.dtype == dtype and result.is_contiguous()
            rtol, atol = TOLERANCES[result.dtype]
            rtol *= 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol, equal_nan=True)


@st.composite
def cases(draw: st.DrawFn, forms: tuple[str, ...] = FORMS, select: bool | None = None) -> tuple[str, Operands]:
    """A norm, and operands of any forms, strides and dtypes, some of them left out."""
    norm = draw(st.sampled_from(("layer", "layer", "rms", "none")))
    frames = draw(st.sampled_from((1, 2, 3)))
    channels = draw(st.integers(8, 200) | st.sampled_from((8, 256)))
    operands = examples(
        (draw(st.integers(1, 2)), frames * draw(st.integers(1, 3)), channels),
        draw(dtypes),
        residual=norm == "none" or draw(st.booleans()),
        affine=draw(st.booleans()),
        select=draw(st.booleans()) if select is None else select,
        gate_form=draw(st.sampled_from(forms)),
        form=draw(st.sampled_from(forms)),
        mod_dtype=draw(dtypes),
        frames=frames,
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    left_out = {"rms": ("bias",), "none": ("scale", "scale1", "shift", "shift1", "weight", "bias"), "layer": ()}[norm]
    for first, second in TWINS:
        left_out += draw(st.sampled_from(((), (), (), (second,), (first, second))))
    operands = operands._replace(**dict.fromkeys(left_out))
    if operands.select is not None:
        kind = draw(st.sampled_from((torch.bool, torch.int32, torch.int64)))
        operands = operands._replace(select=operands.select.to(kind))
    return norm, operands


def outputs(norm: str, operands: Operands) -> tuple[torch.dtype | None, torch.dtype | None]:
    """fp32 for each output that there is."""
    return (None if operands.residual is None else torch.float32), (None if norm == "none" else torch.float32)


@given(cases(), dtypes, dtypes, configs | st.none(), st.sampled_from((0.0, 1.0, 2.0)))
@depth(150)
def test_any_operands(
    case: tuple[str, Operands], h_dtype: torch.dtype, y_dtype: torch.dtype, config: Config | None, scale_constant: float
) -> None:
    norm, operands = case
    h, y = outputs(norm, operands)
    check(norm, operands, h and h_dtype, y and y_dtype, config, scale_constant)


@given(st.sampled_from((8, 100, 513)), st.floats(-1e4, 1e4), st.integers(0, 100), st.sampled_from((16, 256)))
@example(513, 1e4, 0, 256)
@depth(30)
def test_a_large_mean_loses_nothing(channels: int, mean: float, seed: int, block: int) -> None:
    """fp32 rows of variance 1 around any mean: as exact as around 0."""
    operands = examples((1, 3, channels), torch.float32, seed=seed)
    check("layer", operands._replace(x=operands.x + mean), None, torch.float32, Config(4, block))


@given(cases(), st.sampled_from((float("nan"), float("inf"), -float("inf"))), st.integers(0, 10**6), configs)
@depth(60)
def test_nan_and_inf_stay_in_their_row_and_spread_as_in_eager(
    case: tuple[str, Operands], bad: float, where: int, config: Config
) -> None:
    norm, operands = case
    x = operands.x.clone()
    x.view(-1)[where % x.numel()] = bad
    check(norm, operands._replace(x=x), *outputs(norm, operands), config)


@given(cases(select=True), st.sampled_from(("scale1", "shift1", "gate1")), configs)
@depth(60)
def test_nan_in_the_set_that_is_not_chosen_stays_out(case: tuple[str, Operands], name: str, config: Config) -> None:
    norm, operands = case
    twin: Tensor | None = getattr(operands, name)
    if twin is not None:
        twin.fill_(float("nan"))
    assert operands.select is not None
    operands = operands._replace(select=torch.zeros_like(operands.select))
    check(norm, operands, *outputs(norm, operands), config)


@pytest.mark.parametrize("channels", [1, 7, 8, 1000, 3073, 5120, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_sizes_with_the_chosen_configuration(channels: int, dtype: torch.dtype) -> None:
    check("layer", examples((1, 2, channels), dtype, residual=True, affine=True), dtype, dtype, None)


@pytest.mark.parametrize("shape", [(40,), (5, 16), (2, 3, 4, 24), (2, 2, 2, 2, 8)])
def test_modulation_that_broadcasts_along_any_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for keep in range(2 ** (len(shape) - 1)):
        sizes = [n if keep >> axis & 1 else 1 for axis, n in enumerate(shape[:-1])]
        operands = Operands(x, scale=torch.randn(*sizes, shape[-1]), shift=torch.randn(shape[-1]))
        if refusal("layer", operands) is None:
            check("layer", operands, None, torch.float32, None)
        else:
            assert keep in (0b0101, 0b1010)  # four separate leading dimensions


def test_more_batch_entries_than_a_grid_dimension_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_launch, "GRID_LIMIT", 3)
    operands = examples((7, 2, 24), torch.float32, residual=True, select=True)
    check("layer", operands, torch.float32, torch.float32, Config(4, 16))  # a configuration that no plan is kept for
    plan = norm_launch.make_plan("layer", operands, torch.float32, torch.float32)
    assert isinstance(plan, norm_launch.Plan) and plan.grid == (2, 3, 3)


def test_no_rows() -> None:
    operands = examples((2, 0, 16), torch.bfloat16, form="sample_row")
    y = run("layer", operands, 1e-6, 1.0, None, torch.bfloat16)[1]
    assert y is not None and y.shape == (2, 0, 16)
