"""join_chunks: a convolution on consecutive windows is one; what overlaps otherwise, or differs, stays in pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pvae
from pvae.passes import join_chunks
from pvae.testing import agreement, assert_equivalent, assert_rewrites_to, refusals, rewrite

PASSES = "canonicalize,join_chunks"
X, W, B = torch.randn(1, 4, 9, 9, 5), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
conv3d, cut = torch.ops.aten.conv3d.default, torch.ops.aten.slice.Tensor


def in_chunks(x: Tensor, w: Tensor, b: Tensor | None, count: int, dim: int = 2, **how: Any) -> Tensor:
    """diffusers' CogVideoXSafeConv3d: pieces of `torch.chunk`, each with the frames before it that the kernel reads."""
    overlap = w.shape[dim] - 1
    parts = list(x.chunk(count, dim))
    if overlap:
        before = [p.narrow(dim, p.shape[dim] - overlap, overlap) for p in parts[:-1]]
        parts = [parts[0]] + [torch.cat([a, p], dim) for a, p in zip(before, parts[1:], strict=True)]
    return torch.cat([F.conv3d(p, w, b, **how) for p in parts], dim)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dim", [2, 3])
def test_before_and_expected(count: int, dim: int) -> None:
    assert_rewrites_to(
        lambda x, w, b: in_chunks(x, w, b, count, dim), lambda x, w, b: (conv3d(x, w, b),), X, W, B, passes=PASSES
    )


def test_windows_inside() -> None:
    """Windows that begin behind the first row, with a stride: the whole reads a slice."""

    def before(x: Tensor, w: Tensor) -> Tensor:
        parts = [F.conv3d(x[:, :, 1:6], w, stride=(2, 1, 1)), F.conv3d(x[:, :, 5:8], w, stride=(2, 1, 1))]
        return torch.cat(parts, 2)

    def expected(x: Tensor, w: Tensor) -> Any:
        return (conv3d(cut(x, 2, 1, 8), w, None, [2, 1, 1]),)

    assert_rewrites_to(before, expected, X, W, passes=PASSES)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: torch.cat([F.conv3d(x[:, :, :5], w, b), F.conv3d(x[:, :, 3:] + 1, w, b)], 2),  # other tensors
        lambda x, w, b: torch.cat([F.conv3d(x[:, :, :5], w, b), F.conv3d(x[:, :, 3:], 2 * w, b)], 2),
        lambda x, w, b: torch.cat([F.conv3d(x[:, :, :5], w, b), F.conv3d(x[:, :, 3:], w)], 2),
        lambda x, w, b: torch.cat([F.conv3d(x[:, :, :5], w, b), F.conv3d(x[:, :, :5], w, b)], 1),  # of channels
        lambda x, w, b: torch.cat([F.conv3d(x[:1], w, b), F.conv3d(x[:1], w, b)], 0),
        lambda x, w, b: (lambda y: torch.cat([y, y], 2))(F.conv3d(x, w, b)),
        lambda x, w, b: (lambda y: torch.cat([y, F.conv3d(x[:, :, 3:], w, b)], 2) * y.sum())(
            F.conv3d(x[:, :, :5], w, b)
        ),
        lambda x, w, b: torch.cat([F.conv3d(torch.cat([x[:, :, :3], x[:, :, 4:6]], 2), w, b)] * 1, 2),
        lambda x, w, b: torch.cat(
            [F.conv3d(torch.cat([x[:, :, :3], x[:, :, 4:6]], 2), w, b), F.conv3d(x[:, :, 4:], w, b)], 2
        ),
    ],
)
def test_not_one_convolution(change: Any) -> None:
    _, reports = rewrite(change, X, W, B, passes=PASSES)
    assert not reports[1].matches and not refusals(reports[1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: torch.cat([F.conv3d(p, w, padding=1) for p in x.chunk(3, 2)], 2), "padded where it was cut"),
        (
            lambda x, w: torch.cat([F.conv3d(x[:, :, :5], w), F.conv3d(x[:, :, 4:], w)], 2),
            "begins at 4, the one before it ends at 3",
        ),
        (
            lambda x, w: torch.cat([F.conv3d(x[:, :, 3:], w), F.conv3d(x[:, :, :5], w)], 2),
            "begins at 0, the one before it ends at 7",
        ),
    ],
)
def test_refusals(change: Any, reason: str) -> None:
    _, reports = rewrite(change, X, W, passes=PASSES)
    (found,) = refusals(reports[1:])
    assert reason in found


@pytest.mark.parametrize("room", [0, 1])
def test_what_32_bits_do_not_index_stays_in_pieces(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(join_chunks, "INDEXABLE", X.numel() + room)  # x is larger than the result
    _, reports = rewrite(lambda x, w, b: in_chunks(x, w, b, 2), X, W, B, passes=PASSES)
    assert len(reports[1].matches) == room
    assert ["2**31 or more" in reason for reason in refusals(reports[1:])] == [True] * (1 - room)


@settings(max_examples=25)
@given(st.data())
def test_numbers(data: st.DataObject) -> None:
    """Random kernels, strides in the other dimensions, dtypes, layouts and counts of pieces; float64 to 1e-12."""
    draw = data.draw
    kernel = draw(st.tuples(*[st.integers(1, 3)] * 3))
    sizes = [k + draw(st.integers(2, 6)) for k in kernel]
    dim, count = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 2)), 2, *sizes, dtype=torch.float64, generator=generator).to(dtype)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(3, 2, *kernel, dtype=torch.float64, generator=generator).to(dtype)
    if any(part.shape[dim] < kernel[dim - 2] for part in x.chunk(count, dim)):
        return  # a piece without a result of its own
    how = {"stride": [1 if d == dim else draw(st.integers(1, 2)) for d in (2, 3, 4)]}
    gm, reports = rewrite(lambda x, w: in_chunks(x, w, None, count, dim, **how), x, w, passes=PASSES)
    pieces = math.ceil(x.shape[dim] / math.ceil(x.shape[dim] / count))
    assert len(reports[1].matches) == (pieces > 1)
    ours, eager = gm(x, w)[0], in_chunks(x, w, None, count, dim, **how)
    found = agreement(ours, eager, F.conv3d(x.double(), w.double(), **how))
    assert found.ok, found


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")
        return F.silu(in_chunks(x, self.conv.weight, self.conv.bias, 2))


def test_a_model_keeps_the_contract() -> None:
    torch.manual_seed(0)
    model = Chunked().eval().requires_grad_(False)
    for engine in ("eager", "inductor"):
        assert_equivalent(model, (X,), dtypes=(torch.float32, torch.float64), options={"engine": engine})
    compiled = pvae.compile(Chunked().eval().requires_grad_(False), engine="eager", expect={"join_chunks": 1})
    compiled(X)
    assert pvae.report(compiled).matches("join_chunks") == 1


def test_sizes_that_vary() -> None:
    """Frames cut at a fixed place, rows and columns of any size."""
    torch.manual_seed(0)
    model = Chunked().eval().requires_grad_(False)
    compiled = torch.compile(model, backend="pvae", dynamic=True, options={"engine": "eager"})
    for height, width in ((6, 5), (9, 7), (12, 4)):
        x = torch.randn(1, 4, 9, height, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
