"""conv_problem: one convolution as text and back, with the pads and the causal cache in front of it taken in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pvae.passes.conv_problem import ConvProblem
from pvae.passes.ir import ConvNode, value
from pvae.testing import capture

X, CACHE, W = torch.randn(1, 4, 5, 8, 6), torch.randn(1, 4, 2, 8, 6), torch.randn(6, 4, 3, 3, 3)


def problem_of(function: Any, *args: Tensor) -> tuple[ConvProblem | None, ConvNode]:
    (conv,) = [c for c in map(ConvNode.of, capture(function, *args).gm.graph.nodes) if c is not None]
    return ConvProblem.of(conv), conv


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    ndim, size = draw(st.integers(2, 3)), st.integers(1, 9)
    sizes = st.tuples(*[size] * ndim)
    pads = st.tuples(*[st.tuples(st.integers(0, 12), st.integers(0, 12))] * ndim)
    name = draw(st.sampled_from(["bfloat16", "float16", "tf32", "float32", "float64"]))
    return ConvProblem(
        name, *(draw(s) for s in (size, size, sizes, size, sizes, sizes, pads, sizes, size)), draw(st.integers(0, 3))
    )


@given(problems())
def test_property_text_and_back(problem: ConvProblem) -> None:
    assert ConvProblem.parse(str(problem)) == problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bfloat16 1x96x4x480x832 > 96",
        "bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 padding 1.1",
        "bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 colour 3",
        "bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 before 0",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no convolution, such as 'bfloat16 1x96x4"):
        ConvProblem.parse(text)


def test_what_stands_in_front_is_taken_in() -> None:
    found, conv = problem_of(
        lambda x, c, w: F.conv3d(F.pad(torch.cat([c, x], 2), (1, 0, 0, 1, 1, 0)), w, padding=(0, 1, 0)), X, CACHE, W
    )
    assert str(found) == "float32 1x4x5x8x6 > 6 kernel 3x3x3 padding 1.0x1.2x1.0 before 2"
    assert found is not None and found.out_sizes == tuple(value(conv.node).shape[2:])
    assert found.rows * found.out_channels == value(conv.node).numel() and found.flops == conv.flops


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, c, w: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), w), "1x4x7x10x8 > 6 kernel 3x3x3"),
        (lambda x, c, w: F.conv3d(F.pad(x, (1,) * 6, value=1.0), w), "1x4x7x10x8 > 6 kernel 3x3x3"),
        (lambda x, c, w: F.conv3d(F.pad(x, (-1, 1)), w), "1x4x5x8x6 > 6 kernel 3x3x3"),
        (lambda x, c, w: F.conv3d(torch.cat([c, x, c], 2), w), "1x4x9x8x6 > 6 kernel 3x3x3"),
        (lambda x, c, w: F.conv3d(torch.cat([x, x], 3), w), "1x4x5x16x6 > 6 kernel 3x3x3"),
        (lambda x, c, w: F.conv2d(x[:, :, 0], w[:, :2, 0], stride=2, groups=2, dilation=(1, 2)),
         "1x4x8x6 > 6 kernel 3x3 stride 2x2 dilation 1x2 groups 2"),
    ],
)  # fmt: skip
def test_other_neighbours_stay_outside(function: Any, text: str) -> None:
    found, conv = problem_of(function, X, CACHE, W)
    assert str(found) == f"float32 {text}"
    assert found is not None and found.flops == conv.flops


def test_sizes_must_be_known() -> None:
    assert problem_of(lambda x, w: F.conv3d(x, w), X[0], W)[0] is None, "no batch dimension"
