"""pvae::channel_norm_act and pvae::group_norm_act: what they mean, what they refuse, and (in a process) their kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvae.kernels.channel_norm_act import OP as CHANNEL_NORM
from pvae.kernels.channel_norm_config import group_config, norm_config, piece
from pvae.kernels.channel_norm_launch import make_plan, refusal, supports
from pvae.kernels.channel_norm_layout import Border, Operands, find_layout
from pvae.kernels.channel_norm_reference import Norm
from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.kernels.group_norm_act import OP as GROUP_NORM

C = 8
VIDEO, PICTURE = torch.randn(2, C, 3, 4, 5, dtype=torch.float64), torch.randn(2, C, 4, 5, dtype=torch.float64)
W, B = torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)


def wide(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("x", [VIDEO, PICTURE], ids=["video", "picture"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((W, None, "l2", 1e-12, C**0.5, "silu"), lambda x: F.silu(F.normalize(x, dim=1) * C**0.5 * wide(W, x))),
        ((None, None, "rms", 1e-8), lambda x: x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-8)),
        (
            (W, B, "rms", 1e-5, 1.0, "relu"),
            lambda x: F.relu(F.rms_norm(x.movedim(1, -1), (C,), W, 1e-5).movedim(-1, 1) + wide(B, x)),
        ),
        (
            (W, B, "layer", 1e-6, 1.0, "gelu"),
            lambda x: F.gelu(F.layer_norm(x.movedim(1, -1), (C,), W, B, 1e-6).movedim(-1, 1)),
        ),
    ],
)
def test_channel_norms_mean_what_models_write(
    x: Tensor, arguments: tuple[object, ...], expected: Callable[[Tensor], Tensor]
) -> None:
    y = CHANNEL_NORM(x, *arguments)
    assert is_channels_last(y) and y.dtype == x.dtype
    torch.testing.assert_close(y, expected(x), rtol=1e-12, atol=1e-12)


def test_group_norm_of_samples_and_of_frames() -> None:
    want = F.silu(F.group_norm(VIDEO, 4, W, B, 1e-6))
    torch.testing.assert_close(GROUP_NORM(VIDEO, 4, W, B, 1e-6, "silu"), want, rtol=1e-12, atol=1e-12)
    frames = F.group_norm(VIDEO.transpose(1, 2).flatten(0, 1), 4, W, B, 1e-6).unflatten(0, (2, 3)).transpose(1, 2)
    torch.testing.assert_close(GROUP_NORM(VIDEO, 4, W, B, 1e-6, per_frame=True), frames, rtol=1e-12, atol=1e-12)


def test_scale_and_shift() -> None:
    scale, shift = torch.randn_like(VIDEO), torch.randn(2, C, 1, 1, 1, dtype=torch.float64)
    want = F.silu(F.group_norm(VIDEO, 2, W, B) * scale + shift)
    got = GROUP_NORM(VIDEO, 2, W, B, 1e-5, "silu", scale=scale, shift=shift)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", [(1, 5), (2, 1), (4, 5)])
def test_scale_and_shift_of_fewer_rows_and_columns_are_enlarged_as_by_interpolate(factors: tuple[int, int]) -> None:
    rows, columns = factors
    for x in (VIDEO, PICTURE):
        small = (*x.shape[:-2], 4 // rows, 5 // columns)
        scale, shift = torch.randn(small, dtype=x.dtype), torch.randn(small, dtype=x.dtype)
        large = [F.interpolate(s, size=x.shape[2:]) for s in (scale, shift)]
        got = GROUP_NORM(x, 2, W, B, 1e-5, "silu", scale=scale, shift=shift)
        torch.testing.assert_close(got, F.silu(F.group_norm(x, 2, W, B) * large[0] + large[1]), rtol=1e-12, atol=1e-12)
        got = CHANNEL_NORM(x, None, None, "rms", 1e-6, scale=scale, shift=x)
        want = x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-6) * large[0] + x
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
def test_borders_are_those_of_pad(mode: str) -> None:
    inner = CHANNEL_NORM(VIDEO, W, None, "rms", 1e-6)
    got = CHANNEL_NORM(VIDEO, W, None, "rms", 1e-6, padding=[2, 0, 1, 2, 3, 1], mode=mode)
    assert torch.equal(got, F.pad(inner, (3, 1, 1, 2, 2, 0), mode=mode)) and is_channels_last(got)
    inner = CHANNEL_NORM(PICTURE, W, None, "rms", 1e-6)
    got = CHANNEL_NORM(PICTURE, W, None, "rms", 1e-6, padding=[1, 2, 3, 1], mode=mode)
    assert torch.equal(got, F.pad(inner, (3, 1, 1, 2), mode=mode))


def test_each_dimension_may_have_a_mode_of_its_own() -> None:
    """LTX-2: the first frame repeated in front, pictures reflected."""
    inner = CHANNEL_NORM(VIDEO, None, None, "rms", 1e-6)
    got = CHANNEL_NORM(VIDEO, None, None, "rms", 1e-6, padding=[2, 0, 1, 1, 1, 1], mode="replicate,reflect,reflect")
    joined = torch.cat([inner[:, :, :1].repeat(1, 1, 2, 1, 1), inner], 2)
    assert torch.equal(got, F.pad(joined, (1, 1, 1, 1, 0, 0), mode="reflect"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: CHANNEL_NORM(x, None, None, "batch", 1e-6), "there is no norm 'batch'"),
        (lambda x: CHANNEL_NORM(x, None, None, "rms", 1e-6, 1.0, "elu"), "there is no activation 'elu'"),
        (lambda x: CHANNEL_NORM(x[0, 0], None, None, "rms", 1e-6), "neither"),
        (lambda x: CHANNEL_NORM(x, W[:2], None, "rms", 1e-6), r"weight \[2\] is not \[C\]"),
        (lambda x: CHANNEL_NORM(x, None, None, "rms", 1e-6, padding=[1, 1]), "padding"),
        (lambda x: CHANNEL_NORM(x, None, None, "rms", 1e-6, padding=[-1, 1, 0, 0, 0, 0]), "0 or more"),
        (lambda x: CHANNEL_NORM(x, None, None, "rms", 1e-6, mode="circular"), "mode 'circular'"),
        (
            lambda x: CHANNEL_NORM(x, None, None, "rms", 1e-6, padding=[3, 0, 0, 0, 0, 0], mode="reflect"),
            "too wide",
        ),
        (lambda x: GROUP_NORM(x, 3, None, None, 1e-6), "8 channels do not divide into 3 groups"),
        (lambda x: GROUP_NORM(x[:, :, 0], 2, None, None, 1e-6, per_frame=True), "per_frame"),
        (lambda x: GROUP_NORM(x, 2, None, None, 1e-6, scale=x[:, :, :1]), "scale"),
        (lambda x: GROUP_NORM(x, 2, None, None, 1e-6, shift=x[..., :3]), "shift .* whole number of times fewer"),
        (lambda x: GROUP_NORM(x, 2, None, None, 1e-6, shift=x[..., :0]), "shift .* whole number of times fewer"),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(VIDEO)


@pytest.mark.parametrize("dims", [4, 5])
def test_the_fake_has_the_shape_and_strides_of_the_result(dims: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(1, 8, *[1, 4, 5][5 - dims :])
    for padding in (None, [1, 0] * (dims - 2)):
        real = GROUP_NORM(x, 2, None, None, 1e-6, "silu", padding, "replicate")
        with FakeTensorMode() as mode:
            fake = GROUP_NORM(mode.from_tensor(x), 2, None, None, 1e-6, "silu", padding, "replicate")
        assert fake.shape == real.shape and fake.stride() == real.stride()


def test_opcheck() -> None:
    x = torch.randn(1, 8, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    torch.library.opcheck(CHANNEL_NORM, (x, None, None, "rms", 1e-6, 1.0, "silu", [1, 0, 0, 0, 0, 0], "replicate"))
    torch.library.opcheck(GROUP_NORM, (x, 2, None, None, 1e-6))


def test_half_precision_is_rounded_once() -> None:
    x, w = VIDEO.to(torch.bfloat16), W.to(torch.bfloat16)
    want = F.silu(F.group_norm(x.float(), 4, w.float(), None, 1e-6)).to(torch.bfloat16)
    torch.testing.assert_close(GROUP_NORM(x, 4, w, None, 1e-6, "silu"), want, rtol=0, atol=0)


# What the kernels take ------------------------------------------------------------------------------------------------


def like(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=FORMATS[len(shape)])


def test_what_the_kernels_refuse() -> None:
    rms, x = Norm("rms", 1e-6), like((1, 96, 4, 48, 64))
    assert supports(rms, Operands(x), Border()) is None
    assert refusal(rms, Operands(torch.empty(1, 8, 2, 2)), Border()) == "Triton does not run on cpu"
    assert supports(rms, Operands(torch.empty(1, 8, 4, 4, device="meta")), Border()) == (
        "x is not channels-last: its channels have stride 16"
    )
    assert supports(rms, Operands(like((1, 96, 4, 4), torch.float64)), Border()) == "x is torch.float64"
    strided = torch.empty(192, dtype=torch.bfloat16, device="meta")[::2]
    assert supports(rms, Operands(x, strided), Border()) == "weight has stride 2"
    assert "channels, the kernel takes up to" in str(supports(rms, Operands(like((1, 9000, 2, 2))), Border()))
    shift = torch.empty(1, 96, 4, 48, 64, dtype=torch.bfloat16, device="meta")
    assert supports(rms, Operands(x, shift=shift), Border()) is None, "it is laid out so"


def test_positions_merge_where_nothing_tells_them_apart() -> None:
    x = like((2, 96, 4, 48, 64))
    line = 4 * 48 * 64
    assert find_layout(Operands(x), Border(), False, False).sizes == (1, 1, 1, 2 * line)
    assert find_layout(Operands(x), Border(), False, True).sizes == (2, 1, 1, line)
    assert find_layout(Operands(x), Border(), True, True).sizes == (2, 4, 1, 48 * 64)
    frames = find_layout(Operands(x), Border.of((2, 0, 0, 0, 0, 0), "replicate", 3), False, False)
    assert frames.sizes == (2, 4, 1, 48 * 64) and frames.flat
    around = find_layout(Operands(x), Border.of((0, 0, 0, 0, 1, 1), "replicate", 3), False, False)
    assert around.sizes == (2, 4, 48, 64) and not around.flat
    crop = find_layout(Operands(x[..., 1:-1]), Border(), False, False)
    assert crop.sizes == (2, 4, 48, 62) and not crop.flat


def test_rows_and_columns_stay_apart_where_a_scale_has_fewer() -> None:
    x = like((2, 96, 4, 48, 64))
    layout = find_layout(Operands(x, scale=like((2, 96, 4, 6, 16)), shift=x), Border(), False, False)
    assert layout.sizes == (2, 4, 48, 64) and not layout.flat
    assert layout.factors == {"x": (1, 1), "scale": (8, 4), "shift": (1, 1)}
    assert layout.strides["scale"] == (4 * 6 * 16 * 96, 6 * 16 * 96, 16 * 96, 96)


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("channels", [1, 3, 48, 96, 128, 160, 384, 1000, 1024, 8192])
def test_configurations(channels: int, lanes: int) -> None:
    for positions in (1, 6240, 1_600_000):
        for config in (norm_config(channels, positions, 4, lanes), group_config(positions, min(channels, 1024), lanes)):
            for size in (config.block, config.rows, config.warps, config.tiles):
                assert size > 0 and size & (size - 1) == 0
            assert config.warps * lanes <= 1024
    assert piece(96, 256) == 32 and piece(384, 256) == 128 and piece(48, 256) == 64


def test_a_small_group_norm_is_two_launches_and_a_large_one_three() -> None:
    norm = Norm("group", 1e-6, groups=32)
    for size, launches in ((16, 2), (512, 3)):
        plan = make_plan(norm, Operands(like((1, 512, size, size))), Border())
        assert not isinstance(plan, str) and len(plan.steps) == launches


def test_under_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, and other tests have imported it: hence a process."""
    here = Path(__file__).with_name("channel_norms_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(here), "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
