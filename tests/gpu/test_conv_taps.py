"""`conv_taps` on a GPU: against float64 beside the library's own convolution, the same bits at every launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps import Config, candidate_configs, conv_taps, refusal
from pvae.testing import agreement
from tests.kernels.conv_taps_cases import FLOATS, LAYOUTS, Case, Operands

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

BF16 = torch.bfloat16
VIDEO = Case((1, 96, 3, 37, 53), 96, (3, 3, 3), padding=(0, 0, 1, 1, 1, 1), before=2, residual=True, dtype=BF16)
USES = {
    "plain": Case((2, 96, 3, 37, 53), 96, (3, 3, 3)),
    "causal": replace(VIDEO, activation="silu"),
    "first chunk": replace(VIDEO, x=(1, 96, 1, 37, 53), before=None, padding=(2, 0, 1, 1, 1, 1)),
    "second chunk": replace(VIDEO, x=(1, 96, 1, 37, 53), before=1, padding=(1, 0, 1, 1, 1, 1)),
    "picture": Case((2, 96, 61, 45), 96, (3, 3), residual=True, activation="relu"),
    "pointwise": Case((1, 96, 2, 19, 23), 96, (1, 1, 1)),
    "time": Case((1, 96, 4, 19, 23), 96, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0, 0, 0, 0)),
    "down": Case((1, 96, 2, 38, 54), 96, (1, 3, 3), stride=(1, 2, 2), padding=(0, 0, 0, 1, 0, 1)),
    "dilated": Case((1, 96, 5, 21, 40), 96, (3, 3, 3), padding=(2, 2, 2, 2, 3, 3), dilation=(2, 2, 3)),
    "up": Case((2, 96, 3, 19, 23), 96, (1, 2, 2), upsample=True, activation="silu"),
    "up causal": Case((1, 96, 2, 19, 23), 96, (3, 2, 2), before=2, upsample=True, residual=True),
    "high": Case((1, 96, 30, 31), 96, (7, 5)),
    "no bias": Case((1, 96, 2, 9, 150), 96, (3, 3, 3), bias=False),
    "one row": Case((1, 96, 2, 1, 150), 96, (3, 3, 3)),
}
WIDTHS = [(96, 96), (192, 192), (384, 384), (384, 192), (96, 3), (16, 384), (3, 96), (100, 50)]

PORTABLE = Config(8, 16, 64, 32, 32, 4, 2)  # of the kernel for any GPU, on Hopper too


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """As torch's convolutions do by themselves."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


TF32 = 1.5 * 2.0**-12  # relative, where both operands are rounded to it


def check(case: Case, config: Config | None = None) -> Operands:
    """The kernel runs, lays its result out, and errs no more than cuDNN or MIOpen do."""
    operands = case.make("cuda")
    assert refusal(operands.x, operands.weight) is None
    y = operands.run(config.numbers() if config else [])
    assert y.dtype == case.dtype and y.is_contiguous(memory_format=FORMATS[y.dim()])
    found = agreement(y, operands.reference(case.dtype), operands.reference(torch.float64))
    # cuDNN computes some convolutions of fp32 in fp32 although it may round to tf32.
    rounded = case.dtype == torch.float32 and found.error <= TF32
    assert found.ok or rounded, f"{case} {config}: {found}"
    return operands


@pytest.mark.parametrize("config", [None, PORTABLE], ids=["own", "portable"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("use", USES)
def test_every_use(use: str, dtype: torch.dtype, config: Config | None) -> None:
    check(replace(USES[use], dtype=dtype), config)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("channels", "out"), WIDTHS)
def test_every_width(channels: int, out: int, dtype: torch.dtype) -> None:
    for use in ("causal", "picture", "down", "up"):
        case = USES[use]
        check(replace(case, x=(case.x[0], channels, *case.x[2:]), out=out, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [96, 20, 3])
def test_wherever_it_lies_in_memory(channels: int, layout: str) -> None:
    """Around x is NaN: what is read there would show."""
    for before in (0, 1, 2, 3):
        padding = (max(0, 2 - before), 0, 1, 1, 1, 1)
        check(replace(VIDEO, x=(1, channels, *VIDEO.x[2:]), before=before, padding=padding, layout=layout))
    if layout in LAYOUTS[:4]:
        check(replace(USES["plain"], x=(2, channels, 3, 37, 53), layout=layout, dtype=BF16))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (7, 8), (8, 16), (9, 17), (64, 64), (65, 129)])
def test_sizes_that_no_tile_divides(size: tuple[int, int]) -> None:
    for frames in (1, 2, 5):
        check(replace(VIDEO, x=(1, 96, frames, *size)))
    check(replace(USES["up"], x=(1, 96, 2, *size), dtype=BF16))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [96, 192])
@pytest.mark.parametrize("use", USES)
def test_the_same_bits_at_every_launch(use: str, channels: int, dtype: torch.dtype) -> None:
    """With loads in flight a race shows as bits that change; other work beside it moves the programs about."""
    case = USES[use]
    operands = replace(case, x=(case.x[0], channels, *case.x[2:]), out=channels, dtype=dtype).make("cuda")
    first = operands.run()
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=BF16)
    for launch in range(20):
        if launch % 2:
            with torch.cuda.stream(other):
                noise @ noise
        assert torch.equal(operands.run(), first), f"launch {launch + 2} differs from the first"
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [96, 192])
def test_every_candidate(channels: int, dtype: torch.dtype) -> None:
    case = replace(VIDEO, x=(1, channels, 2, 37, 53), out=channels, dtype=dtype)
    candidates = list(candidate_configs(channels, channels, 37, 53, dtype))
    assert len(candidates) > 8
    for config in candidates:
        operands = check(case, config)
        first = operands.run(config.numbers())
        assert all(torch.equal(operands.run(config.numbers()), first) for _ in range(4)), config


def test_on_another_stream() -> None:
    """The kernel waits for what that stream made, and what follows waits for it."""
    operands = VIDEO.make("cuda")
    expected, stream = operands.run(), torch.cuda.Stream()
    source = operands.x.clone(memory_format=torch.channels_last_3d)
    large = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        operands.x.zero_()
        for _ in range(8):
            large @ large
        operands.x.copy_(source)
        y = operands.run()
        operands.x.zero_()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_in_a_cuda_graph() -> None:
    operands = VIDEO.make("cuda")
    operands.run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = operands.run()
    other = VIDEO.make("cuda", seed=1)
    operands.x.copy_(other.x)
    graph.replay()
    assert torch.equal(y, operands.run())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_the_current_one() -> None:
    here, there = VIDEO.make("cuda:0"), VIDEO.make("cuda:1")
    with torch.cuda.device(0):
        y = there.run()
    assert y.device.index == 1 and torch.equal(y.to("cuda:0"), here.run())


@pytest.mark.parametrize("config", [None, PORTABLE], ids=["own", "portable"])
def test_a_batch_of_more_than_two_to_the_31_elements(config: Config | None) -> None:
    """The last sample's offset does not fit in 32 bits, though its stride does."""
    x = torch.zeros(3, 16, 1, 8192, 8256, device="cuda", dtype=BF16).to(memory_format=torch.channels_last_3d)
    assert x.stride(0) < 2**31 < 2 * x.stride(0)
    x[2].normal_()
    weight = torch.randn(16, 16, 1, 3, 3, device="cuda", dtype=BF16)
    rest = (None, weight, None, None, [1] * 3, [0, 0, 1, 1, 1, 1], [1] * 3, False, "none")
    numbers = config.numbers() if config else []
    y, last = conv_taps(x, *rest, numbers), conv_taps(x[2:].clone(), *rest, numbers)
    assert torch.equal(y[2:], last) and last.abs().sum() > 0 and not y[:2].any()
