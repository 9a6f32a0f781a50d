"""The Triton kernel of the norm family: h = residual + gate * x, y = (norm(h) * weight + bias) * (k + scale) + shift.

One program normalises ROWS rows at a time, TILES times over. A row is read once, held in registers as pieces of BLOCK
channels (5120 channels are five pieces of 1024, not a block of 8192), and written once. The statistics take two passes
over those registers, mean and then centred variance, in fp32. All loads of a tile are issued before its first store,
because the compiler may not move a load above a store.

What is absent is None and costs nothing. Where there are two sets (`scale`, `scale1`), `select` chooses by mask or by
value and never by pointer: a `tl.where` of pointers asserts on gfx950.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment
# (Triton's language: what these functions take and return are its tensors, tuples and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides: compiled once for all values (ALIGN says what divides a stride), which also makes a launch cheaper.
INTEGERS = (
    "rows", "group", "x_batch", "x_row", "residual_batch", "residual_row", "gate_batch", "gate_row",
    "scale_batch", "scale_row", "shift_batch", "shift_row", "select_batch", "select_row",
)  # fmt: skip


@triton.jit
def _at(pointer, batch, row, batch_stride, row_stride, group, KIND: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of an operand begin: one pointer, or [ROWS, 1] of them. Strides count ALIGN elements."""
    start = pointer + batch * batch_stride * ALIGN
    if KIND == "row":
        start += row.to(tl.int64) * row_stride * ALIGN
    elif KIND == "frame":
        start += (row // group).to(tl.int64) * row_stride * ALIGN
    elif KIND == "cycle":
        start += (row % group).to(tl.int64) * row_stride * ALIGN
    return start


@triton.jit
def _load(start, wanted, C: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr):
    """The pieces of the rows that begin at `start`; rows that are not `wanted` ([ROWS, 1] or [1, 1]) are 0."""
    pieces = ()
    for i in tl.static_range((C + BLOCK - 1) // BLOCK):
        columns = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = wanted & (columns < C) if (i + 1) * BLOCK > C else wanted
        pieces += (tl.load(start + columns, mask=mask, other=0.0, eviction_policy=EVICT),)
    return pieces


@triton.jit
def _store(start, i: tl.constexpr, value, wanted, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = i * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = wanted & (columns < C) if (i + 1) * BLOCK > C else wanted
    tl.store(start + columns, value.to(start.dtype.element_ty), mask=mask)


@triton.jit
def _modulation(
    first, second, batch, row, batch_stride, row_stride, group, inside, chosen,
    KIND: tl.constexpr, EVICT: tl.constexpr, ALIGN: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces of an operand and of its twin (the same once more where it has none).

    With a twin and `chosen` ([ROWS, 1], or None: not known yet), only the chosen one of the two is read.
    """
    POLICY: tl.constexpr = EVICT if KIND == "row" else "evict_last"
    wanted = tl.full([1, 1], 1, tl.int1) if KIND == "batch" else inside
    start = _at(first, batch, row, batch_stride, row_stride, group, KIND, ALIGN)
    if second is None:
        pieces = _load(start, wanted, C, BLOCK, POLICY)
        twins = pieces
    else:
        start1 = _at(second, batch, row, batch_stride, row_stride, group, KIND, ALIGN)
        if chosen is None:
            pieces = _load(start, wanted, C, BLOCK, POLICY)
            twins = _load(start1, wanted, C, BLOCK, POLICY)
        else:
            pieces = _load(start + row * 0, inside & (chosen == 0), C, BLOCK, POLICY)
            twins = _load(start1 + row * 0, inside & chosen, C, BLOCK, POLICY)
    return pieces, twins


@triton.jit
def _select(first, second, chosen):
    value = first
    if chosen is not None:
        value = tl.where(chosen, second, first)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=INTEGERS)
def norm_kernel(
    x,
    residual,
    gate,
    gate1,
    weight,
    bias,
    scale,
    scale1,
    shift,
    shift1,
    select,
    h,
    y,
    rows,
    group,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    gate_batch,
    gate_row,
    scale_batch,
    scale_row,
    shift_batch,
    shift_row,
    select_batch,
    select_row,
    eps,
    scale_constant,
    C: tl.constexpr,
    NORM: tl.constexpr,  # "layer", "rms" or "none"
    COMPENSATE: tl.constexpr,  # take the mean's own rounding out again
    X: tl.constexpr,  # the kinds of the operands (norm_layout)
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    SELECT: tl.constexpr,
    ALIGN: tl.constexpr,  # elements in a unit of stride: what the compiler may take for granted when it vectorises
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    HOIST: tl.constexpr,  # hold what all rows of a batch entry share in registers over the tiles
    EVICT: tl.constexpr,  # the cache policy of what is read once
):
    PIECES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    HOIST_GATE: tl.constexpr = HOIST and GATE == "batch"
    HOIST_SCALE: tl.constexpr = HOIST and SCALE == "batch"
    HOIST_SHIFT: tl.constexpr = HOIST and SHIFT == "batch"
    programs = tl.cdiv(rows, ROWS * TILES)  # a batch entry
    batch = (tl.program_id(0) // programs).to(tl.int64)
    lane = tl.arange(0, ROWS)[:, None] if ROWS > 1 else 0  # one row is a scalar: its select is then loaded once
    first_row = (tl.program_id(0) % programs) * (ROWS * TILES) + lane
    every = tl.full([1, 1], 1, tl.int1)

    if HOIST and weight is not None:
        weights = _load(weight, every, C, BLOCK, "evict_last")
    if HOIST and bias is not None:
        biases = _load(bias, every, C, BLOCK, "evict_last")
    if HOIST_GATE and gate is not None:
        gates, gates1 = _modulation(
            gate, gate1, batch, first_row, gate_batch, gate_row, group, every, None, GATE, EVICT, ALIGN, C, BLOCK
        )
    if HOIST_SCALE and scale is not None:
        scales, scales1 = _modulation(
            scale, scale1, batch, first_row, scale_batch, scale_row, group, every, None, SCALE, EVICT, ALIGN, C, BLOCK
        )
    if HOIST_SHIFT and shift is not None:
        shifts, shifts1 = _modulation(
            shift, shift1, batch, first_row, shift_batch, shift_row, group, every, None, SHIFT, EVICT, ALIGN, C, BLOCK
        )

    for tile in tl.range(0, TILES, num_stages=STAGES):
        row = first_row + tile * ROWS
        inside = row < rows
        chosen = None
        if select is not None:
            chosen = (
                tl.load(_at(select, batch, row, select_batch, select_row, group, SELECT, 1) + row * 0, mask=inside) != 0
            )
        values = _load(_at(x, batch, row, x_batch, x_row, group, X, ALIGN), inside, C, BLOCK, EVICT)
        if residual is not None:
            start = _at(residual, batch, row, residual_batch, residual_row, group, RESIDUAL, ALIGN)
            residuals = _load(start, inside, C, BLOCK, EVICT)
        if gate is not None and not HOIST_GATE:
            gates, gates1 = _modulation(
                gate, gate1, batch, row, gate_batch, gate_row, group, inside, chosen, GATE, EVICT, ALIGN, C, BLOCK
            )
        if scale is not None and not HOIST_SCALE:
            scales, scales1 = _modulation(
                scale, scale1, batch, row, scale_batch, scale_row, group, inside, chosen, SCALE, EVICT, ALIGN, C, BLOCK
            )
        if shift is not None and not HOIST_SHIFT:
            shifts, shifts1 = _modulation(
                shift, shift1, batch, row, shift_batch, shift_row, group, inside, chosen, SHIFT, EVICT, ALIGN, C, BLOCK
            )
        if weight is not None and not HOIST:
            weights = _load(weight, every, C, BLOCK, "evict_last")
        if bias is not None and not HOIST:
            biases = _load(bias, every, C, BLOCK, "evict_last")

        out_row = (batch * rows + row) * C
        hidden = ()
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for i in tl.static_range(PIECES):
            value = values[i].to(tl.float32)
            if gate is not None:
                value *= _select(gates[i], gates1[i], chosen if gate1 is not None else None)
            if residual is not None:
                value += residuals[i].to(tl.float32)
            if h is not None:
                _store(h + out_row, i, value, inside, C, BLOCK)
            total += value * value if NORM == "rms" else value
            hidden += (value,)

        if NORM != "none":
            mean = tl.sum(total, 1, keep_dims=True) / C
            if NORM == "rms":
                inverse = tl.rsqrt(mean + eps)
            else:
                squares = tl.zeros([ROWS, BLOCK], tl.float32)
                drift = tl.zeros([ROWS, BLOCK], tl.float32)
                for i in tl.static_range(PIECES):
                    centred = hidden[i] - mean
                    if (i + 1) * BLOCK > C:
                        centred = tl.where(i * BLOCK + tl.arange(0, BLOCK)[None, :] < C, centred, 0.0)
                    squares += centred * centred
                    drift += centred
                variance = tl.sum(squares, 1, keep_dims=True) / C
                if COMPENSATE:
                    off = tl.sum(drift, 1, keep_dims=True) / C
                    variance -= off * off
                inverse = tl.rsqrt(variance + eps)
            for i in tl.static_range(PIECES):
                value = hidden[i]
                if NORM == "layer":
                    value -= mean
                    if COMPENSATE:
                        value -= off
                value *= inverse
                if weight is not None:
                    value *= weights[i].to(tl.float32)
                if bias is not None:
                    value += biases[i].to(tl.float32)
                if scale is not None:
                    value *= scale_constant + _select(scales[i], scales1[i], chosen if scale1 is not None else None)
                if shift is not None:
                    value += _select(shifts[i], shifts1[i], chosen if shift1 is not None else None)
                _store(y + out_row, i, value, inside, C, BLOCK)
