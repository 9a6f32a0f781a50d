"""`pvae::conv3d_unfold`: a 3-D convolution as one batched 2-D convolution over temporally unfolded channels.

    y[n, o, t] = conv2d(cat_dt(x[n, :, t * st + dt * d - front]), W),   W[o, (dt, c)] = w[o, c, dt]

The kt frames that an output frame reads are laid side by side as channels; frames outside the input are zeros. The sum over
(dt, c) is the same as the 3-D convolution's, in one accumulation, so only the order of summation can differ (measured: bf16
error equal to conv3d's). Source: SGLang-Diffusion's ROCm rewrite (sglang #34424), without its limits on groups, dilation
and padding.

The unfolded activation is kt times as large as the input. It is made in chunks of output frames, and of output rows where
one frame is too large, so that the op needs at most 1.5 times the memory of input and output plus 256 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXTRA_BYTES = 256 * 2**20
EXTRA_RATIO = 0.5


def unfold_weight(weight: Tensor, groups: int) -> Tensor:
    """[O, C/groups, kt, kh, kw] -> [O, kt*C/groups, kh, kw], time-major as the op expects."""
    out, channels, kt, kh, kw = weight.shape
    return weight.permute(0, 2, 1, 3, 4).reshape(out, kt * channels, kh, kw)


def out_sizes(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Output (T, H, W); `padding` is (front, back) for time, height and width."""
    return [
        (x.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(3)
    ]


def _strided_empty(x: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """The output [N, O, T, H, W]: frames in memory order, each channels-last or contiguous."""
    n, o, t, h, w = sizes
    if channels_last:
        return x.new_empty(n, t, h, w, o).permute(0, 4, 1, 2, 3)
    return x.new_empty(n, t, o, h, w).permute(0, 2, 1, 3, 4)


@torch.library.custom_op("pvae::conv3d_unfold", mutates_args=())
def conv3d_unfold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_time: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """x [N, C, T, H, W], weight [O, kernel_time*C/groups, kh, kw] (`unfold_weight`), bias [O] -> [N, O, T', H', W'].

    stride and dilation are (time, height, width), padding six widths, (front, back) each. The result's frames are
    contiguous in memory, each in channels-last order if `channels_last`.
    """
    kernel = (kernel_time, weight.shape[2], weight.shape[3])
    t_out, h_out, w_out = out_sizes(x, kernel, stride, padding, dilation)
    n = x.shape[0]
    y = _strided_empty(x, (n, weight.shape[0], t_out, h_out, w_out), channels_last)
    if y.numel() == 0:
        return y
    t_step, h_step = _chunks(x, y, kernel_time, h_out)
    whole = t_step >= t_out and h_step >= h_out
    for t0 in range(0, t_out, t_step):
        t1 = min(t0 + t_step, t_out)
        for h0 in range(0, h_out, h_step):
            h1 = min(h0 + h_step, h_out)
            unfolded, pad_h, pad_w = _unfold(
                x, kernel, stride, padding, dilation, groups, channels_last, (t0, t1, h0, h1)
            )
            part = torch.nn.functional.conv2d(
                unfolded, weight, bias, stride[1:], (pad_h, pad_w), dilation[1:], groups
            ).unflatten(0, (n, t1 - t0))
            del unfolded
            part = part.permute(0, 2, 1, 3, 4)
            if whole and part.stride() == y.stride():
                return part
            y[:, :, t0:t1, h0:h1] = part
            del part
    return y


def _chunks(x: Tensor, y: Tensor, kernel_time: int, h_out: int) -> tuple[int, int]:
    """How many output frames, and output rows of a frame, are unfolded at a time."""
    budget = EXTRA_RATIO * (x.numel() + y.numel()) * x.element_size() + EXTRA_BYTES
    frame = (kernel_time * x[:, :, 0].numel() + y[:, :, 0].numel()) * x.element_size() if x.shape[2] else 1
    frames = int(budget // max(frame, 1))
    if frames >= 1:
        return frames, h_out
    return 1, max(1, int(h_out * budget / frame) // 2)


def _unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    window: tuple[int, int, int, int],
) -> tuple[Tensor, int, int]:
    """The input of the 2-D convolution for output frames [t0, t1) and rows [h0, h1): [N*(t1-t0), kt*C, h, w].

    Returns it with the (height, width) padding that the 2-D convolution has to add: all of it where it is even on both
    sides and the rows are whole, else none, and the zeros are in the buffer.
    """
    t0, t1, h0, h1 = window
    n, c, t_in, h_in, w_in = x.shape
    front_t, _, front_h, back_h, front_w, back_w = padding
    rows = (h1 - h0 - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
    first_row = h0 * stride[1] - front_h
    pad_h = 0
    if front_h == back_h and h1 - h0 == out_sizes(x, kernel, stride, padding, dilation)[1]:
        pad_h, first_row, rows = front_h, 0, h_in
    pad_w = front_w if front_w == back_w else 0
    cols = w_in if pad_w or not (front_w or back_w) else w_in + front_w + back_w
    first_col = 0 if cols == w_in else -front_w
    sizes = (n, t1 - t0, rows, cols, groups, kernel[0], c // groups)
    if channels_last:
        buffer = x.new_empty(sizes)
    else:
        buffer = x.new_empty([sizes[i] for i in (0, 1, 4, 5, 6, 2, 3)]).permute(0, 1, 5, 6, 2, 3, 4)
    source = x.unflatten(1, (groups, c // groups)).permute(0, 3, 4, 5, 1, 2)  # [N, T, H, W, G, C/G]
    r0, c0 = max(0, -first_row), max(0, -first_col)
    r1, c1 = max(r0, min(rows, h_in - first_row)), max(c0, min(cols, w_in - first_col))
    if (r0, r1, c0, c1) != (0, rows, 0, cols):
        buffer.zero_()
    unfolded = buffer.flatten(4, 6).permute(0, 1, 4, 2, 3).flatten(0, 1)
    if channels_last:
        source, buffer = _as_wide_elements(source, buffer)
    for tap in range(kernel[0]):
        shift = tap * dilation[0] - front_t  # output frame t reads input frame t * stride + shift
        j0 = max(0, -((t0 * stride[0] + shift) // stride[0]))
        j1 = min(t1 - t0, -(-(t_in - shift - t0 * stride[0]) // stride[0]))
        j0, j1 = min(j0, t1 - t0), max(j1, 0)
        buffer[:, :j0, ..., tap, :] = 0
        buffer[:, max(j0, j1) :, ..., tap, :] = 0
        if j0 < j1 and r0 < r1 and c0 < c1:
            f0 = (t0 + j0) * stride[0] + shift
            frames = source[:, f0 : (t0 + j1 - 1) * stride[0] + shift + 1 : stride[0]]
            buffer[:, j0:j1, r0:r1, c0:c1, :, tap] = frames[
                :, :, first_row + r0 : first_row + r1, first_col + c0 : first_col + c1
            ]
    return unfolded, pad_h, pad_w


def _as_wide_elements(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as 16-byte elements, where every tensor allows it: ATen's copy moves one element a thread."""
    for t in tensors:
        per = 16 // t.element_size()
        steps = (t.shape[-1], t.storage_offset(), *t.stride()[:-1])
        if t.stride(-1) != 1 or any(n % per for n in steps):
            return tensors
    return tuple(t.view(torch.complex128) for t in tensors)


@conv3d_unfold.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_time: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    kernel = (kernel_time, weight.shape[2], weight.shape[3])
    sizes = out_sizes(x, kernel, stride, padding, dilation)
    return _strided_empty(x, (x.shape[0], weight.shape[0], *sizes), channels_last)


OP = torch.ops.pvae.conv3d_unfold.default


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The semantics: `conv3d` on the padded input, with the 3-D weight [O, C/groups, kt, kh, kw]."""
    tf, tb, hf, hb, wf, wb = padding
    padded = torch.nn.functional.pad(x, (wf, wb, hf, hb, tf, tb))
    return torch.nn.functional.conv3d(padded, weight, bias, tuple(stride), 0, tuple(dilation), groups)
