"""The Triton kernel of `conv_taps`: a convolution as one matrix product a tap, summed in one accumulator.

A program makes BH x BW output positions of one frame times BN0 + BN1 channels. For each tap and each BK channels it loads
the BH x BW patch that the tap reads, shifted by a constant, and the tap's weights. What a patch reads outside the picture
is masked to zero, so no padded copy of the activation is ever made.

Frames in front of x (a causal cache) are elsewhere in memory. Both are one tensor all the same: its outermost dimension
steps from the lower of the two addresses to the higher one.

Columns are cut in two powers of two, so that 96 or 192 channels waste nothing. Runs on NVIDIA and AMD GPUs and under the
interpreter; Hopper has a kernel of its own (conv_taps_hopper.py).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

# A frame that no tensor has.
OUTSIDE = tl.constexpr(1 << 24)


@triton.jit
def _nearest_tf32(x):
    """Rounded to the 10 bits of mantissa that tensor cores take: they cut the others off, at twice the error."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _weights(at, first_row, first_col, out_channels, K, inside, BN: tl.constexpr):
    """The weights [BK, BN] of one step, for BN rows of the weight matrix."""
    n = tl.arange(0, BN)
    mask = (first_col + n < out_channels)[None, :] & inside[:, None]
    return tl.load(at + (first_row + n).to(tl.int64)[None, :] * K, mask=mask, other=0.0)


@triton.jit
def _finish(acc, bias, residual, y, offsets, keep, first, channels, ACTIVATION: tl.constexpr, BN: tl.constexpr):
    """Bias, residual, activation and cast of one block of columns, and its store."""
    cols = first + tl.arange(0, BN)
    inside = cols < channels
    if bias is not None:
        acc += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    where = offsets[:, None] + cols[None, :]
    mask = keep[:, None] & inside[None, :]
    if residual is not None:
        acc += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        acc = acc * tl.sigmoid(acc)
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0)
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["before_first", "before_frames", "t_in", "t_out"])
def conv_taps_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    stride_which,
    stride_n,
    stride_t,
    stride_h,
    stride_w,
    before_first,
    before_frames,
    t_in,
    h_in,
    w_in,
    t_out,
    h_out,
    w_out,
    out_channels,
    CHANNELS: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_T: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PAD_T: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN0: tl.constexpr,
    BN1: tl.constexpr,
    BK: tl.constexpr,
):
    """y[n, t, h, w, o] = act(sum over taps and c of x[...] * weight[o, tap, c] + bias[o] + residual[n, t, h, w, o]).

    `h_out` and `w_out` count the positions that one phase makes: those of y, or half of them with UPSAMPLE.
    UPCAST is for the interpreter,
    whose `dot` does not know bf16.
    """
    BM: tl.constexpr = BH * BW
    STEPS: tl.constexpr = (CHANNELS + BK - 1) // BK
    K: tl.constexpr = KT * KH * KW * CHANNELS

    program = tl.program_id(0)
    blocks_n = tl.cdiv(out_channels, BN0 + BN1)
    first_col = (program % blocks_n) * (BN0 + BN1)
    program //= blocks_n
    phase_h, phase_w, weight_row = 0, 0, first_col
    if UPSAMPLE:
        phase = program % 4
        phase_h, phase_w = phase // 2, phase % 2
        weight_row += phase * out_channels
        program //= 4
    blocks_w, blocks_h = tl.cdiv(w_out, BW), tl.cdiv(h_out, BH)
    w0 = (program % blocks_w) * BW
    program //= blocks_w
    h0 = (program % blocks_h) * BH
    program //= blocks_h
    t = program % t_out
    n = program // t_out

    row = tl.arange(0, BM)
    acc0 = tl.zeros((BM, BN0), tl.float32)
    if BN1 > 0:
        acc1 = tl.zeros((BM, BN1), tl.float32)
    for k in range(KT * KH * KW * STEPS):
        tap, c0 = k // STEPS, (k % STEPS) * BK
        h = h0 * STRIDE_H + ((tap // KW) % KH) * DILATION_H - PAD_H + phase_h
        w = w0 * STRIDE_W + (tap % KW) * DILATION_W - PAD_W + phase_w
        frame = t * STRIDE_T + (tap // (KW * KH)) * DILATION_T - PAD_T
        hs, ws = h + (row // BW) * STRIDE_H, w + (row % BW) * STRIDE_W
        start = n.to(tl.int64) * stride_n
        if HAS_BEFORE:
            in_x = frame >= before_frames
            start = (in_x.to(tl.int32) ^ before_first ^ 1) * stride_which
            frame -= tl.where(in_x, before_frames, 0)
            frame = tl.where(in_x & (frame >= t_in), OUTSIDE, frame)
            exists = (frame >= 0) & (frame < OUTSIDE)
        else:
            exists = (frame >= 0) & (frame < t_in)
        start += frame.to(tl.int64) * stride_t
        inside = (hs >= 0) & (hs < h_in) & (ws >= 0) & (ws < w_in) & exists
        at = start + hs.to(tl.int64) * stride_h + ws.to(tl.int64) * stride_w
        c = c0 + tl.arange(0, BK)
        a = tl.load(x + at[:, None] + c[None, :], mask=inside[:, None] & (c < CHANNELS)[None, :], other=0.0)
        weights = weight + tap * CHANNELS + c[:, None]
        b0 = _weights(weights, weight_row, first_col, out_channels, K, c < CHANNELS, BN0)
        if UPCAST:
            a, b0 = a.to(tl.float32), b0.to(tl.float32)
        if PRECISION == "tf32":
            a, b0 = _nearest_tf32(a), _nearest_tf32(b0)
        acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
        if BN1 > 0:
            b1 = _weights(weights, weight_row + BN0, first_col + BN0, out_channels, K, c < CHANNELS, BN1)
            if UPCAST:
                b1 = b1.to(tl.float32)
            if PRECISION == "tf32":
                b1 = _nearest_tf32(b1)
            acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)

    h = h0 + row // BW
    w = w0 + row % BW
    keep = (h < h_out) & (w < w_out)
    height, width = h_out, w_out
    if UPSAMPLE:
        h, w = 2 * h + phase_h, 2 * w + phase_w
        height, width = 2 * h_out, 2 * w_out
    offsets = (((n * t_out + t).to(tl.int64) * height + h) * width + w) * out_channels
    _finish(acc0, bias, residual, y, offsets, keep, first_col, out_channels, ACTIVATION, BN0)
    if BN1 > 0:
        _finish(acc1, bias, residual, y, offsets, keep, first_col + BN0, out_channels, ACTIVATION, BN1)
