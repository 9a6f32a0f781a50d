"""The Triton kernel of the channel norms: y = activation((norm(x) * weight + bias) * scale + shift), and borders around it.

One program makes TILES times ROWS positions of one frame of the result. A position on the border reads the position
inside that it repeats and is computed again: the frame is written once, and no launch is spent on borders. A position's
channels are held in registers as pieces of BLOCK (96 channels are three pieces of 32, not a block of 128). `rms`, `l2` and
`layer` take their statistics from those registers. For `group`, weight and bias are those of a sample, made of its
statistics by group_moments_kernel.py.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment
# (Triton's language: what these functions take and return are its tensors, tuples and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides: compiled once for all values (ALIGN says what divides a stride), which also makes a launch cheaper.
INTEGERS = (
    "frames", "height", "width", "out_frames", "out_width", "positions", "x_n", "x_t", "x_h", "x_w",
    "scale_n", "scale_t", "scale_h", "scale_w", "shift_n", "shift_t", "shift_h", "shift_w",
)  # fmt: skip


@triton.jit
def _source(index, size, MODE: tl.constexpr):
    """The index inside that `index`, counted from the first one inside, shows; for "constant" `index` itself."""
    if MODE == "replicate":
        index = tl.minimum(tl.maximum(index, 0), size - 1)
    elif MODE == "reflect":
        index = tl.where(index < 0, -index, index)
        index = tl.where(index >= size, 2 * (size - 1) - index, index)
    return index


@triton.jit
def _offset(h, w, h_stride, w_stride, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    offset = w.to(tl.int64) * w_stride * ALIGN
    if not FLAT:
        offset += h.to(tl.int64) * h_stride * ALIGN
    return offset


@triton.jit
def _load(start, wanted, C: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr):
    """The channels at `start` ([ROWS, 1] or [1, 1] of them) as fp32 pieces; those not `wanted` are 0."""
    pieces = ()
    for i in tl.static_range((C + BLOCK - 1) // BLOCK):
        columns = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = wanted & (columns < C) if (i + 1) * BLOCK > C else wanted
        pieces += (tl.load(start + columns, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32),)
    return pieces


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "relu":
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@triton.jit
def _total(pieces, SQUARED: tl.constexpr):
    """[ROWS, 1]: the sum over channels, or of their squares."""
    total = pieces[0] * pieces[0] if SQUARED else pieces[0]
    for i in tl.static_range(1, len(pieces)):
        total += pieces[i] * pieces[i] if SQUARED else pieces[i]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def _centred(pieces, C: tl.constexpr, BLOCK: tl.constexpr):
    mean = _total(pieces, False) / C
    centred = ()
    for i in tl.static_range(len(pieces)):
        value = pieces[i] - mean
        if (i + 1) * BLOCK > C:
            value = tl.where(i * BLOCK + tl.arange(0, BLOCK)[None, :] < C, value, 0.0)
        centred += (value,)
    return centred


@triton.jit(do_not_specialize=INTEGERS)
def channel_norm_kernel(
    x,
    weight,  # [C]; of "group" [samples, C]
    bias,
    scale,
    shift,
    y,
    frames,  # of x, and of the result
    height,
    width,
    out_frames,
    out_width,
    positions,  # in a frame of the result
    x_n,
    x_t,
    x_h,
    x_w,
    scale_n,
    scale_t,
    scale_h,
    scale_w,
    shift_n,
    shift_t,
    shift_h,
    shift_w,
    eps,
    factor,
    C: tl.constexpr,
    NORM: tl.constexpr,  # "rms", "l2", "layer" or "group"
    PER_FRAME: tl.constexpr,  # a sample of weight and bias is a frame
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,  # the positions of a frame are evenly spaced and it has no border at its sides
    FRONT_T: tl.constexpr,
    FRONT_H: tl.constexpr,
    FRONT_W: tl.constexpr,
    MODE_T: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    SCALE: tl.constexpr,  # "none", "vector" (one a sample) or "like" x
    SHIFT: tl.constexpr,
    SCALE_BY_H: tl.constexpr,  # how many rows of x read one of scale
    SCALE_BY_W: tl.constexpr,
    SHIFT_BY_H: tl.constexpr,
    SHIFT_BY_W: tl.constexpr,
    ALIGN: tl.constexpr,  # elements in a unit of stride: what the compiler may take for granted when it vectorises
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    every = tl.full([1, 1], 1, tl.int1)
    block, frame = tl.program_id(0), tl.program_id(1)
    if NORM == "group":  # its statistics were taken front to back: the end may still be in L2
        block = tl.num_programs(0) - 1 - block
        frame = tl.num_programs(1) - 1 - frame
    n = frame // out_frames
    t = _source(frame % out_frames - FRONT_T, frames, MODE_T)
    seen = (t >= 0) & (t < frames)
    x += n.to(tl.int64) * x_n * ALIGN + t.to(tl.int64) * x_t * ALIGN

    if NORM == "group":
        sample = n
        if PER_FRAME:
            sample = n * frames + tl.minimum(tl.maximum(t, 0), frames - 1)
        weight += sample * C
        bias += sample * C
    if weight is not None:
        weights = _load(weight, every, C, BLOCK, "evict_last")
    if bias is not None:
        biases = _load(bias, every, C, BLOCK, "evict_last")
    if SCALE == "vector":
        scales = _load(scale + n.to(tl.int64) * scale_n * ALIGN, every, C, BLOCK, "evict_last")
    elif SCALE == "like":
        scale += n.to(tl.int64) * scale_n * ALIGN + t.to(tl.int64) * scale_t * ALIGN
    if SHIFT == "vector":
        shifts = _load(shift + n.to(tl.int64) * shift_n * ALIGN, every, C, BLOCK, "evict_last")
    elif SHIFT == "like":
        shift += n.to(tl.int64) * shift_n * ALIGN + t.to(tl.int64) * shift_t * ALIGN

    for tile in range(TILES):
        position = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        wanted = position < positions
        inside = wanted & seen
        if FLAT:
            h = position
            w = position
        else:
            h = position // out_width
            w = _source(position - h * out_width - FRONT_W, width, MODE_W)
            h = _source(h - FRONT_H, height, MODE_H)
            inside = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        values = _load(x + _offset(h, w, x_h, x_w, FLAT, ALIGN), inside, C, BLOCK, "")
        if SCALE == "like":
            at = _offset(h // SCALE_BY_H, w // SCALE_BY_W, scale_h, scale_w, FLAT, ALIGN)
            scales = _load(
                scale + at, inside, C, BLOCK, "evict_first" if SCALE_BY_H * SCALE_BY_W == 1 else "evict_last"
            )
        if SHIFT == "like":
            at = _offset(h // SHIFT_BY_H, w // SHIFT_BY_W, shift_h, shift_w, FLAT, ALIGN)
            shifts = _load(
                shift + at, inside, C, BLOCK, "evict_first" if SHIFT_BY_H * SHIFT_BY_W == 1 else "evict_last"
            )

        if NORM == "layer":
            values = _centred(_centred(values, C, BLOCK), C, BLOCK)  # again: it takes the mean's own rounding out
        if NORM == "l2":
            row = tl.div_rn(factor, tl.maximum(tl.sqrt_rn(_total(values, True)), eps))
        elif NORM != "group":
            row = tl.div_rn(factor, tl.sqrt_rn(_total(values, True) / C + eps))

        out = y + (frame.to(tl.int64) * positions + position) * C
        for i in tl.static_range((C + BLOCK - 1) // BLOCK):
            value = values[i]
            if NORM != "group":
                value *= row
            if weight is not None:
                value *= weights[i]
            if bias is not None:
                value += biases[i]
            if SCALE != "none":
                value *= scales[i]
            if SHIFT != "none":
                value += shifts[i]
            value = tl.where(inside, _activate(value, ACTIVATION), 0.0)
            columns = i * BLOCK + tl.arange(0, BLOCK)[None, :]
            mask = wanted & (columns < C) if (i + 1) * BLOCK > C else wanted
            tl.store(out + columns, value.to(y.dtype.element_ty), mask=mask)
