"""wide_attention: SDPA with wide heads becomes the op; what is left to SDPA, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae
from pvae.kernels.wide_attention import OP
from pvae.passes.pipeline import Pipeline
from pvae.runtime.torch_compat import new_fake_mode
from pvae.testing import assert_equivalent, assert_rewrites_to, refusals, rewrite

PASS = "wide_attention"
ANYWHERE = "wide_attention{where=any}"
sdpa = F.scaled_dot_product_attention


def on_gpu(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Tensors on a GPU that need not be there."""
    with new_fake_mode():
        return [torch.empty(*s, device="cuda", dtype=dtype) for s in sizes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "passed"), [(None, 384**-0.5), (0.25, 0.25)])
def test_on_a_gpu(scale: float | None, passed: float, dtype: torch.dtype) -> None:
    q = on_gpu((1, 1, 6240, 384), dtype=dtype)[0]
    assert_rewrites_to(
        lambda q, k, v: sdpa(q, k, v, scale=scale), lambda q, k, v: (OP(q, k, v, passed),), q, q, q, passes=PASS
    )


def test_positional_arguments_and_a_mask_that_is_none() -> None:
    q = on_gpu((1, 1, 2000, 512))[0]
    expected = lambda q, k, v: (OP(q, k, v, 0.5),)  # noqa: E731
    assert_rewrites_to(lambda q, k, v: sdpa(q, k, v, None, 0.0, False, scale=0.5), expected, q, q, q, passes=PASS)
    assert_rewrites_to(
        lambda q, k, v: sdpa(q, k, v, attn_mask=None, is_causal=False, scale=0.5), expected, q, q, q, passes=PASS
    )


def test_local_queries_over_all_keys() -> None:
    """As sharding leaves them; values may have channels of their own."""
    q, k, v = on_gpu((2, 1, 1560, 384), (2, 1, 6240, 384), (2, 1, 6240, 320))
    gm, _ = rewrite(sdpa, q, k, v, passes=PASS)
    (node,) = [n for n in gm.graph.nodes if n.target is OP]
    assert tuple(node.meta["val"].shape) == (2, 1, 1560, 320)


def masked(q: Tensor) -> Tensor:
    return sdpa(q, q, q, torch.zeros(q.shape[-2], q.shape[-2], dtype=q.dtype, device=q.device))


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], torch.dtype, str]] = {
    "mask": (masked, (1, 1, 2000, 384), torch.bfloat16, "it has a mask"),
    "causal": (lambda q: sdpa(q, q, q, is_causal=True), (1, 1, 2000, 384), torch.bfloat16, "it is causal"),
    "dropout": (lambda q: sdpa(q, q, q, dropout_p=0.1), (1, 1, 2000, 384), torch.bfloat16, "dropout of 0.1"),
    "fp32": (lambda q: sdpa(q, q, q), (1, 1, 2000, 384), torch.float32, "torch.float32 is not fp16 or bf16"),
    "small": (
        lambda q: sdpa(q, q, q),
        (2, 1, 512, 384),
        torch.bfloat16,
        "524288 scores: one launch of SDPA is cheaper below 1048576",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_refused(name: str) -> None:
    function, shape, dtype, reason = OTHERS[name]
    _, reports = rewrite(function, *on_gpu(shape, dtype=dtype), passes=PASS)
    assert refusals(reports) == [reason] and not reports[0].matches


def test_keys_that_several_heads_share_are_refused() -> None:
    q, k = on_gpu((1, 2, 2000, 384), (1, 1, 2000, 384))
    _, reports = rewrite(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, k, passes=PASS)
    assert refusals(reports) == ["batches or heads of queries, keys and values differ"]


def test_heads_that_flash_attention_takes_are_not_mentioned() -> None:
    for width in (64, 256):
        _, reports = rewrite(lambda q: sdpa(q, q, q), *on_gpu((1, 8, 4096, width)), passes=PASS)
        assert not reports[0].matches and not refusals(reports)


def test_not_on_the_cpu_unless_told_so() -> None:
    q = torch.randn(1, 1, 2000, 384, dtype=torch.bfloat16)
    _, reports = rewrite(lambda q: sdpa(q, q, q), q, passes=PASS)
    assert refusals(reports) == ["no gain on cpu"]
    _, reports = rewrite(lambda q: sdpa(q, q, q), q, passes=ANYWHERE)
    assert reports[0].matches[0].note == "heads of 384 channels"


class Block(nn.Module):
    """A VAE's attention: one head, of all channels of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 1, 3 * c, h * w).transpose(-1, -2).chunk(3, -1)
        return x + self.out(sdpa(q, k, v).squeeze(1).transpose(1, 2).reshape(b, c, h, w))


X = torch.randn(2, 264, 3, 4)


def options() -> dict[str, Any]:
    """With the pass wherever the op computes the same."""
    passes = str(Pipeline.default()).replace(PASS, ANYWHERE)
    return {"engine": "eager", "passes": passes, "expect": {PASS: 1}}


def test_a_block_keeps_the_contract() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    assert_equivalent(Block(264).eval(), (X,), dtypes=dtypes, options=options())


def test_with_inductor() -> None:
    model = Block(264).eval()
    with torch.no_grad():
        want = model(X)
        compiled = torch.compile(model, backend="pvae", options={**options(), "engine": "inductor"})
        torch.testing.assert_close(compiled(X), want, rtol=1e-4, atol=1e-5)
    assert pvae.report(model).matches(PASS) == 1


def test_symbolic_sizes() -> None:
    model = Block(264).eval()
    compiled = torch.compile(model, backend="pvae", dynamic=True, options=options())
    with torch.no_grad():
        for n, h, w in [(2, 3, 4), (3, 5, 2), (4, 6, 7)]:
            x = torch.randn(n, 264, h, w)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(pvae.report(model).graphs) == 1 and pvae.report(model).matches(PASS) == 1


def test_two_instances_compile_once() -> None:
    models = [Block(264).eval() for _ in range(2)]
    compiled = [torch.compile(m, backend="pvae", options=options(), dynamic=False) for m in models]
    with torch.no_grad():
        for model, function in zip(models, compiled, strict=True):
            torch.testing.assert_close(function(X), model(X), rtol=1e-4, atol=1e-5)
    assert len(pvae.report(None).graphs) == 1
