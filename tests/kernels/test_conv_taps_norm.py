"""pvae::conv_taps_norm on the CPU, where it is its two ops: results, fakes, errors, and what the kernel is said to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvae.kernels import conv_taps_launch as launch
from pvae.kernels.channel_norm_act import channel_norm_act
from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps_norm import OP
from tests.kernels.conv_taps_cases import Case
from tests.kernels.conv_taps_norm_cases import NormCase

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
VIDEO = NormCase(Case((2, 6, 3, 5, 7), 4, (3, 3, 3), padding=(0, 0, 1, 1, 1, 1), before=2, residual=True), tail=2)
PICTURE = NormCase(Case((2, 6, 5, 7), 4, (3, 3)), norm="rms", activation="relu", vectors=(True, True))
ENLARGED = NormCase(Case((1, 6, 3, 5, 7), 4, (1, 2, 2), upsample=True), tail=3, vectors=(False, False))
USES = {
    "video": VIDEO,
    "kept": replace(VIDEO, keep=True, tail=1, activation="none"),
    "picture": PICTURE,
    "kept picture": replace(PICTURE, keep=True, activation="gelu", norm="layer"),
    "enlarged": ENLARGED,
    "no tail": replace(ENLARGED, tail=0, keep=True),
}


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("use", USES)
def test_is_its_two_ops(use: str, dtype: torch.dtype) -> None:
    case = replace(USES[use], conv=replace(USES[use].conv, dtype=dtype))
    given = case.make()
    y, z, tail = given.run()
    expected = given.plain()
    norm = (given.weight, given.bias, case.norm, case.eps, case.factor, case.activation)
    assert torch.equal(z, channel_norm_act(expected, *norm)) and z.is_contiguous(memory_format=FORMATS[z.dim()])
    assert torch.equal(y, expected) if case.keep else y.shape == (0,)
    if case.tail:
        assert torch.equal(tail, z[:, :, -case.tail :])
        assert tail.is_contiguous(memory_format=torch.channels_last_3d)
        assert tail.data_ptr() != z.data_ptr()
    else:
        assert tail.shape == (0,)


@pytest.mark.parametrize("use", USES)
def test_the_fake_is_like_the_result(use: str) -> None:
    given = USES[use].make()
    real = given.run()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {k: mode.from_tensor(v) for k, v in vars(given).items() if isinstance(v, Tensor)}
        conv = {k: mode.from_tensor(v) for k, v in vars(given.conv).items() if isinstance(v, Tensor)}
        fake = replace(given, conv=replace(given.conv, **conv), **tensors).run()
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_opcheck() -> None:
    given = replace(VIDEO, keep=True).make()
    (*args, _), case = given.conv.args(), given.case
    norm = (given.weight, given.bias, case.norm, case.eps, case.factor, case.activation, True, 2)
    torch.library.opcheck(OP, (*args, [], *norm), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tail": 4}, "the last 4 frames of a result"),
        ({"tail": -1}, "the last -1 frames"),
        ({"norm": "batch"}, "no norm 'batch'"),
        ({"activation": "tanh"}, "no activation 'tanh'"),
    ],
)
def test_what_means_nothing_is_an_error(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(VIDEO, **changes).make().run()


def test_frames_of_a_picture_and_weights_of_other_channels_are_errors() -> None:
    with pytest.raises(ValueError, match="the last 1 frames"):
        replace(PICTURE, tail=1).make().run()
    with pytest.raises(ValueError, match=r"weight \[3\] is not \[C\]"):
        replace(PICTURE.make(), weight=torch.ones(3)).run()


# --- what the kernel takes -------------------------------------------------------------------------------------------

TAKEN = NormCase(Case((1, 96, 4, 37, 53), 96, (3, 3, 3), dtype=BF16))
SMALL = [4, 64, 64, 0, 32, 9, 4]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "stride": ({"stride": (1, 2, 2)}, {}, "stride in height"),
    "channels in": ({"x": (1, 12, 4, 37, 53)}, {}, "12 channels of torch.bfloat16 are no multiple"),
    "channels out": ({"out": 384}, {}, "a program does not hold all 384 channels"),
    "few channels out": ({"out": 24}, {}, "a program does not hold all 24 channels"),
    "float32": ({"dtype": FP32}, {}, "x is torch.float32"),
    "layer norm": ({}, {"norm": "layer"}, "layer norm with silu is not in this kernel"),
    "gelu": ({}, {"activation": "gelu"}, "l2 norm with gelu is not in this kernel"),
}


def why_not(case: NormCase, config: list[int] | None = None) -> str | None:
    conv = case.conv
    x, weight = (torch.empty(shape, dtype=conv.dtype, device="meta") for shape in (conv.x, conv.weight_shape))
    memory = [launch.Memory(t.shape, t.stride(), t.dtype, t.device) for t in (x, weight)]
    stride, padding, dilation, upsample, activation = conv.rest
    call = launch.Call(
        memory[0], None, memory[1], None, None, tuple(stride), tuple(padding), tuple(dilation), upsample, activation,
        tuple(config or ()), True, False, case.call(),
    )  # fmt: skip
    reason = launch.why_no_norm(call, conv.out_shape())
    plan = launch.make_norm_plan(call, conv.out_shape())
    assert plan == reason if isinstance(plan, str) else reason is None
    return reason


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, "_processors", lambda device: 132)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("use", REFUSED)
def test_what_the_kernel_does_not_take(use: str) -> None:
    conv, norm, says = REFUSED[use]
    reason = why_not(replace(TAKEN, conv=replace(TAKEN.conv, **conv), **norm))
    assert reason is not None and says in reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("out", [16, 32, 64, 96, 128, 192])
def test_what_the_kernel_takes(out: int) -> None:
    assert why_not(replace(TAKEN, conv=replace(TAKEN.conv, out=out), keep=True, tail=2)) is None
    assert why_not(replace(TAKEN, conv=replace(TAKEN.conv, out=out, kernel=(1, 2, 2), upsample=True))) is None


@pytest.mark.usefixtures("hopper")
def test_a_config_that_holds_part_of_the_channels() -> None:
    assert why_not(TAKEN, SMALL) == "a program does not hold all 96 channels"
    assert why_not(replace(TAKEN, conv=replace(TAKEN.conv, out=64)), SMALL) is None
    assert "was asked for" in str(why_not(TAKEN, [8, 16, 64, 32, 32, 4, 2]))


def test_it_is_for_hopper() -> None:
    assert why_not(TAKEN) == "meta is no Hopper GPU"
