"""The Triton kernel between the two matrix products of `wide_attention`; the mathematics is in wide_attention.py."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton's language: what these functions take and return are its tensors and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["keys"])
def weigh_kernel(
    scores, weights, peak, total, mixed, stride, padded, keys, channels, factor,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One row of scores becomes its weights, where it lies; the row's sums so far are brought to the new maximum.

    The whole row is in registers before its maximum is known, so that nothing is overwritten unread. Loads and stores go
    to `padded`, a multiple of 16, which keeps them wide for any number of keys.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < padded
    x = tl.load(scores + row * stride + at, inside, other=0.0)
    x = tl.where(at < keys, x * factor, float("-inf"))
    top = tl.max(x, 0)
    if not FIRST:
        before = tl.load(peak + row)
        summed = tl.load(total + row)
        top = tl.maximum(top, before)
    p = tl.exp2(x - top)
    new = tl.sum(p, 0)
    if not FIRST:
        kept = tl.exp2(before - top)
        new += kept * summed
        if kept != 1.0:
            channel = tl.arange(0, CHANNELS)
            at_mixed = mixed + row * channels + channel
            tl.store(at_mixed, kept * tl.load(at_mixed, channel < channels), channel < channels)
    tl.store(weights + row * stride * 2 + at, p.to(weights.dtype.element_ty), inside)
    tl.store(peak + row, top)
    tl.store(total + row, new)
