"""pvae::conv_taps: its semantics, fake, symbolic sizes, errors and cuts; the kernel itself under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps import OP, Config, candidate_configs, conv_taps, default_config, refusal, supports
from pvae.kernels.phase_weight import phase_weight
from pvae.testing import relative_error
from tests.kernels.conv_taps_cases import FLOATS, Case, cases
from tests.kernels.interpreted import run_interpreted

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
VIDEO = Case((2, 6, 3, 5, 7), 4, (3, 3, 3), before=2, residual=True, activation="silu")
PICTURE = Case((2, 6, 5, 7), 4, (3, 3), residual=True, activation="relu")


# --- on the CPU: the reference ---------------------------------------------------------------------------------------


def as_models_write_it(case: Case, args: tuple[Any, ...]) -> Tensor:
    x, before, weight, bias, residual, stride, padding, dilation, _upsample, activation = args
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    x = x if before is None else torch.cat([before, x], 2)
    widths = [w for i in reversed(range(len(stride))) for w in padding[2 * i : 2 * i + 2]]
    y = convolve(F.pad(x, widths), weight, bias, stride, 0, dilation)
    y = y if residual is None else y + residual
    return y if activation == "none" else getattr(F, activation)(y)


@given(cases((FP64,), upsample=False))
def test_is_what_models_write(case: Case) -> None:
    operands = case.make()
    y = operands.run()
    assert list(y.shape) == case.out_shape()
    assert relative_error(y, as_models_write_it(case, operands.args())) < 1e-14


@pytest.mark.parametrize("case", [VIDEO, PICTURE])
def test_enlarged_is_the_convolution_of_the_enlarged_picture(case: Case) -> None:
    x, before, weight, bias, *_ = case.make().args(FP64)
    whole = x if before is None else torch.cat([before, x], 2)
    enlarged = F.interpolate(whole, scale_factor=(1,) * (x.dim() - 4) + (2, 2), mode="nearest")
    time = [1, 0] if x.dim() == 5 else []
    ones = [1] * (x.dim() - 2)
    args = [before, phase_weight(weight), bias]
    exact = as_models_write_it(
        case, (enlarged, None, weight, bias, None, ones, [*time, 1, 1, 1, 1], ones, False, "none")
    )
    residual = torch.randn_like(exact)
    y = conv_taps(x, *args, residual, ones, [*time, 1, 1, 1, 1], ones, True, "relu", [])
    assert relative_error(y, F.relu(exact + residual)) < 1e-14


@given(cases((FP64, *FLOATS)))
def test_the_fake_is_like_the_result(case: Case) -> None:
    operands = case.make()
    y = operands.run()
    assert y.is_contiguous(memory_format=FORMATS[y.dim()])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in operands.args()]
        fake = OP(*fakes, [])
    assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("case", [VIDEO, PICTURE, Case((1, 3, 1, 4, 4), 2, (1, 2, 2), upsample=True)])
def test_opcheck(case: Case) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, (*case.make().args(), []), test_utils=tests)


def test_nothing_is_read_where_one_memory_order_is_as_good_as_another() -> None:
    """Sizes of one: strides are those of the fake all the same."""
    for shape in ((1, 1, 4, 4), (3, 4, 1, 1), (1, 8, 1, 4, 4), (2, 1, 1, 1, 1)):
        operands = Case(shape, 1, (1,) * (len(shape) - 2)).make()
        with FakeTensorMode() as mode:
            fake = OP(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in operands.args()], [])
        assert operands.run().stride() == fake.stride()


# --- symbolic sizes --------------------------------------------------------------------------------------------------


def sized(case: Case, *sizes: int) -> tuple[Tensor | None, ...]:
    """Operands for an x of other sizes."""
    operands = replace(case, x=(*case.x[:2], *sizes)).make()
    return (operands.x, operands.before, operands.weight, operands.bias, operands.residual)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_trace_for_all_sizes(stride: int) -> None:
    case = replace(VIDEO, stride=(1, stride, stride))

    def call(*tensors: Tensor) -> Tensor:
        return OP(*tensors, *case.rest, [])

    traced = make_fx(call, tracing_mode="symbolic")(*sized(case, 5, 8, 11))
    (node,) = [n for n in traced.graph.nodes if n.target is OP]
    assert not any(isinstance(size, int) for size in node.meta["val"].shape[2:])
    for sizes in ((3, 8, 11), (7, 12, 5), (2, 6, 9)):
        args = sized(case, *sizes)
        assert torch.equal(traced(*args), call(*args))


@pytest.mark.parametrize("case", [VIDEO, PICTURE])
def test_one_compile_for_all_sizes(case: Case) -> None:
    graphs: list[int] = []

    def counting(gm: Any, inputs: Any) -> Any:
        graphs.append(1)
        return gm.forward

    def call(*tensors: Tensor) -> Tensor:
        return OP(*tensors, *case.rest, [])

    compiled = torch.compile(call, backend=counting, dynamic=True, fullgraph=True)
    for sizes in ((5, 8, 11), (9, 10, 13), (8, 15, 14)):  # all different: equal ones would be taken for one size
        args = sized(case, *sizes[-len(case.kernel) :])
        assert torch.equal(compiled(*args), call(*args))
    assert len(graphs) == 1


# --- errors and refusals ---------------------------------------------------------------------------------------------

X, W = torch.randn(1, 4, 3, 5, 5), torch.randn(6, 4, 3, 3, 3)
CALL: dict[str, Any] = {
    "x": X,
    "before": None,
    "weight": W,
    "bias": None,
    "residual": None,
    "stride": [1] * 3,
    "padding": [2, 0, 1, 1, 1, 1],
    "dilation": [1] * 3,
    "upsample": False,
    "activation": "none",
    "config": [],
}
FLAT = {"x": X[:, :, 0], "weight": W[:, :, 0], "stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1]}
PHASES = {"weight": torch.randn(8, 4, 1, 2, 2), "padding": [0, 0, 1, 1, 1, 1], "upsample": True}
ERRORS: list[tuple[str, dict[str, Any]]] = [
    (r"x \[1, 4, 5, 5\] does not go with weight \[6, 4, 3, 3, 3\]", {"x": X[:, :, 0]}),
    (r"x \[1, 3, 3, 5, 5\] does not go with weight \[6, 4, 3, 3, 3\]", {"x": X[:, :3]}),
    (r"x \[4, 5\] does not go with", {"x": X[0, :, 0, 0], "weight": W[0, :, 0, 0]}),
    ("x is torch.float32, the weight torch.bfloat16", {"weight": W.bfloat16()}),
    ("3 spatial dimensions, stride .1, 1.", {"stride": [1, 1]}),
    ("3 spatial dimensions", {"padding": [1, 1, 1]}),
    ("3 spatial dimensions", {"dilation": [1]}),
    ("activation 'gelu' is none of none, silu, relu", {"activation": "gelu"}),
    ("no time dimension", {**FLAT, "before": X}),
    (r"before \[1, 4, 3, 5, 4\] of torch.float32 does not go with x \[1, 4, 3, 5, 5\]", {"before": X[..., :4]}),
    ("before .* does not go with", {"before": X[:, :3]}),
    ("before .* does not go with", {"before": X.repeat(2, 1, 1, 1, 1)}),
    ("before .* of torch.float16 does not go with x .* of torch.float32", {"before": X.half()}),
    (r"padding \[2, -1, 1, 1, 1, 1\] is negative", {"padding": [2, -1, 1, 1, 1, 1]}),
    (r"bias \[4\] is not \[6\]", {"bias": torch.randn(4)}),
    (r"residual \[1, 6, 1, 5, 5\] is not as the result, \[1, 6, 3, 5, 5\]", {"residual": torch.randn(1, 6, 1, 5, 5)}),
    ("upsample takes a phase weight", {"upsample": True}),
    ("upsample takes a phase weight", {**PHASES, "weight": torch.randn(6, 4, 1, 2, 2)}),
    ("upsample takes a phase weight", {**PHASES, "stride": [1, 2, 1]}),
    ("upsample takes a phase weight", {**PHASES, "dilation": [1, 1, 2]}),
    ("upsample takes a phase weight", {**PHASES, "padding": [0, 0, 1, 1, 0, 1]}),
    (r"bias \[8\] is not \[2\]", {**PHASES, "bias": torch.randn(8)}),
]


@pytest.mark.parametrize(("says", "changes"), ERRORS)
def test_what_does_not_go_together_is_an_error(says: str, changes: dict[str, Any]) -> None:
    assert conv_taps(**CALL).shape == (1, 6, 3, 5, 5) and conv_taps(**CALL | PHASES).shape == (1, 2, 3, 10, 10)
    with pytest.raises(ValueError, match=f"conv_taps: .*{says}|conv_taps: {says}"):
        conv_taps(**CALL | changes)


@pytest.mark.parametrize(
    ("x", "weight", "groups", "reason"),
    [
        (X, W, 1, None),
        (X[:, :, 0], W[:, :, 0], 1, None),
        (X.double(), W.double(), 1, None),
        (X[:, :, 0, 0], W[:, :, 0, 0], 1, "1 spatial dimensions, not 2 or 3"),
        (X.int(), W.int(), 1, "torch.int32 is not a floating-point type"),
        (X, W.half(), 1, "the activation is torch.float32, the weight torch.float16"),
        (X, W[:, :2], 2, "2 groups"),
    ],
)
def test_supports(x: Tensor, weight: Tensor, groups: int, reason: str | None) -> None:
    assert supports(x, weight, groups) == reason
    with FakeTensorMode() as mode:
        assert supports(mode.from_tensor(x), mode.from_tensor(weight), groups) == reason


def on_gpu(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """That need not be there."""
    with FakeTensorMode():
        return torch.empty(1, 4, 3, 5, 5, device="cuda", dtype=dtype), torch.empty(
            6, 4, 3, 3, 3, device="cuda", dtype=dtype
        )


def test_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert refusal(X, W) == "Triton does not run on cpu"
    assert refusal(X, W.half()) == supports(X, W.half())
    for dtype in (torch.float16, BF16):
        assert refusal(*on_gpu(dtype)) is None
    assert refusal(*on_gpu(FP64)) == "torch.float64 is not fp16, bf16 or fp32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert refusal(*on_gpu(FP32)) is None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "without tf32" in (refusal(*on_gpu(FP32)) or "")


# --- cuts ------------------------------------------------------------------------------------------------------------

GOOD = [8, 16, 64, 32, 32, 4, 3]


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ([], "config has 7 numbers .height, width, columns0, columns1, depth, warps, stages., not"),
        ([*GOOD, 1], "config has 7 numbers"),
        ([7, *GOOD[1:]], "not of powers of two"),
        ([0, *GOOD[1:]], "not of powers of two"),
        ([-8, *GOOD[1:]], "not of powers of two"),
        ([*GOOD[:2], 96, *GOOD[3:]], "not of powers of two"),
        ([*GOOD[:2], 8, *GOOD[3:]], "columns0 of at least 16"),
        ([*GOOD[:3], 8, *GOOD[4:]], "columns1 below 16"),
        ([*GOOD[:4], 8, *GOOD[5:]], "depth and columns0 of at least 16"),
        ([*GOOD[:5], 3, 3], "not of powers of two"),
    ],
)
def test_cuts_that_no_kernel_has(numbers: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.of(numbers)
    assert Config.of(GOOD).numbers() == GOOD and Config.of([*GOOD[:3], 0, *GOOD[4:]]).columns1 == 0


GEOMETRIES = [
    (channels, out, height, width)
    for channels in (3, 16, 96, 128, 192, 384, 512, 1024)
    for out in (3, 16, 32, 96, 192, 384)
    for height, width in ((1, 1), (2, 30), (60, 104), (480, 832))
]


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    tile = config.height * config.width + config.columns0 + config.columns1
    return config.stages * tile * config.depth * dtype.itemsize


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_candidate_is_a_cut(dtype: torch.dtype) -> None:
    for geometry in GEOMETRIES:
        found = list(candidate_configs(*geometry, dtype))
        assert len(found) == len(set(found)) <= 250, geometry
        assert found[0] == default_config(*geometry, dtype), geometry
        for config in found:
            assert Config.of(config.numbers()) == config
            assert shared_bytes(config, dtype) <= 227 * 1024
            assert config.height * config.width * (config.columns0 + config.columns1) <= 32 * config.warps * 200


@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 2048), st.sampled_from(FLOATS))
def test_the_rules_choice(channels: int, out: int, height: int, width: int, dtype: torch.dtype) -> None:
    config = default_config(channels, out, height, width, dtype)
    assert Config.of(config.numbers()) == config
    assert shared_bytes(config, dtype) <= 220 * 1024
    accumulators = config.height * config.width * (config.columns0 + config.columns1) // (32 * config.warps)
    assert accumulators <= 192
    assert config.height == 1 or config.height < 2 * height  # no block of which half is below the picture
    columns = config.columns0 + config.columns1
    assert -(-out // columns) * columns < out + columns and (out < 16 or columns < 2 * out)


@pytest.mark.parametrize(
    ("out", "columns"), [(96, (64, 32)), (192, (128, 64)), (384, (128, 64)), (256, (128, 0)), (3, (16, 0))]
)
def test_widths_of_decoders_waste_nothing(out: int, columns: tuple[int, int]) -> None:
    config = default_config(192, out, 60, 104, BF16)
    assert (config.columns0, config.columns1) == columns


def test_under_the_interpreter() -> None:
    run_interpreted("conv_taps_interpreted.py")
