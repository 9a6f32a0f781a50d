"""The Triton kernels that turn a group norm into a multiplier and an offset a channel: y = x * multiplier + offset.

    multiplier = weight / sqrt(variance + eps)      offset = bias - mean * multiplier

    moments_kernel   channels-last memory -> mean and sum of squared differences from it, of each channel in each chunk of
                     positions; with WHOLE those of a group in all positions, and so the result
    combine_kernel   the moments of the channels and chunks of a group -> the result

Each element of a tile keeps a running mean and sum of squares of its own (Welford), and equals are merged afterwards (Chan,
Golub and LeVeque 1979), so that a mean far from 0 costs no digits and no order of arrival matters. Everything is fp32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment
# (Triton's language: what these functions take and return are its tensors, tuples and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl

INTEGERS = ("frames", "height", "width", "positions", "chunk", "x_n", "x_t", "x_h", "x_w")
COMBINE_INTEGERS = ("positions", "chunk", "chunks")


@triton.jit
def _load(start, position, last, height, width, x_t, x_h, x_w, columns, mask, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """[ROWS, BLOCK] as fp32; `position` counts (t, h, w), or (h, w) where frames are samples."""
    if FLAT:
        offset = position.to(tl.int64) * x_w * ALIGN
    else:
        line = position // width
        t = line // height
        offset = (position - line * width).to(tl.int64) * x_w * ALIGN
        offset += (line - t * height).to(tl.int64) * x_h * ALIGN + t.to(tl.int64) * x_t * ALIGN
    return tl.load(start + offset + columns, mask=mask & (position < last), other=0.0).to(tl.float32)


@triton.jit
def _store_affine(
    multiplier, offset, weight, bias, middle, variance, eps, sample, channel, mask, C: tl.constexpr
):  # fmt: skip
    factor = tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) + tl.zeros_like(channel).to(tl.float32)
    if weight is not None:
        factor *= tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    added = -middle * factor
    if bias is not None:
        added += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(multiplier + sample * C + channel, factor, mask=mask)
    tl.store(offset + sample * C + channel, added, mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def moments_kernel(
    x,
    weight,
    bias,
    means,  # [samples, C, chunks], or the multiplier [samples, C] with WHOLE
    squares,  # likewise, or the offset
    frames,  # samples in an entry of the batch: 1, or its frames
    height,
    width,
    positions,  # in a sample
    chunk,
    x_n,
    x_t,
    x_h,
    x_w,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,  # a program has a group and all positions; else BLOCK channels and a chunk
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    D: tl.constexpr = C // GROUPS
    part, sample = tl.program_id(0), tl.program_id(1)
    if WHOLE:
        columns = part * D + tl.arange(0, BLOCK)[None, :]
        mask = tl.arange(0, BLOCK)[None, :] < D
        first = 0
        last = positions
    else:
        columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = columns < C
        first = part * chunk
        last = tl.minimum(first + chunk, positions)
    n = sample // frames
    start = x + n.to(tl.int64) * x_n * ALIGN + (sample - n * frames).to(tl.int64) * x_t * ALIGN

    rows = tl.arange(0, ROWS)[:, None]
    average = tl.zeros([ROWS, BLOCK], tl.float32)
    spreads = tl.zeros([ROWS, BLOCK], tl.float32)
    steps = 0.0
    value = _load(start, first + rows, last, height, width, x_t, x_h, x_w, columns, mask, FLAT, ALIGN)
    position = first
    while position < last:  # not `range`: the interpreter of Triton 3.6 makes no numbers of numpy 2.4's arrays
        following = _load(start, position + ROWS + rows, last, height, width, x_t, x_h, x_w, columns, mask, FLAT, ALIGN)
        steps += 1.0
        apart = tl.where(position + rows < last, value - average, 0.0)
        average += apart * (1.0 / steps)
        spreads += apart * (value - average)
        value = following
        position += ROWS

    size = (last - first).to(tl.float32)
    count = tl.maximum((last - first - rows + ROWS - 1) // ROWS, 0).to(tl.float32)  # [ROWS, 1]: values of a row
    base = tl.sum(tl.where(rows == 0, average, 0.0), 0, keep_dims=True)
    centre = base + tl.sum(count * (average - base), 0, keep_dims=True) / size
    spread = tl.sum(spreads + count * (average - centre) * (average - centre), 0, keep_dims=True)
    if WHOLE:
        base = tl.sum(tl.where(columns == part * D, centre, 0.0), 1, keep_dims=True)
        middle = base + tl.sum(tl.where(mask, centre - base, 0.0), 1, keep_dims=True) / D
        spread += size * (centre - middle) * (centre - middle)
        total = tl.sum(tl.where(mask, spread, 0.0), 1, keep_dims=True)
        _store_affine(means, squares, weight, bias, middle, total / (size * D), eps, sample, columns, mask, C)
    else:
        at = (sample * C + columns) * tl.num_programs(0) + part
        tl.store(means + at, centre, mask=mask)
        tl.store(squares + at, spread, mask=mask)


@triton.jit(do_not_specialize=COMBINE_INTEGERS)
def combine_kernel(
    means,  # [samples, C, chunks]
    squares,
    weight,
    bias,
    multiplier,  # [samples, C]
    offset,
    positions,
    chunk,
    chunks,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels, at least those of a group
    CHUNKS: tl.constexpr,  # read at a time
):
    D: tl.constexpr = C // GROUPS
    group, sample = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, BLOCK)[:, None]
    start = (sample * C + group * D + channel) * chunks
    base = tl.load(means + (sample * C + group * D) * chunks)
    apart = tl.zeros([BLOCK, CHUNKS], tl.float32)
    first = 0
    while first < chunks:
        part = first + tl.arange(0, CHUNKS)[None, :]
        mask = (channel < D) & (part < chunks)
        count = tl.minimum(chunk, positions - part * chunk).to(tl.float32)
        apart += tl.where(mask, count * (tl.load(means + start + part, mask=mask, other=0.0) - base), 0.0)
        first += CHUNKS
    size = positions.to(tl.float32) * D
    middle = base + tl.sum(tl.sum(apart, 1, keep_dims=True), 0, keep_dims=True) / size
    total = tl.zeros([BLOCK, CHUNKS], tl.float32)
    first = 0
    while first < chunks:
        part = first + tl.arange(0, CHUNKS)[None, :]
        mask = (channel < D) & (part < chunks)
        count = tl.minimum(chunk, positions - part * chunk).to(tl.float32)
        off = tl.load(means + start + part, mask=mask, other=0.0) - middle
        total += tl.where(mask, tl.load(squares + start + part, mask=mask, other=0.0) + count * off * off, 0.0)
        first += CHUNKS
    variance = tl.sum(tl.sum(total, 1, keep_dims=True), 0, keep_dims=True) / size
    _store_affine(multiplier, offset, weight, bias, middle, variance, eps, sample, group * D + channel, channel < D, C)
