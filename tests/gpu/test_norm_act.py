"""The channel norm kernels on a GPU, against float64 and beside eager, and what the pass makes of autoencoders there."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.kernels.channel_norm_launch import make_plan, refusal, run
from pvae.kernels.channel_norm_layout import Border, Operands
from pvae.kernels.channel_norm_reference import ACTIVATIONS, Norm, exact
from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.kernels.norm_reference import TOLERANCES
from pvae.testing import agreement

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AROUND = Border((2, 0, 1, 1, 1, 2), ("replicate", "reflect", "constant"))


def check(norm: Norm, operands: Operands, border: Border = Border()) -> None:  # noqa: B008
    assert refusal(norm, operands, border) is None
    for _ in range(2):  # the second launch is that of an already compiled kernel
        got = run(norm, operands, border)
        want = exact(norm, operands, border, torch.float64)
        assert is_channels_last(got)
        rtol, atol = TOLERANCES[got.dtype]
        torch.testing.assert_close(got.double(), want, rtol=rtol * 1.01, atol=2 * atol, equal_nan=True)


def activation(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    x = torch.randn(shape, device="cuda") + mean
    return x.to(dtype).to(memory_format=FORMATS[len(shape)])


def operands_for(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, like: bool = False) -> Operands:
    weight, bias = (torch.randn(shape[1], device="cuda").to(dtype) for _ in range(2))
    modulation = [activation(shape if like else (*shape[:2], *[1] * (len(shape) - 2)), dtype) for _ in range(2)]
    return Operands(activation(shape, dtype, mean), weight, bias, *modulation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 8, 48, 96, 100, 128, 160, 384, 512, 768, 1000, 1024, 2048])
def test_norms_over_channels(channels: int, dtype: torch.dtype) -> None:
    for kind, border, like in itertools.product(("rms", "l2", "layer"), (Border(), AROUND), (False, True)):
        if channels == 1 and kind == "layer":
            continue  # all zeros but for rounding, enlarged by 1 / sqrt(eps)
        for activation_name in ACTIVATIONS:
            norm = Norm(kind, 1e-6, activation_name, 1.0 if kind == "layer" else 3.0)
            check(norm, operands_for((2, channels, 3, 5, 7), dtype, like=like), border)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 2), (96, 32), (128, 32), (512, 32), (768, 32), (512, 1), (48, 48)]
)
@pytest.mark.parametrize("size", [(2, 5, 7), (3, 60, 90)])
def test_group_norms(size: tuple[int, ...], channels: int, groups: int, dtype: torch.dtype) -> None:
    for per_frame, border, like in itertools.product((False, True), (Border(), AROUND), (False, True)):
        norm = Norm("group", 1e-6, "silu", groups=groups, per_frame=per_frame)
        check(norm, operands_for((2, channels, *size), dtype, 2.0, like), border)


def test_pictures_and_strided_activations() -> None:
    for shape in ((2, 96, 33, 35), (3, 96, 2, 33, 35)):
        whole = operands_for(shape, torch.bfloat16)
        for x in (whole.x, whole.x[..., 1:-1], whole.x[:, 32:64], whole.x[1:]):
            part = Operands(x)
            check(Norm("rms", 1e-6, "silu"), part)
            check(Norm("group", 1e-6, "silu", groups=4), part)


def test_a_large_mean_loses_nothing() -> None:
    x = activation((1, 128, 9, 96, 96), torch.float32, 1000.0)
    for groups in (1, 32):
        norm = Norm("group", 1e-6, groups=groups)
        want = exact(norm, Operands(x), Border(), torch.float64)
        ours, eager = run(norm, Operands(x), Border()), F.group_norm(x, groups, eps=1e-6)
        errors = [(y.double() - want).norm().item() for y in (ours, eager)]
        assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_within_the_contract(dtype: torch.dtype) -> None:
    x = activation((1, 128, 5, 120, 160), dtype)
    w, b = (torch.randn(128, device="cuda").to(dtype) for _ in range(2))
    cases = (
        (
            Norm("group", 1e-6, "silu", groups=32),
            lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, 1e-6)),
        ),
        (
            Norm("l2", 1e-12, "silu", 128**0.5),
            lambda x, w, b: F.silu(F.normalize(x, dim=1) * 128**0.5 * w[:, None, None, None] + b[:, None, None, None]),
        ),
    )
    for norm, eager in cases:
        found = agreement(
            run(norm, Operands(x, w, b), Border()), eager(x, w, b), eager(x.double(), w.double(), b.double())
        )
        assert found.ok, str(found)


def test_more_than_two_to_the_31_elements() -> None:
    x = torch.empty(1, 128, 17, 1024, 1024, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last_3d)
    x.normal_()
    y = run(Norm("rms", 1e-6, "silu"), Operands(x), Border((1, 0, 0, 0, 0, 0), ("replicate",) * 3))
    tail = exact(Norm("rms", 1e-6, "silu"), Operands(x[:, :, -1:, -8:]), Border(), torch.float64)
    torch.testing.assert_close(y[:, :, -1:, -8:].double(), tail, rtol=2**-8 * 1.01, atol=2e-5)
    y = run(Norm("group", 1e-6, groups=32), Operands(x), Border())
    torch.testing.assert_close(y[:, :, -1:, -8:].float(), x[:, :, -1:, -8:].float(), rtol=0.01, atol=0.01)


def test_a_second_device_state_is_not_needed() -> None:
    """Plans hold no tensors: two streams may run one plan."""
    operands = operands_for((1, 128, 3, 64, 64), torch.bfloat16)
    norm = Norm("group", 1e-6, "silu", groups=32)
    plan = make_plan(norm, operands, Border())
    assert not isinstance(plan, str) and len(plan.steps) == 3
    want = run(norm, operands, Border())
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(run(norm, operands, Border()))
    torch.cuda.synchronize()
    assert all(torch.equal(want, result) for result in results)


class Decoder(nn.Module):
    """Two blocks in the ways of HunyuanVideo and Wan."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1, 1))
        self.first = nn.Conv3d(channels, channels, 3)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pad(F.silu(self.norm(self.second(x))), (1, 1, 1, 1, 2, 0), "replicate"))
        return self.second(F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_pass_fires_by_itself(dtype: torch.dtype) -> None:
    model = Decoder(64).cuda().to(dtype)
    x = torch.randn(1, 64, 3, 32, 48, device="cuda").to(dtype)
    with torch.no_grad():
        exact_result = copy.deepcopy(model).double()(x.double())
        compiled = pvae.compile(copy.deepcopy(model), strict="on", expect={"fuse_norm_act": 2})
        found = agreement(compiled(x), model(x), exact_result)
    assert found.ok, str(found)
    assert pvae.report(compiled).matches("fuse_norm_act") == 2
