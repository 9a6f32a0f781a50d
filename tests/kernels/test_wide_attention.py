"""pvae::wide_attention: its blocks, rounding and layouts on the CPU, what it refuses, and the kernel in other processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvae.kernels.wide_attention import (
    FEW_SCORES,
    MOST_COLUMNS,
    OP,
    Block,
    attend,
    block_of,
    reference,
    refusal,
    supports,
    weigh_reference,
)
from pvae.testing import agreement
from tests.kernels.interpreted import run_interpreted

HALVES = (torch.float16, torch.bfloat16)
TRIPLE = tuple[Tensor, Tensor, Tensor]


def random(b: int, queries: int, keys: int, channels: int, dtype: torch.dtype, spread: float = 1.0) -> TRIPLE:
    sizes = (queries, keys, keys)
    q, k, v = (torch.randn(b, n, channels).to(dtype) for n in sizes)
    return q * spread, k, v + 1


def blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> Tensor:
    return attend(q, k, v, scale, block, weigh_reference)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])  # even weights, a model's, one weight that is nearly all
@pytest.mark.parametrize("block", [Block(1, 256, 384), Block(1, 128, 128)])
def test_error_is_within_eagers(block: Block, spread: float, dtype: torch.dtype) -> None:
    q, k, v = random(1, 256, 384, 288, dtype, spread)
    scale = 288**-0.5
    exact = reference(q.double(), k.double(), v.double(), scale)
    close = agreement(blocks(q, k, v, scale, block), reference(q, k, v, scale), exact)
    assert close.ok, str(close)


@given(
    b=st.integers(1, 3), queries=st.integers(1, 20), keys=st.integers(1, 40), rows=st.integers(1, 20),
    columns=st.integers(1, 40), entries=st.integers(1, 3), scale=st.sampled_from([0.2, -0.5]),
)  # fmt: skip
def test_any_blocks(b: int, queries: int, keys: int, rows: int, columns: int, entries: int, scale: float) -> None:
    """As many entries as have all their queries in a block."""
    q, k, v = random(b, queries, keys, 8, torch.float16)
    block = Block(entries if rows >= queries else 1, min(rows, queries), min(columns, keys))
    exact = reference(q.double(), k.double(), v.double(), scale)
    torch.testing.assert_close(blocks(q, k, v, scale, block).double(), exact, rtol=2e-3, atol=2e-3)


def test_many_even_weights_do_not_vanish_in_fp16() -> None:
    """65536 weights of 2^-16 are below fp16's normal numbers; they are kept as multiples of the largest."""
    q, k, v = torch.zeros(1, 1, 8).half(), torch.randn(1, 2**16, 8).half(), torch.ones(1, 2**16, 8).half()
    for columns in (2**16, 2**12):
        assert torch.equal(blocks(q, k, v, 1.0, Block(1, 1, columns)), torch.ones(1, 1, 8).half())


def test_scores_beyond_what_exp_holds() -> None:
    q, k, v = random(1, 4, 64, 8, torch.bfloat16)
    y = blocks(q * 1000, k * 1000, v, 1.0, Block(1, 4, 16))
    best = v[0, (q[0].double() @ k[0].double().T).argmax(-1)]
    torch.testing.assert_close(y[0], best)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_reference_is_sdpa(scale: float | None) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    got = OP(q, k, v, 8**-0.5 if scale is None else scale)
    assert got.is_contiguous()
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, scale=scale), rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    q, k, v = (torch.randn(2, n, 6) for n in (5, 7, 7))
    torch.library.opcheck(OP, (q, k, v[..., :4], 0.5))


def test_the_fake_has_the_shape_and_strides_of_the_result() -> None:
    q, k, v = (torch.randn(2, n, 3, 6).transpose(1, 2) for n in (5, 7, 7))
    real = OP(q, k, v, 0.5)
    with FakeTensorMode() as mode:
        fake = OP(*map(mode.from_tensor, (q, k, v)), 0.5)
    assert fake.shape == real.shape and fake.stride() == real.stride() and fake.dtype == real.dtype


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8), (1, 4, 8), (1, 4, 8)),
        ((4, 8), (4, 6), (4, 8)),
        ((4, 8), (4, 8), (5, 8)),
        ((8,), (8,), (8,)),
    ],
)
def test_shapes_that_do_not_go_together(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        OP(*[torch.randn(s) for s in shapes], 1.0)


def test_what_is_refused() -> None:
    def like(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    q = like(1, 1024, 384)
    assert supports(q, q, q) is None
    assert supports(q.float(), q, q) == "torch.float32 is not fp16 or bf16"
    assert supports(q, q, q.half()) == "the queries are torch.bfloat16, the values torch.float16"
    assert supports(q[..., :256], q, q) == "256 channels a head: flash attention takes it"
    cpu = like(1, 4, 384, device="cpu")
    assert refusal(cpu, cpu, cpu) == "Triton does not run on cpu"
    assert refusal(q, q, q) == "Triton does not run on meta"


@given(
    batches=st.integers(1, 64),
    queries=st.integers(1, 70000),
    keys=st.integers(1, 70000),
    mib=st.sampled_from([16, 32, 128]),
    rows=st.sampled_from([1024, 2048, 8192]),
)
def test_blocks_are_even_and_fit(batches: int, queries: int, keys: int, mib: int, rows: int) -> None:
    block = block_of(batches, queries, keys, mib * 2**20, rows)
    assert 1 <= block.entries <= batches and 1 <= block.rows <= queries
    assert 1 <= block.columns <= min(keys, MOST_COLUMNS)
    assert block.entries == 1 or block.rows == queries
    small = block.columns <= 128  # blocks are no narrower than a tile
    assert small or 4 * block.entries * block.rows * block.columns <= mib * 2**20
    assert block.rows % 128 == 0 or block.rows == queries
    assert block.columns % 128 == 0 or block.columns == keys
    if not small and block.rows < queries:
        assert 0.5 * rows < block.rows <= 1.5 * max(rows, mib * 2**18 / keys) + 128


def test_blocks_of_models() -> None:
    """Wan 480p, Qwen-Image 1024^2 and 2048^2, and four small pictures, which are one block."""
    assert block_of(1, 6240, 6240) == Block(1, 6240, 6240)
    assert block_of(1, 16384, 16384) == Block(1, 8192, 8192)
    assert block_of(1, 65536, 65536) == Block(1, 8192, 8192)
    assert block_of(4, 1024, 1024) == Block(4, 1024, 1024)
    assert math.prod((1024, 1024)) >= FEW_SCORES


def test_under_the_interpreter() -> None:
    run_interpreted("wide_attention_interpreted.py")
