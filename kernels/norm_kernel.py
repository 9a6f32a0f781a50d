"""The Triton kernel of the norm family: h = residual + gate * x, y = (norm(h) * weight + bias) * (k + scale) + shift.

One program normalises ROWS rows. A row is read once, held in registers as pieces of BLOCK channels (5120 channels are
five pieces of 1024, not a block of 8192), and written once. The statistics take two passes over those registers, mean
and then centred variance, in fp32.

What is absent is None and costs nothing, not even a kernel argument. Of two sets (`scale`, `scale1`) a row loads only
the one that `select` names: the distance between the two is added to the address as a number, because a `tl.where` of
pointers asserts on gfx950.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment
# (Triton's language: what these functions take and return are its tensors, tuples and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl

# Sizes and strides: compiled once for all values (ALIGN says what divides a stride), which also makes a launch cheaper.
INTEGERS = (
    "batches", "rows", "group", "x_batch", "x_row", "residual_batch", "residual_row", "gate_batch", "gate_row",
    "scale_batch", "scale_row", "shift_batch", "shift_row", "select_batch", "select_row",
)  # fmt: skip


@triton.jit
def _at(pointer, batch, row, batch_stride, row_stride, group, KIND: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of an operand begin: one pointer, or [ROWS, 1] of them. Strides count ALIGN elements."""
    start = pointer
    if batch_stride is not None:
        start += batch * batch_stride * ALIGN
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
    first, second, chosen, batch, row, batch_stride, row_stride, group, inside,
    KIND: tl.constexpr, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces of an operand, of its twin `second` where there is one and `chosen` (0 or 1) says so."""
    pieces = ()
    if first is not None:
        start = _at(first, batch, row, batch_stride, row_stride, group, KIND, ALIGN)
        wanted = inside
        if second is not None:
            SIZE: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
            UNIT: tl.constexpr = 16 // SIZE if ALIGNED else 1  # the compiler sees that UNIT divides the distance
            distance = (second.to(tl.int64) - first.to(tl.int64)) // (UNIT * SIZE)
            start += chosen * distance * UNIT
        elif KIND == "batch":
            wanted = tl.full([1, 1], 1, tl.int1)
        pieces = _load(start, wanted, C, BLOCK, "" if KIND == "row" else "evict_last")
    return pieces


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
    batches,
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
    ALIGNED: tl.constexpr,  # every tensor begins at a multiple of 16 bytes
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,  # load what the norm's result is multiplied with before the norm, at the price of registers
):
    PIECES: tl.constexpr = (C + BLOCK - 1) // BLOCK
    every = tl.full([1, 1], 1, tl.int1)
    row = tl.program_id(0)
    inside = every
    if ROWS > 1:
        row = row * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < rows
    batch = 0
    out_row = row.to(tl.int64) * C
    if x_batch is not None:
        batch = tl.program_id(1).to(tl.int64)
        if batches is not None:  # more than a grid's second dimension takes: those beyond the last do the last again
            batch = tl.minimum(batch + tl.program_id(2).to(tl.int64) * tl.num_programs(1), batches - 1)
        out_row += batch * rows * C

    values = _load(_at(x, batch, row, x_batch, x_row, group, X, ALIGN), inside, C, BLOCK, "")
    if residual is not None:
        start = _at(residual, batch, row, residual_batch, residual_row, group, RESIDUAL, ALIGN)
        residuals = _load(start, inside, C, BLOCK, "")
    chosen = None
    if select is not None:
        start = _at(select, batch, row, select_batch, select_row, group, SELECT, 1)
        if ROWS > 1:
            start += tl.zeros([ROWS, 1], tl.int32)
            chosen = (tl.load(start, mask=inside, other=0) != 0).to(tl.int64)
        else:
            chosen = (tl.load(start) != 0).to(tl.int64)
    gates = _modulation(
        gate, gate1, chosen, batch, row, gate_batch, gate_row, group, inside, GATE, ALIGN, ALIGNED, C, BLOCK
    )
    if EARLY:
        scales = _modulation(
            scale, scale1, chosen, batch, row, scale_batch, scale_row, group, inside,
            SCALE, ALIGN, ALIGNED, C, BLOCK,
        )  # fmt: skip
        shifts = _modulation(
            shift, shift1, chosen, batch, row, shift_batch, shift_row, group, inside,
            SHIFT, ALIGN, ALIGNED, C, BLOCK,
        )  # fmt: skip
        if weight is not None:
            weights = _load(weight, every, C, BLOCK, "evict_last")
        if bias is not None:
            biases = _load(bias, every, C, BLOCK, "evict_last")

    hidden = ()
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(PIECES):
        value = values[i].to(tl.float32)
        if gate is not None:
            value *= gates[i].to(tl.float32)
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
        if not EARLY:
            scales = _modulation(
                scale, scale1, chosen, batch, row, scale_batch, scale_row, group, inside,
                SCALE, ALIGN, ALIGNED, C, BLOCK,
            )  # fmt: skip
            shifts = _modulation(
                shift, shift1, chosen, batch, row, shift_batch, shift_row, group, inside,
                SHIFT, ALIGN, ALIGNED, C, BLOCK,
            )  # fmt: skip
            if weight is not None:
                weights = _load(weight, every, C, BLOCK, "evict_last")
            if bias is not None:
                biases = _load(bias, every, C, BLOCK, "evict_last")
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
                value *= scale_constant + scales[i].to(tl.float32)
            if shift is not None:
                value += shifts[i].to(tl.float32)
            _store(y + out_row, i, value, inside, C, BLOCK)
