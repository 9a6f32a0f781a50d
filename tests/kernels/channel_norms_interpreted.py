"""Property tests of the channel norm kernels under Triton's interpreter; `test_channel_norms.py` runs this file in a
process of its own.

By hand:  TRITON_INTERPRET=1 python -m pytest tests/kernels/channel_norms_interpreted.py
Deeper:   the same with PVAE_TEST_PROFILE=deep
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import triton
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pvae.kernels import channel_norm_config, channel_norm_launch
from pvae.kernels.channel_norm_act import OP as CHANNEL_NORM
from pvae.kernels.channel_norm_launch import refusal, run
from pvae.kernels.channel_norm_layout import MODES, Border, Operands
from pvae.kernels.channel_norm_reference import ACTIVATIONS, Norm, exact
from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.kernels.group_norm_act import OP as GROUP_NORM
from pvae.kernels.norm_reference import TOLERANCES

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"
torch.set_num_threads(1)

DEPTH = {"ci": 1, "deep": 30}[os.environ.get("PVAE_TEST_PROFILE", "ci")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32 = torch.float32


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer positions fill the imagined GPU, and smaller groups are too large for one program: every path is taken."""
    monkeypatch.setattr(channel_norm_config, "FULL", 4)
    monkeypatch.setattr(channel_norm_config, "WHOLE_GROUP", 200)
    monkeypatch.setattr(channel_norm_config, "MOMENT_PROGRAMS", 8)
    monkeypatch.setattr(channel_norm_launch, "COMBINED", 16)
    channel_norm_launch._plan.cache_clear()
    yield
    channel_norm_launch._plan.cache_clear()


def check(norm: Norm, operands: Operands, border: Border) -> None:
    """The kernels took the operands, and the result is within its dtype's tolerance of float64."""
    assert refusal(norm, operands, border) is None
    got = run(norm, operands, border)
    want = exact(norm, operands, border, torch.float64)
    assert got.dtype == operands.x.dtype and is_channels_last(got)
    rtol, atol = TOLERANCES[got.dtype]
    rtol *= 2 if got.dtype == torch.bfloat16 else 1  # the interpreter truncates where a GPU rounds
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=2 * atol, equal_nan=True)


def activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int, how: str = "dense", mean: float = 0.0) -> Tensor:
    """Channels-last in one of the ways graphs have it: dense, a crop, or half of the channels of another. `first`: not so."""
    generator = torch.Generator().manual_seed(seed)
    whole = [2 * n if how == "half" and i == 1 else n + 2 * (how == "crop" and i > 1) for i, n in enumerate(shape)]
    x = (torch.randn(whole, generator=generator) + mean).to(dtype).to(memory_format=FORMATS[len(shape)])
    x = x[tuple(slice(n - m, n) for n, m in zip(whole, shape, strict=True))]
    assert x.shape == shape
    return x.contiguous() if how == "first" else x


@st.composite
def borders(draw: st.DrawFn, sizes: tuple[int, ...]) -> Border:
    if draw(st.booleans()):
        return Border()
    widths: list[int] = []
    modes: list[str] = []
    for size in sizes:
        mode = draw(st.sampled_from(MODES if size > 1 else MODES[:2]))
        widest = min(2, size - 1) if mode == "reflect" else 2
        widths += [draw(st.integers(0, widest)), draw(st.integers(0, widest))]
        modes.append(mode)
    return Border.of(widths, ",".join(modes), len(sizes))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Norm, Operands, Border]:
    kind = draw(st.sampled_from(("rms", "l2", "layer", "group", "group")))
    spatial = draw(st.sampled_from((2, 3)))
    groups = draw(st.sampled_from((1, 2, 4))) if kind == "group" else 1
    channels = groups * draw(st.integers(1, 40) | st.sampled_from((8, 24, 32)))
    if kind in ("rms", "layer"):
        channels = max(channels, 4)  # of one or two channels little is left but eps
    sizes = tuple(draw(st.integers(1, 6)) for _ in range(spatial))
    shape = (draw(st.integers(1, 2)), channels, *sizes)
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))

    def modulation(which: str) -> Tensor | None:
        vector = (draw(st.sampled_from((1, shape[0]))), channels) + (1,) * spatial
        fewer = [draw(st.sampled_from([f for f in (1, 2, 3, 5, 6) if size % f == 0])) for size in sizes[-2:]]
        small = (*shape[:-2], shape[-2] // fewer[0], shape[-1] // fewer[1])
        of = {"like": shape, "vector": vector, "small": small}.get(which)
        return (
            None
            if of is None
            else activation(of, dtype, seed + 7, draw(st.sampled_from(("dense", "crop", "half", "first"))))
        )

    def weights(offset: int) -> Tensor | None:
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.randn(channels, generator=generator).to(dtype) if draw(st.booleans()) else None

    norm = Norm(
        kind, draw(st.sampled_from((1e-6, 1e-3))), draw(st.sampled_from(tuple(ACTIVATIONS))),
        1.0 if kind in ("layer", "group") else draw(st.sampled_from((1.0, 5.5))), groups,
        kind == "group" and spatial == 3 and draw(st.booleans()),
    )  # fmt: skip
    which = st.sampled_from(("", "like", "vector", "small", "small"))
    how = draw(st.sampled_from(("dense", "dense", "crop", "half")))
    x = activation(shape, dtype, seed, how, draw(st.sampled_from((0.0, 3.0))))
    operands = Operands(x, weights(1), weights(2), modulation(draw(which)), modulation(draw(which)))
    return norm, operands, draw(borders(sizes))


@given(case=cases())
@settings(
    max_examples=40 * DEPTH, deadline=None, suppress_health_check=list(HealthCheck), derandomize=DEPTH == 1
)  # fmt: skip
@example(
    case=(
        Norm("l2", 1e-12, "silu", 96**0.5),
        Operands(activation((1, 96, 2, 5, 7), torch.bfloat16, 0), torch.ones(96, dtype=torch.bfloat16)),
        Border(),
    )
)
@example(
    case=(
        Norm("group", 1e-6, "silu", groups=2),
        Operands(
            activation((1, 64, 3, 8, 6), torch.bfloat16, 0), torch.ones(64), torch.ones(64),
            activation((1, 64, 3, 2, 2), torch.bfloat16, 1), activation((1, 64, 3, 1, 6), torch.bfloat16, 2, "crop"),
        ),
        Border.of((2, 0, 1, 1, 1, 1), "replicate,reflect,constant", 3),
    )
)  # fmt: skip
@example(
    case=(
        Norm("group", 1e-6, "silu", groups=32, per_frame=True),
        Operands(activation((2, 64, 3, 5, 7), FP32, 0, mean=3.0)),
        Border.of((2, 0, 1, 1, 1, 1), "replicate", 3),
    )
)
def test_against_float64(case: tuple[Norm, Operands, Border]) -> None:
    check(*case)


def test_a_large_mean_loses_nothing() -> None:
    """fp32: variance 1 around 1000, where a sum of squares has no digit left; in four chunks of positions, read by twos."""
    x = activation((1, 32, 1, 40, 41), FP32, 0, mean=1000.0)
    for groups in (1, 16):
        got = run(Norm("group", 1e-6, groups=groups), Operands(x), Border())
        want = exact(Norm("group", 1e-6, groups=groups), Operands(x), Border(), torch.float64)
        assert (got.double() - want).abs().max() < 1e-3  # half a rounding step of the mean is 3e-5, of x itself too
    check(Norm("layer", 1e-6), Operands(x), Border())


def test_zeros_infinities_and_nans_stay_where_they_are() -> None:
    x = activation((1, 32, 2, 2, 6), FP32, 0)
    x[:, :, 0, 0, 1] = 0.0
    x[:, 3, 0, 0, 2] = float("nan")
    x[:, 3, 0, 0, 4] = float("inf")
    for norm in (Norm("rms", 0.0, "relu"), Norm("l2", 1e-12, "silu"), Norm("layer", 1e-6)):
        got, want = run(norm, Operands(x), Border()), exact(norm, Operands(x), Border(), torch.float64)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_ops_take_the_kernels_path() -> None:
    x, w = activation((1, 32, 3, 4, 5), FP32, 0), torch.randn(32)
    got = CHANNEL_NORM(x, w, None, "rms", 1e-6, 1.0, "silu", [2, 0, 1, 1, 1, 1], "replicate")
    want = exact(Norm("rms", 1e-6, "silu"), Operands(x, w), Border.of((2, 0, 1, 1, 1, 1), "replicate", 3))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got = GROUP_NORM(x, 4, w, w, 1e-6, "silu", per_frame=True)
    want = exact(Norm("group", 1e-6, "silu", groups=4, per_frame=True), Operands(x, w, w), Border())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert channel_norm_launch._plan.cache_info().currsize == 2


def test_what_the_kernels_do_not_read_runs_in_the_reference() -> None:
    x = torch.randn(1, 8, 3, 4, 5)
    norm = Norm("rms", 1e-6, "silu")
    assert "not channels-last" in str(refusal(norm, Operands(x), Border()))
    torch.testing.assert_close(run(norm, Operands(x), Border()), exact(norm, Operands(x), Border()))
