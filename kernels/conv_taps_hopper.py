"""`conv_taps` on Hopper, in Gluon: image rows that stay where they are while the taps move over them.

A program makes tiles of rows x WIDTH positions x (BN0 + BN1) channels, one after another. One warp loads by TMA, STAGES
ahead; two warp groups multiply. A step is one tap in time and in width, and BK channels: the tile's input rows, each a
*fragment* of 64 positions (the height of one tensor core product), and the weights of all KH taps in height.

A tap further down in height is only the next fragment. So a fragment is read once, into registers where the accumulators
leave room, and multiplied with all KH taps, each into the accumulator of the output row that it belongs to: an input row is
fetched KT * KW times and not KT * KH * KW times. With 96 channels that is the difference between waiting for L2 and not.

With a stride of two in height or width a tensor is loaded as its *planes*, every second row or column of it, each with a
descriptor of its own: a tap reads one plane at stride 1, and taps two rows apart still share fragments.

Borders are what TMA fills with zeros. Frames before and behind x have descriptors of their own. Results go out by TMA,
which clips them. The sum of an output is taken in one order whatever the other warps do: results are the same bits at
every launch.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

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

M = gl.constexpr(64)  # positions of a product
GROUPS = gl.constexpr(2)  # warp groups that multiply; more leave each too few registers
LOADER_REGISTERS = gl.constexpr(40)
REGISTERS = gl.constexpr(232)  # of a thread that multiplies: 65536 less the loader's and those that are not given out
# More accumulators than these leave no room for a fragment in registers: it is then multiplied from shared memory.
MAX_ACCUMULATORS = gl.constexpr(144)


@gluon.constexpr_function
def distance(kh: int, width: int, stride: int) -> int:
    """Fragments from that of one product to that of the next: one for each row, or only those that taps read."""
    return min(kh, stride * 64 // width)


@gluon.constexpr_function
def fragments(products: int, kh: int, width: int, stride: int) -> int:
    """Fragments that so many products in a column read."""
    return distance(kh, width, stride) * (products - 1) + kh


@gluon.jit
def _tile(tile, blocks_n, frames, w_out, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, UPSAMPLE: gl.constexpr):
    """(block of columns, phase, frame, h0, w0): what tiles side by side in time read is still in L2."""
    column = tile % blocks_n
    tile = tile // blocks_n
    phase = 0
    if UPSAMPLE:
        phase = tile % 4
        tile = tile // 4
    frame = tile % frames
    tile = tile // frames
    blocks_w = gl.cdiv(w_out, WIDTH)
    return column, phase, frame, (tile // blocks_w) * HEIGHT, (tile % blocks_w) * WIDTH


@gluon.jit
def _corner(phase, TURNED: gl.constexpr):
    """An enlarged picture's phase along the rows' axis of the tile, and along its positions'."""
    row = phase // 2
    position = phase % 2
    if TURNED:
        row = phase % 2
        position = phase // 2
    return row, position


@gluon.jit
def _taps(t, kt, stride_t, dilation_t, pad_t, t_all):
    """The taps in time, from and to, that read frames which exist; the others would add zeros."""
    start = pad_t - t * stride_t
    first = gl.maximum(gl.cdiv(start, dilation_t), 0)
    return first, gl.minimum(gl.cdiv(gl.maximum(start + t_all, 0), dilation_t), kt)


@gluon.jit
def _put(items, index: gl.constexpr, value):
    return items[:index] + (value,) + items[index + 1 :]  # noqa: RUF005


@gluon.jit
def _fragments(
    planes, n, t, h, w, c, bar, a_smem, first,
    KH: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr,
):  # fmt: skip
    """Loads the fragments of a step, from row h and column w of frame t on, to a_smem from `first` on."""
    APART: gl.constexpr = distance(KH, WIDTH, STRIDE_H)
    ROWS_APART: gl.constexpr = STRIDE_H * M // WIDTH  # from one product to the next
    # Rows and columns before the first are negative: `&` and `>>` are their remainder and quotient all the same.
    for j in gl.static_range(STRIDE_W):
        if (w & (STRIDE_W - 1)) == j:
            # A loop that stays one: unrolled, its addresses would not fit in this warp's registers.
            for s in range(fragments(GROUPS * ROWS, KH, WIDTH, STRIDE_H)):
                row = h + s
                if APART < ROWS_APART:
                    row = h + s // APART * ROWS_APART + s % APART
                for i in gl.static_range(STRIDE_H):
                    if (row & (STRIDE_H - 1)) == i:
                        tma.async_copy_global_to_shared(
                            planes[i * STRIDE_W + j], [n, t, row >> (STRIDE_H // 2), w >> (STRIDE_W // 2), c], bar,
                            a_smem.index(first + s),
                        )  # fmt: skip


@gluon.jit
def _load(
    x, before, after, weight0, weight1, a_smem, b0_smem, b1_smem, full, empty,
    tiles, blocks_n, frames, t_out, t_in, before_frames, after_frames, w_out, out_channels, channels,
    kt, kw, stride_t, dilation_t, dilation_w, pad_t, pad_h, pad_w,
    KH: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, BN0: gl.constexpr, BN1: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, UPSAMPLE: gl.constexpr, TURNED: gl.constexpr, STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr,
):  # fmt: skip
    """The loading warp: every step of every tile, each when its stage is empty."""
    FRAGMENTS: gl.constexpr = fragments(GROUPS * ROWS, KH, WIDTH, STRIDE_H)
    HEIGHT: gl.constexpr = GROUPS * ROWS * (M // WIDTH)
    BYTES: gl.constexpr = (FRAGMENTS * M + KH * (BN0 + BN1)) * BK * (a_smem.dtype.primitive_bitwidth // 8)
    stage = 0
    phase = 1  # of the parity before the first: a fresh stage counts as empty
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, corner, frame, h0, w0 = _tile(tile, blocks_n, frames, w_out, HEIGHT, WIDTH, UPSAMPLE)
        n = frame // t_out
        t = frame % t_out
        first, last = _taps(t, kt, stride_t, dilation_t, pad_t, before_frames + t_in + after_frames)
        corner_h, corner_w = _corner(corner, TURNED)
        h = h0 * STRIDE_H - pad_h + corner_h
        row = corner * out_channels + column * (BN0 + BN1)
        for dt in range(first, last):
            f = t * stride_t + dt * dilation_t - pad_t
            for dw in range(kw):
                w = w0 * STRIDE_W + dw * dilation_w - pad_w + corner_w
                for c in range(0, channels, BK):
                    mbarrier.wait(empty.index(stage), phase)
                    bar = full.index(stage)
                    mbarrier.expect(bar, BYTES)
                    first_a = stage * FRAGMENTS
                    if f < before_frames:
                        _fragments(before, n, f, h, w, c, bar, a_smem, first_a, KH, ROWS, WIDTH, STRIDE_H, STRIDE_W)
                    elif f >= before_frames + t_in:
                        g = f - before_frames - t_in
                        _fragments(after, n, g, h, w, c, bar, a_smem, first_a, KH, ROWS, WIDTH, STRIDE_H, STRIDE_W)
                    else:
                        g = f - before_frames
                        _fragments(x, n, g, h, w, c, bar, a_smem, first_a, KH, ROWS, WIDTH, STRIDE_H, STRIDE_W)
                    for dh in range(KH):
                        tap = (dt * KH + dh) * kw + dw
                        if TURNED:
                            tap = (dt * kw + dw) * KH + dh
                        b = stage * KH + dh
                        tma.async_copy_global_to_shared(weight0, [tap, row, c], bar, b0_smem.index(b))
                        if BN1 > 0:
                            tma.async_copy_global_to_shared(weight1, [tap, row + BN0, c], bar, b1_smem.index(b))
                    stage += 1
                    if stage == STAGES:
                        stage = 0
                        phase ^= 1


@gluon.jit
def _finish(
    acc, bias, residual, y, y_smem, frame, h0, w0, corner, first, h_out, w_out, channels,
    WIDTH: gl.constexpr, UPSAMPLE: gl.constexpr, ACTIVATION: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Bias, residual, activation and cast of one product's columns, into shared memory, or to where they belong."""
    layout: gl.constexpr = acc.type.layout
    BN: gl.constexpr = acc.shape[1]
    position = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    cols = first + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    inside = cols < channels
    if bias is not None:
        acc += gl.load(bias + cols, mask=inside, other=0.0).to(gl.float32)[None, :]
    if (residual is not None) or (y_smem is None):
        h = h0 + position // WIDTH
        w = w0 + position % WIDTH
        mask = ((h < h_out) & (w < w_out))[:, None] & inside[None, :]
        height = h_out
        width = w_out
        if UPSAMPLE:
            corner_h, corner_w = _corner(corner, TURNED)
            h = 2 * h + corner_h
            w = 2 * w + corner_w
            height = 2 * h_out
            width = 2 * w_out
        frame = gl.cast(frame, gl.int64)
        pixel = (frame * height + h) * width + w
        if TURNED:
            pixel = (frame * width + w) * height + h
        where = (pixel * channels)[:, None] + cols[None, :]
    if residual is not None:
        acc += gl.load(residual + where, mask=mask, other=0.0).to(gl.float32)
    if ACTIVATION == "silu":
        acc = acc / (1.0 + gl.exp(-acc))
    if ACTIVATION == "relu":
        acc = gl.maximum(acc, 0.0)
    if y_smem is None:
        gl.store(y + where, acc.to(y.dtype.element_ty), mask=mask)
    else:
        y_smem.store(acc.to(y_smem.dtype).reshape(y_smem.shape))


@gluon.jit
def _multiply(
    group: gl.constexpr, a_smem, b0_smem, b1_smem, full, empty, bias, residual, y, y0, y1, y0_smem, y1_smem,
    tiles, blocks_n, frames, t_out, t_in, before_frames, after_frames, h_out, w_out, out_channels, channels,
    kt, kw, stride_t, dilation_t, pad_t,
    KH: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, BN0: gl.constexpr, BN1: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, UPSAMPLE: gl.constexpr, ACTIVATION: gl.constexpr, TURNED: gl.constexpr, STRIDE_H: gl.constexpr,
):  # fmt: skip
    """One of the groups that multiply: ROWS products of every tile."""
    ROWS_OF_PRODUCT: gl.constexpr = M // WIDTH
    HEIGHT: gl.constexpr = GROUPS * ROWS * ROWS_OF_PRODUCT
    ALL: gl.constexpr = fragments(GROUPS * ROWS, KH, WIDTH, STRIDE_H)
    OWN: gl.constexpr = fragments(ROWS, KH, WIDTH, STRIDE_H)
    APART: gl.constexpr = distance(KH, WIDTH, STRIDE_H)
    WORDS: gl.constexpr = 32 // a_smem.dtype.primitive_bitwidth
    IN_REGISTERS: gl.constexpr = (ROWS * (BN0 + BN1) // 2 <= MAX_ACCUMULATORS) and (WORDS == 2)
    MMA0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN0, 8 * WORDS])
    MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN1 if BN1 > 0 else 16, 8 * WORDS])
    OPERAND0: gl.constexpr = gl.DotOperandLayout(0, MMA0, WORDS)
    OPERAND1: gl.constexpr = gl.DotOperandLayout(0, MMA1, WORDS)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        column, corner, frame, h0, w0 = _tile(tile, blocks_n, frames, w_out, HEIGHT, WIDTH, UPSAMPLE)
        first, last = _taps(frame % t_out, kt, stride_t, dilation_t, pad_t, before_frames + t_in + after_frames)
        acc0 = ()
        acc1 = ()
        for _ in gl.static_range(ROWS):
            acc0 = acc0 + (gl.zeros([M, BN0], gl.float32, MMA0),)  # noqa: RUF005
            if BN1 > 0:
                acc1 = acc1 + (gl.zeros([M, BN1], gl.float32, MMA1),)  # noqa: RUF005
        for _ in range((last - first) * kw * gl.cdiv(channels, BK)):
            mbarrier.wait(full.index(stage), phase)
            own = stage * ALL + group * ROWS * APART
            a = a_smem.index(own).reshape([M, BK])
            if IN_REGISTERS:
                a = a.load(OPERAND0)
            for s in gl.static_range(OWN):
                # The next fragment is on its way to registers while this one is multiplied.
                following = a
                if s + 1 < OWN:
                    following = a_smem.index(own + s + 1).reshape([M, BK])
                    if IN_REGISTERS:
                        following = following.load(OPERAND0)
                for dh in gl.static_range(KH):
                    for i in gl.static_range(ROWS):
                        if s == i * APART + dh:
                            b0 = b0_smem.index(stage * KH + dh).reshape([BN0, BK]).permute((1, 0))
                            acc0 = _put(acc0, i, warpgroup_mma(a, b0, acc0[i], is_async=True))
                            if BN1 > 0:
                                b1 = b1_smem.index(stage * KH + dh).reshape([BN1, BK]).permute((1, 0))
                                a1 = a
                                if IN_REGISTERS:
                                    a1 = gl.convert_layout(a, OPERAND1, assert_trivial=True)
                                acc1 = _put(acc1, i, warpgroup_mma(a1, b1, acc1[i], is_async=True))
                a = following
            # The stage is given back when the products that read it are done, not when they are issued. (Products in
            # flight over the loop's end would also make ptxas wait after each of them; the other group fills the gap.)
            done = warpgroup_mma_wait(0, deps=acc0 + acc1)
            if ROWS == 1 and BN1 == 0:
                acc0 = (done,)
            else:
                acc0 = done[:ROWS]
                acc1 = done[ROWS:]
            mbarrier.arrive(empty.index(stage), count=1)  # one thread, after a barrier of the group
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        col = column * (BN0 + BN1)
        for i in gl.static_range(ROWS):
            h = h0 + (group * ROWS + i) * ROWS_OF_PRODUCT
            if y0 is None:
                _finish(
                    acc0[i], bias, residual, y, None, frame, h, w0, corner, col, h_out, w_out, out_channels,
                    WIDTH, UPSAMPLE, ACTIVATION, TURNED,
                )  # fmt: skip
                if BN1 > 0:
                    _finish(
                        acc1[i], bias, residual, y, None, frame, h, w0, corner, col + BN0, h_out, w_out, out_channels,
                        WIDTH, UPSAMPLE, ACTIVATION, TURNED,
                    )  # fmt: skip
            else:
                # The stores before have read the buffers that are now overwritten.
                tma.store_wait(0)
                _finish(
                    acc0[i], bias, residual, y, y0_smem.index(group), frame, h, w0, corner, col, h_out, w_out,
                    out_channels, WIDTH, UPSAMPLE, ACTIVATION, TURNED,
                )  # fmt: skip
                if BN1 > 0:
                    _finish(
                        acc1[i], bias, residual, y, y1_smem.index(group), frame, h, w0, corner, col + BN0, h_out, w_out,
                        out_channels, WIDTH, UPSAMPLE, ACTIVATION, TURNED,
                    )  # fmt: skip
                fence_async_shared()  # what threads wrote is seen by TMA
                at = (corner % 2) * out_channels + col
                tma.async_copy_shared_to_global(y0, [frame, h, corner // 2, w0, at], y0_smem.index(group))
                if BN1 > 0:
                    tma.async_copy_shared_to_global(y1, [frame, h, corner // 2, w0, at + BN0], y1_smem.index(group))
    if y0 is not None:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "tiles", "blocks_n", "frames", "t_out", "t_in", "before_frames", "after_frames", "h_out", "w_out", "out_units",
        "channels", "kt", "kw", "stride_t", "dilation_t", "dilation_w", "pad_t", "pad_h", "pad_w",
    ]
)  # fmt: skip
def conv_taps_hopper(
    x,
    before,
    after,
    weight0,
    weight1,
    y0,
    y1,
    x1,
    x2,
    x3,
    before1,
    before2,
    before3,
    after1,
    after2,
    after3,
    bias,
    residual,
    y,
    tiles,
    blocks_n,
    frames,
    t_out,
    t_in,
    before_frames,
    after_frames,
    h_out,
    w_out,
    out_units,
    channels,
    kt,
    kw,
    stride_t,
    dilation_t,
    dilation_w,
    pad_t,
    pad_h,
    pad_w,
    KH: gl.constexpr,
    ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    BN0: gl.constexpr,
    BN1: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    OUT_UNIT: gl.constexpr,
    UPSAMPLE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    TURNED: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STRIDE_W: gl.constexpr,
):
    """As `conv_taps_kernel`, for stride 1 or 2 in H and W and dilation 1 in H. Descriptors:

    x, before, after  [N, T, H, W, C], a block is a fragment: [1, 1, 64 / WIDTH, WIDTH, BK]; the last two are x where
                      there are none
    x1, after3, ..    their other planes: plane STRIDE_W * i + j of x is x[:, :, i::STRIDE_H, j::STRIDE_W], and x itself is
                      plane 0 then; None beyond STRIDE_H * STRIDE_W, and all of `before` and `after` where there are none
    weight0/1     [taps, O or 4 * O, C], blocks [1, BN0 or BN1, BK]; `weight1` is None without BN1
    y0/1          [N * T', H, P, W, P * O] with P of 2 if UPSAMPLE and else 1, blocks of one product; None: stored at `y`

    Tiles are `frames` = N * T' by rows by columns; out_channels = out_units * OUT_UNIT. ROWS: products of a group. TURNED:
    a tile's rows are columns of the picture, and H and W change places in all of the above but the order of taps.
    """
    FRAGMENTS: gl.constexpr = fragments(GROUPS * ROWS, KH, WIDTH, STRIDE_H)
    HEIGHT: gl.constexpr = M // WIDTH
    out_channels = out_units * OUT_UNIT
    dtype: gl.constexpr = x.dtype
    a_smem = gl.allocate_shared_memory(dtype, [STAGES * FRAGMENTS, 1, 1, HEIGHT, WIDTH, BK], x.layout)
    b0_smem = gl.allocate_shared_memory(dtype, [STAGES * KH, 1, BN0, BK], weight0.layout)
    b1_smem = b0_smem
    if BN1 > 0:
        b1_smem = gl.allocate_shared_memory(dtype, [STAGES * KH, 1, BN1, BK], weight1.layout)
    y0_smem = b0_smem
    if y0 is not None:
        y0_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, HEIGHT, 1, WIDTH, BN0], y0.layout)
    y1_smem = y0_smem
    if y1 is not None:
        y1_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, HEIGHT, 1, WIDTH, BN1], y1.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()  # the barriers are seen by TMA

    planes = (x, x1, x2, x3)
    planes_before = planes
    planes_after = planes
    if (before1 is not None) or (STRIDE_H * STRIDE_W == 1):
        planes_before = (before, before1, before2, before3)
    if (after1 is not None) or (STRIDE_H * STRIDE_W == 1):
        planes_after = (after, after1, after2, after3)
    gl.warp_specialize([
        (_multiply, (
            0, a_smem, b0_smem, b1_smem, full, empty, bias, residual, y, y0, y1, y0_smem, y1_smem,
            tiles, blocks_n, frames, t_out, t_in, before_frames, after_frames, h_out, w_out, out_channels, channels,
            kt, kw, stride_t, dilation_t, pad_t,
            KH, ROWS, WIDTH, BN0, BN1, BK, STAGES, UPSAMPLE, ACTIVATION, TURNED, STRIDE_H,
        )),
        (_multiply, (
            1, a_smem, b0_smem, b1_smem, full, empty, bias, residual, y, y0, y1, y0_smem, y1_smem,
            tiles, blocks_n, frames, t_out, t_in, before_frames, after_frames, h_out, w_out, out_channels, channels,
            kt, kw, stride_t, dilation_t, pad_t,
            KH, ROWS, WIDTH, BN0, BN1, BK, STAGES, UPSAMPLE, ACTIVATION, TURNED, STRIDE_H,
        )),
        (_load, (
            planes, planes_before, planes_after, weight0, weight1, a_smem, b0_smem, b1_smem, full, empty,
            tiles, blocks_n, frames, t_out, t_in, before_frames, after_frames, w_out, out_channels, channels,
            kt, kw, stride_t, dilation_t, dilation_w, pad_t, pad_h, pad_w,
            KH, ROWS, WIDTH, BN0, BN1, BK, STAGES, UPSAMPLE, TURNED, STRIDE_H, STRIDE_W,
        )),
    ], [4, 1], [REGISTERS, LOADER_REGISTERS])  # fmt: skip
