"""depth_to_space: pixel shuffles between channels-last convolutions copy to channels-last; others are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.kernels.compact import OP as compact
from pvae.kernels.conv_taps import OP as taps
from pvae.passes.ir import aten, value
from pvae.testing import agreement, assert_equivalent, assert_rewrites_to, refusals, rewrite

PASS = "depth_to_space"
PASSES = f"canonicalize,{PASS}"
LAST = torch.channels_last_3d
X = torch.randn(2, 4, 3, 4, 5).contiguous(memory_format=LAST)
W12 = torch.randn(16, 4, 1, 1, 1).contiguous(memory_format=LAST)
K = torch.randn(4, 2, 3, 3, 3).contiguous(memory_format=LAST)
conv3d, permute, reshape, linear = (getattr(aten, n).default for n in ("conv3d", "permute", "reshape", "linear"))


def shuffled(y: Tensor, t: int, h: int, w: int) -> Tensor:
    """[N, C*t*h*w, T, H, W] -> [N, C, T*t, H*h, W*w], as Mochi's and LTX's upsamplers have it."""
    n, _, *sizes = y.shape
    y = y.reshape(n, -1, t, h, w, *sizes).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.reshape(n, -1, sizes[0] * t, sizes[1] * h, sizes[2] * w)


def by_steps(y: Tensor, t: int, h: int, w: int) -> Tensor:
    n, _, *sizes = y.shape
    y = y.reshape(n, -1, t, h, w, *sizes).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("shuffle", [shuffled, by_steps])
def test_before_and_expected(shuffle: Callable[..., Tensor]) -> None:
    def before(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
        return F.conv3d(shuffle(F.conv3d(x, w, b), 2, 2, 2), k).sum()

    def expected(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Any:
        rows = permute(reshape(w, [2, 2, 2, 2, 4, 1, 1, 1]), [1, 2, 3, 0, 4, 5, 6, 7])
        rows = reshape(compact(rows, [0, 1, 2, 3, 4, 5, 6, 7]), [16, 4, 1, 1, 1])
        bias = permute(reshape(b, [2, 2, 2, 2]), [1, 2, 3, 0])
        bias = reshape(compact(bias, [0, 1, 2, 3]), [16])
        split = reshape(conv3d(x, rows, bias), [2, 2, 2, 2, 2, 3, 4, 5])
        moved = permute(permute(split, [0, 4, 1, 2, 3, 5, 6, 7]), [0, 1, 5, 2, 6, 3, 7, 4])
        copied = reshape(permute(moved, [0, 2, 3, 4, 5, 6, 7, 1]), [2, 6, 8, 10, 2])
        return (aten.sum.default(conv3d(permute(copied, [0, 4, 1, 2, 3]), k)),)

    assert_rewrites_to(before, expected, X, W12, torch.randn(16), K, passes=PASSES)


def through_linear(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = F.linear(x.permute(0, 2, 3, 4, 1), w, b).permute(0, 4, 1, 2, 3)
    return F.conv3d(shuffled(y, 1, 2, 4), k).sum()


def test_a_linear_has_its_rows_reordered() -> None:
    gm, (_, report) = rewrite(through_linear, X, W12.flatten(1), torch.randn(16), K, passes=PASSES)
    (record,) = report.matches
    assert record.note.startswith("rows of ")
    (conv,) = [n for n in gm.graph.nodes if n.target is conv3d]
    assert value(conv.args[0]).is_contiguous(memory_format=LAST)
    (product,) = [n for n in gm.graph.nodes if n.target is linear]
    assert product.args[1].op == "call_function"


@pytest.mark.parametrize(
    "between",
    [
        lambda y: shuffled(y, 2, 2, 2),  # not straight from a convolution
        lambda y: shuffled(y + 1, 2, 2, 2),
        lambda y: shuffled(y, 2, 2, 2) + y.sum(),  # which others read as well
    ],
)
def test_the_copy_is_laid_out_even_if_no_weight_can_be_reordered(between: Callable[..., Tensor]) -> None:
    wide = torch.randn(2, 16, 3, 4, 5).contiguous(memory_format=LAST)
    gm, (_, report) = rewrite(lambda y, k: F.conv3d(between(y), k).sum(), wide, K, passes=PASSES)
    assert [record.note for record in report.matches] == [""]
    (conv,) = [n for n in gm.graph.nodes if n.target is conv3d]
    assert value(conv.args[0]).stride()[1] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, k: F.conv3d(F.conv3d(x, w)[:, :2].reshape(2, 2, 3, 5, 4), k).sum(),  # merges nothing
        lambda x, w, k: F.conv3d(x.permute(0, 2, 1, 3, 4).reshape(2, 2, 6, 4, 5), k).sum(),  # takes frames apart
        lambda x, w, k: F.conv3d(shuffled(F.conv3d(x, w)[:, :2], 1, 1, 1), k).sum(),
    ],
)
def test_no_shuffle(function: Callable[..., Tensor]) -> None:
    _, (_, report) = rewrite(function, X, W12, K, passes=PASSES)
    assert not report.matches and not report.refusals


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, k: shuffled(F.conv3d(x, w), 2, 2, 2).sum(),  # nothing reads it
        lambda x, w, k: F.conv3d(shuffled(F.conv3d(x, w), 2, 2, 2), k.contiguous()).sum(),
        lambda x, w, k: F.softmax(shuffled(F.conv3d(x, w), 2, 2, 2).permute(0, 2, 1, 3, 4), -1).sum(),
    ],
)
def test_refused_where_nothing_reads_channels_last(function: Callable[..., Tensor]) -> None:
    weight = K.contiguous()
    _, (_, report) = rewrite(function, X, W12, weight, passes=PASSES)
    assert not report.matches and refusals([report]) == ["no norm or convolution reads it channels-last"]


def test_between_our_own_convolutions() -> None:
    def function(x: Tensor, w: Tensor, k: Tensor) -> Tensor:
        return F.conv3d(shuffled(F.conv3d(x, w), 2, 2, 2), k).sum()

    gm, reports = rewrite(function, X, W12, K, passes=f"canonicalize,conv_taps,{PASS}", options={"conv3d": "taps"})
    assert [len(report.matches) for report in reports[1:]] == [2, 1]
    _, last = [n for n in gm.graph.nodes if n.target is taps]
    assert value(last.args[0]).is_contiguous(memory_format=LAST)


@settings(max_examples=25)
@given(st.data())
def test_numbers(data: st.DataObject) -> None:
    """Random factors, sizes, dtypes and layouts, from convolutions and linears with and without bias."""
    draw = data.draw
    small = st.integers(1, 3)
    factors, sizes = draw(st.tuples(small, small, small)), draw(st.tuples(small, small, small))
    n, c_in, c = draw(small), draw(small), draw(small)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    rows = c * factors[0] * factors[1] * factors[2]
    x = normal(n, c_in, *sizes)
    w = normal(rows, c_in, 1, 1, 1).contiguous(memory_format=LAST)
    k = normal(2, c, 1, 1, 1).contiguous(memory_format=LAST)
    b = normal(rows) if draw(st.booleans()) else None
    by_linear, steps = draw(st.booleans()), draw(st.booleans())

    def run(x: Tensor, w: Tensor, k: Tensor, *b: Tensor) -> Tensor:
        bias = b[0] if b else None
        if by_linear:
            y = F.linear(x.permute(0, 2, 3, 4, 1), w.flatten(1), bias).permute(0, 4, 1, 2, 3)
        else:
            y = F.conv3d(x, w, bias)
        return F.conv3d((by_steps if steps else shuffled)(y, *factors), k)

    operands = [x, w, k] if b is None else [x, w, k, b]
    gm, _ = rewrite(run, *operands, passes=PASSES)
    found = agreement(gm(*operands)[0], run(*operands), run(*[t.double() for t in operands]))
    assert found.ok, found


class Upsampler(nn.Module):
    """A block of Mochi's decoder: a norm and a convolution behind a pixel shuffle, and the residual around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, 64, 3, padding=1)
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = shuffled(self.first(x), 2, 2, 2)
        return x + self.conv(F.silu(self.norm(x)))


OPTIONS = {"channels_last": "on", "norm_act": "on"}


def test_a_model_keeps_the_contract() -> None:
    torch.manual_seed(0)
    model = Upsampler().eval().requires_grad_(False)
    for weights in ("live", "frozen"):
        how = {"engine": "inductor", **OPTIONS, "weights": weights}
        assert_equivalent(model, (X[:1],), dtypes=(torch.float32, torch.float64), options=how)
    compiled = pvae.compile(Upsampler().eval().requires_grad_(False), engine="eager", **OPTIONS, expect={PASS: 1})
    compiled(X[:1])
    assert pvae.report(compiled).matches(PASS) == 1


def test_sizes_that_vary() -> None:
    torch.manual_seed(0)
    model = Upsampler().eval().requires_grad_(False)
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager", **OPTIONS})
    for sizes in ((3, 4, 5), (2, 6, 3), (4, 3, 7)):
        x = torch.randn(1, 4, *sizes)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
