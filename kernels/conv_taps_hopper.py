"""`conv_taps` on Hopper, in Gluon: the program of conv_taps_kernel.py with its pipeline written out.

Patches and weights go from global to shared memory by TMA, STAGES deep, and from there straight into the tensor cores.
Triton itself takes a patch of several rows through registers, and overwrites them while products still read them: results
then change from run to run (seen with triton 3.6 on H200). Here operands stay in shared memory, and a stage is loaded anew
only when the products that read it are done.

A program is one warp group: two fit on a multiprocessor, one computes while the other finishes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

OUTSIDE = gl.constexpr(1 << 24)


@gluon.jit
def _load(
    k, limit, patches, weight0, weight1, a_smem, b0_smem, b1_smem, full, n, t, h0, w0, weight_row,
    before_first, before_frames, t_in, CHANNELS: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STRIDE_T: gl.constexpr, DILATION_T: gl.constexpr, DILATION_H: gl.constexpr, DILATION_W: gl.constexpr,
    PAD_T: gl.constexpr, HAS_BEFORE: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the loads of step `k`, if there is one."""
    stage, tap, c0 = k % STAGES, k // STEPS, (k % STEPS) * a_smem.shape[5]
    h, w = h0 + ((tap // KW) % KH) * DILATION_H, w0 + (tap % KW) * DILATION_W
    frame = t * STRIDE_T + (tap // (KW * KH)) * DILATION_T - PAD_T
    which = n
    if HAS_BEFORE:
        in_x = frame >= before_frames
        which = gl.where(in_x, 1, 0) ^ before_first ^ 1
        frame -= gl.where(in_x, before_frames, 0)
        frame = gl.where(in_x & (frame >= t_in), OUTSIDE, frame)
    exists = k < limit
    bar = full.index(stage)
    nbytes: gl.constexpr = patches.block_type.nbytes + weight0.block_type.nbytes
    extra: gl.constexpr = 0 if weight1 is None else weight1.block_type.nbytes
    mbarrier.expect(bar, nbytes + extra, pred=exists)
    tma.async_copy_global_to_shared(patches, [which, frame, h, w, c0], bar, a_smem.index(stage), pred=exists)
    column = tap * CHANNELS + c0
    tma.async_copy_global_to_shared(weight0, [weight_row, column], bar, b0_smem.index(stage), pred=exists)
    if weight1 is not None:
        row1 = weight_row + b0_smem.shape[1]
        tma.async_copy_global_to_shared(weight1, [row1, column], bar, b1_smem.index(stage), pred=exists)


@gluon.jit
def _finish(
    acc, bias, residual, y, n, t, h0, w0, phase_h, phase_w, first, t_out, h_out, w_out, channels,
    UPSAMPLE: gl.constexpr, ACTIVATION: gl.constexpr, BW: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Bias, residual, activation and cast of one block of columns, and its store in 16-byte pieces."""
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    acc = gl.convert_layout(acc, OUT)
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, OUT))
    cols = first + gl.arange(0, BN, layout=gl.SliceLayout(0, OUT))
    h, w = h0 + row // BW, w0 + row % BW
    keep = (h < h_out) & (w < w_out)
    height, width = h_out, w_out
    if UPSAMPLE:
        h, w = 2 * h + phase_h, 2 * w + phase_w
        height, width = 2 * h_out, 2 * w_out
    frame = (n * t_out + t).to(gl.int64) * height
    offsets = ((frame + h) * width + w) * channels
    inside = cols < channels
    if bias is not None:
        acc += gl.load(bias + cols, mask=inside, other=0.0).to(gl.float32)[None, :]
    where = offsets[:, None] + cols[None, :]
    mask = keep[:, None] & inside[None, :]
    if residual is not None:
        acc += gl.load(residual + where, mask=mask, other=0.0).to(gl.float32)
    if ACTIVATION == "silu":
        acc = acc / (1.0 + gl.exp(-acc))
    if ACTIVATION == "relu":
        acc = gl.maximum(acc, 0.0)
    gl.store(y + where, acc.to(y.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["before_first", "before_frames", "t_in", "t_out"])
def conv_taps_hopper(
    x_patches,
    weight0,
    weight1,
    bias,
    residual,
    y,
    before_first,
    before_frames,
    t_in,
    t_out,
    h_out,
    w_out,
    out_channels,
    CHANNELS: gl.constexpr,
    KT: gl.constexpr,
    KH: gl.constexpr,
    KW: gl.constexpr,
    STRIDE_T: gl.constexpr,
    DILATION_T: gl.constexpr,
    DILATION_H: gl.constexpr,
    DILATION_W: gl.constexpr,
    PAD_T: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    HAS_BEFORE: gl.constexpr,
    UPSAMPLE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BH: gl.constexpr,
    BW: gl.constexpr,
    BN0: gl.constexpr,
    BN1: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `conv_taps_kernel`, for stride 1 in H and W; `x_patches`, `weight0`, `weight1` are Gluon descriptors."""
    BM: gl.constexpr = BH * BW
    STEPS: gl.constexpr = (CHANNELS + BK - 1) // BK
    TOTAL: gl.constexpr = KT * KH * KW * STEPS
    dtype: gl.constexpr = x_patches.dtype
    k_width: gl.constexpr = 32 // dtype.primitive_bitwidth
    MMA0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN0, 8 * k_width])
    OUT0: gl.constexpr = MMA0

    program = gl.program_id(0)
    blocks_n = gl.cdiv(out_channels, BN0 + BN1)
    first_col = (program % blocks_n) * (BN0 + BN1)
    program //= blocks_n
    phase_h, phase_w, weight_row = 0, 0, first_col
    if UPSAMPLE:
        phase_h, phase_w = (program % 4) // 2, program % 2
        weight_row = first_col + (program % 4) * out_channels
        program //= 4
    blocks_w, blocks_h = gl.cdiv(w_out, BW), gl.cdiv(h_out, BH)
    w0 = (program % blocks_w) * BW
    h0 = ((program // blocks_w) % blocks_h) * BH
    frame = program // (blocks_w * blocks_h)
    t, n = frame % t_out, frame // t_out
    hp, wp = h0 - PAD_H + phase_h, w0 - PAD_W + phase_w

    a_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BH, BW, BK], x_patches.layout)
    b0_smem = gl.allocate_shared_memory(dtype, [STAGES, BN0, BK], weight0.layout)
    b1_smem = b0_smem
    if BN1 > 0:
        b1_smem = gl.allocate_shared_memory(dtype, [STAGES, BN1, BK], weight1.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    for k in gl.static_range(STAGES - 1):
        _load(
            k, TOTAL, x_patches, weight0, weight1, a_smem, b0_smem, b1_smem, full, n, t, hp, wp, weight_row,
            before_first, before_frames, t_in, CHANNELS, KH, KW,
            STRIDE_T, DILATION_T, DILATION_H, DILATION_W, PAD_T, HAS_BEFORE, STEPS, STAGES,
        )  # fmt: skip

    acc0 = gl.zeros([BM, BN0], gl.float32, MMA0)
    if BN1 > 0:
        MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN1, 8 * k_width])
        acc1 = gl.zeros([BM, BN1], gl.float32, MMA1)
    for k in range(TOTAL):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        a = a_smem.index(stage).reshape([BM, BK])
        acc0 = warpgroup_mma(a, b0_smem.index(stage).permute((1, 0)), acc0, is_async=True)
        # All but this step's products are done, and with them the reads of the stage that is loaded next.
        if BN1 > 0:
            acc1 = warpgroup_mma(a, b1_smem.index(stage).permute((1, 0)), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(2, deps=(acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(1, deps=(acc0,))
        _load(
            k + STAGES - 1, TOTAL, x_patches, weight0, weight1, a_smem, b0_smem, b1_smem, full, n, t, hp, wp,
            weight_row, before_first, before_frames, t_in, CHANNELS, KH, KW,
            STRIDE_T, DILATION_T, DILATION_H, DILATION_W, PAD_T, HAS_BEFORE, STEPS, STAGES,
        )  # fmt: skip
    if BN1 > 0:
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))

    _finish(
        acc0, bias, residual, y, n, t, h0, w0, phase_h, phase_w, first_col, t_out, h_out, w_out, out_channels,
        UPSAMPLE, ACTIVATION, BW, OUT0,
    )  # fmt: skip
    if BN1 > 0:
        OUT1: gl.constexpr = MMA1
        _finish(
            acc1, bias, residual, y, n, t, h0, w0, phase_h, phase_w, first_col + BN0, t_out, h_out, w_out, out_channels,
            UPSAMPLE, ACTIVATION, BW, OUT1,
        )  # fmt: skip
