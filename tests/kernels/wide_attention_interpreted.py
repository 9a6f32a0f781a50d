"""Property tests of `pvae::wide_attention` under Triton's interpreter; see `interpreted.py` for how they are run."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import example, given
from hypothesis import strategies as st

from pvae.kernels import wide_attention as wide
from pvae.kernels.wide_attention import HALVES, OP, Block, attend, reference, refusal, weigh, weigh_reference
from tests.kernels.interpreted import depth

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"
torch.set_num_threads(1)


@given(
    keys=st.integers(1, 70),
    rows=st.integers(1, 3),
    channels=st.integers(1, 20),
    scale=st.sampled_from((0.0, 0.3, 40.0, -1.0)),
    first=st.booleans(),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 99),
)
@example(keys=64, rows=2, channels=16, scale=0.3, first=False, dtype=torch.float16, seed=0)
@depth(60)
def test_the_kernel_is_its_reference(
    keys: int, rows: int, channels: int, scale: float, first: bool, dtype: torch.dtype, seed: int
) -> None:
    """Whatever is in the columns that do not count, and in what is written anew."""
    torch.manual_seed(seed)
    nothing = float("nan") if first else 1.0
    state = torch.randn(rows, 80), torch.randn(rows) * nothing, torch.rand(rows) * nothing, torch.randn(rows, channels)
    state[0][:, keys:] = float("nan")
    ours, theirs = [x.clone() for x in state], [x.clone() for x in state]
    weigh(ours[0], keys, dtype, *ours[1:], scale, first)
    weigh_reference(theirs[0], keys, dtype, *theirs[1:], scale, first)
    step = 2 * torch.finfo(dtype).eps  # the interpreter truncates to bf16 where a GPU rounds
    got, want = (x[0].view(dtype)[:, :keys].float() for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=step, atol=1e-6)
    for got, want in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [Block(1, 8, 16), Block(2, 40, 24), Block(3, 40, 50)])
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks(block: Block, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, n, 12).to(dtype) for n in (40, 50, 50))
    got, exact = attend(q, k, v, 0.7, block), reference(q.double(), k.double(), v.double(), 0.7)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=2 * step, atol=2 * step)


def test_scores_that_are_not_numbers() -> None:
    """A row with a NaN is NaN, as in softmax, whichever block it is in; the others are not touched."""
    q, k, v = torch.randn(1, 6, 8).half(), torch.randn(1, 40, 8).half(), torch.randn(1, 40, 8).half()
    q[0, 2] = float("nan")
    y = attend(q, k, v, 0.5, Block(1, 6, 16))
    assert y[0, 2].isnan().all() and not y[0, [0, 1, 3, 4, 5]].isnan().any()
    k[0, 35] = float("nan")
    assert attend(q, k, v, 0.5, Block(1, 6, 16)).isnan().all()


def test_the_op_takes_the_kernels_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "FEW_SCORES", 1)
    monkeypatch.setattr(wide, "ROWS", 16)
    qkv = torch.randn(2, 1, 20, 3 * 264).half()
    q, k, v = qkv.chunk(3, -1)
    assert refusal(q, k, v) is None
    got = OP(q, k, v, 0.1)
    assert got.is_contiguous() and wide._step.cache_info().currsize
    torch.testing.assert_close(got, reference(q, k, v, 0.1), rtol=2e-3, atol=2e-3)
