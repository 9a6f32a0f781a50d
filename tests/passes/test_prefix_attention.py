"""prefix_attention: both spellings of a frame-causal mask, what is no such mask, and the numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pvae
from pvae.testing import agreement, refusals, rewrite
from pvae.tools.zoo import load

PASSES = "canonicalize,prefix_attention"


def compared(frames: int, each: int, dtype: torch.dtype) -> Tensor:
    indices = torch.arange(1, frames + 1, dtype=torch.int32).repeat_interleave(each)
    x, y = torch.meshgrid(indices, indices, indexing="xy")
    return torch.where(x <= y, 0, -float("inf")).to(dtype)


def written(frames: int, each: int, dtype: torch.dtype) -> Tensor:
    mask = torch.full((frames * each, frames * each), float("-inf"), dtype=dtype)
    for i in range(frames * each):
        mask[i, : (i // each + 1) * each] = 0
    return mask


def attention(mask: Callable[..., Tensor], frames: int, each: int, **kwargs: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask(frames, each, q.dtype)[None], **kwargs)


@pytest.mark.parametrize("mask", [compared, written])
@given(
    frames=st.integers(1, 4),
    each=st.integers(1, 5),
    heads=st.integers(1, 3),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_blocks_equal_the_mask(
    mask: Callable[..., Tensor], frames: int, each: int, heads: int, scale: float | None, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, heads, frames * each, 8, dtype=dtype) for _ in range(3))
    function = attention(mask, frames, each, scale=scale)
    gm, (_, report) = rewrite(function, q, k, v, passes=PASSES)
    assert len(report.matches) == 1 and str(frames if each else 0) in report.matches[0].note
    kinds = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert kinds.count("aten.scaled_dot_product_attention.default") == frames
    assert not any("full" in kind or "where" in kind or "scatter" in kind for kind in kinds)
    close = agreement(gm(q, k, v)[0], function(q, k, v), function(q.double(), k.double(), v.double()))
    assert close.ok, str(close)


OTHERS: dict[str, Callable[..., Tensor]] = {
    "sees what is behind": lambda f, e, d: compared(f, e, d).T,
    "one row written twice": lambda f, e, d: torch.index_put(
        written(f, e, d), (torch.tensor(0),), torch.tensor(0.0).to(d)
    ),
    "one row not written": lambda f, e, d: torch.cat([written(f, e, d)[:-1], torch.zeros(1, f * e, dtype=d)]),
    "a finite penalty": lambda f, e, d: compared(f, e, d).clamp(min=-1e4),
    "a window": lambda f, e, d: compared(f, e, d).tril(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_left_alone(name: str) -> None:
    q = torch.randn(1, 2, 6, 8)
    _, reports = rewrite(attention(OTHERS[name], 3, 2), q, q, q, passes=PASSES)
    assert not reports[1].matches and not refusals(reports)


def test_a_mask_given_as_input_is_left_alone() -> None:
    q, mask = torch.randn(1, 2, 6, 8), compared(3, 2, torch.float32)
    _, reports = rewrite(lambda q, m: F.scaled_dot_product_attention(q, q, q, m), q, mask, passes=PASSES)
    assert not reports[1].matches


@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5"])
def test_models(name: str, part: str) -> None:
    case = load(name, part=part, dtype=torch.float64)
    eager = case.run()
    pvae.compile(case.model, engine="eager", expect={"prefix_attention": 1})
    close = agreement(case.run(), eager, eager)
    assert close.ok, str(close)
