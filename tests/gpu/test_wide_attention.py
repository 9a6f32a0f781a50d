"""pvae::wide_attention on a GPU, against float64 and beside SDPA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pvae
from pvae.kernels.wide_attention import OP, Block, attend, refusal
from pvae.testing import agreement

pytestmark = pytest.mark.gpu

HALVES = (torch.float16, torch.bfloat16)
sdpa = F.scaled_dot_product_attention


def check(q: Tensor, k: Tensor, v: Tensor, got: Tensor, scale: float) -> None:
    """The contract: 1.25 times eager's error."""
    exact = (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()
    close = agreement(got, sdpa(q, k, v, scale=scale), exact)
    assert close.ok, str(close)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize(
    ("lead", "queries", "keys", "channels"),
    [
        ((1, 1), 6240, 6240, 384),
        ((1, 1), 4096, 4096, 512),
        ((4, 1), 1024, 1024, 512),
        ((2, 4), 1500, 1500, 320),
        ((1, 1), 1560, 6243, 384),
        ((3,), 1021, 1027, 260),
        ((1, 1), 16, 70000, 384),
    ],
)
def test_error_is_within_eagers(
    lead: tuple[int, ...], queries: int, keys: int, channels: int, spread: float, dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(*lead, n, channels, device="cuda", dtype=dtype) for n in (queries, keys, keys))
    q, v, scale = q * spread, v + 1, channels**-0.5
    assert refusal(q, k, v) is None
    got = OP(q, k, v, scale)
    assert got.is_contiguous()
    check(q, k, v, got, scale)


@pytest.mark.parametrize("block", [Block(1, 128, 128), Block(1, 1152, 16384), Block(2, 2048, 640)])
def test_every_kind_of_block(block: Block) -> None:
    q, k, v = (torch.randn(3, n, 384, device="cuda", dtype=torch.bfloat16) for n in (2048, 2200, 2200))
    check(q, k, v, attend(q, k, v, 0.05, block), 0.05)


def test_views_are_read_where_they_lie() -> None:
    """Thirds of a channels-last convolution's result, and of a contiguous one's: no copy of any of them is made."""
    picture = torch.randn(1, 3 * 512, 64, 64, device="cuda", dtype=torch.bfloat16)
    for x in (picture, picture.contiguous(memory_format=torch.channels_last)):
        q, k, v = x.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        want = OP(q.contiguous(), k.contiguous(), v.contiguous(), 0.05)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = OP(q, k, v, 0.05)
        extra = torch.cuda.max_memory_allocated() - before
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        scores, sums = 4096 * 4096 * 4, 4096 * 512 * 4
        assert extra < scores + sums + got.nbytes + 2**20  # a copy of one of them is 4 MiB


def test_in_a_cuda_graph() -> None:
    q = torch.randn(1, 1, 2048, 384, device="cuda", dtype=torch.bfloat16)
    want = OP(q, q, q, 0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OP(q, q, q, 0.05)
    graph.replay()
    assert torch.equal(got, want)


def test_the_pass_with_inductor() -> None:
    class Middle(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
            return sdpa(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])

    model, x = Middle(), torch.randn(2, 3 * 384, 40, 52, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="pvae", options={"expect": {"wide_attention": 1}})
        close = agreement(compiled(x), model(x), model(x.double()))
    assert close.ok, str(close)
    assert pvae.report(model).matches("wide_attention") == 1
