"""Launches `conv_taps`: what the kernel can take as it lies in memory, its descriptors, grid and constants."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps_config import Config, default_config

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DESCRIPTOR_STRIDE = 2**40  # bytes; a TMA descriptor's strides are below it


@functools.cache
def _kernel() -> Any:
    from pvae.kernels.conv_taps_kernel import conv_taps_kernel  # Triton is imported by the first launch only

    return conv_taps_kernel


@functools.cache
def _hopper_kernel() -> Any:
    from pvae.kernels.conv_taps_hopper import conv_taps_hopper

    return conv_taps_hopper


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _five(x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, T, H, W] -> the latter."""
    return x.unsqueeze(2) if x.dim() == 4 else x


def _dense_strides(x: Tensor) -> list[int]:
    """Strides of (n, t, h, w); those of dimensions of one entry as if they were dense."""
    _, c, t, h, w = x.shape
    dense = {0: t * h * w * c, 2: h * w * c, 3: w * c, 4: c}
    return [dense[d] if x.shape[d] == 1 else x.stride(d) for d in (0, 2, 3, 4)]


def _channels_innermost(x: Tensor) -> Tensor:
    """x [N, C, T, H, W] itself if a patch of it can be loaded, else a channels_last_3d copy."""
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s % unit == 0 and s > 0 for s in _dense_strides(x))
    if (x.stride(1) == 1 or x.shape[1] == 1) and (aligned or x.shape[1] % unit):
        return x
    return x.clone(memory_format=torch.channels_last_3d)


@dataclass(frozen=True)
class Source:
    """x and the frames before it, as the kernel reads them: `base` is the lower of the two addresses."""

    x: Tensor
    base: Tensor
    strides: list[int]  # of (n, t, h, w), elements
    which: int  # elements from the lower to the higher address
    before_frames: int
    before_first: bool


def _source(x: Tensor, before: Tensor | None) -> Source:
    x = _channels_innermost(x)
    if before is None:
        return Source(x, x, _dense_strides(x), 0, 0, False)
    before = _channels_innermost(before)
    mine, theirs = _dense_strides(x), _dense_strides(before)
    if x.shape[2] == 1:
        mine[1] = theirs[1]
    if before.shape[2] == 1:
        theirs[1] = mine[1]
    apart = before.data_ptr() - x.data_ptr()
    unit = 16 if x.shape[1] * x.element_size() % 16 == 0 else x.element_size()
    if x.shape[0] > 1 or mine[1:] != theirs[1:] or apart % unit or not 0 < abs(apart) < DESCRIPTOR_STRIDE:
        return _source(torch.cat([before, x], 2).contiguous(memory_format=torch.channels_last_3d), None)
    base = before if apart < 0 else x
    return Source(x, base, mine, abs(apart) // x.element_size(), before.shape[2], apart < 0)


def launch(
    x: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    upsample: bool,
    activation: str,
    config: Sequence[int],
    y: Tensor,
) -> None:
    """Write the convolution into `y`, dense in channels_last(_3d); see `conv_taps` for the rest."""
    flat = x.dim() == 4
    weight = _five(weight.contiguous(memory_format=FORMATS[weight.dim()]))
    if residual is not None:
        residual = residual.contiguous(memory_format=FORMATS[residual.dim()])
    ones, zeros = ([1], [0, 0]) if flat else ([], [])
    stride, dilation, padding = [*ones, *stride], [*ones, *dilation], [*zeros, *padding]
    source = _source(_five(x), None if before is None else _five(before))
    x, (out, channels, *kernel) = source.x, weight.shape
    n, _, t_in, h_in, w_in = x.shape
    t_out, h_out, w_out = _five(y).shape[2:]
    if upsample:
        out, h_out, w_out = out // 4, h_out // 2, w_out // 2
    cut = Config.of(config) if len(config) else default_config(channels, out, h_out, w_out, x.dtype)
    blocks = -(-h_out // cut.height) * -(-w_out // cut.width) * -(-out // (cut.columns0 + cut.columns1))
    grid = (n * t_out * blocks * (4 if upsample else 1),)
    if not grid[0]:
        return
    # fmt: off
    taps = (channels, *kernel)
    extras = (source.before_frames > 0, upsample, activation)
    tile = (cut.height, cut.width, cut.columns0, cut.columns1, cut.depth)
    frames = (int(source.before_first), source.before_frames, t_in)
    with torch.accelerator.device_index(x.device.index if x.device.type != "cpu" else None):
        if _by_descriptor(x, stride):
            _hopper_kernel()[grid](
                *_descriptors(source, weight, cut), bias, residual, y, *frames, t_out, h_out, w_out, out,
                *taps, stride[0], *dilation, *padding[::2], *extras, *tile, cut.stages, num_warps=4,
            )
        else:
            _kernel()[grid](
                source.base, weight, bias, residual, y, source.which, *source.strides, *frames, h_in, w_in,
                t_out, h_out, w_out, out, *taps, *stride, *dilation, *padding[::2], *extras,
                _precision(x.dtype), x.device.type == "cpu", *tile, num_warps=cut.warps, num_stages=cut.stages,
            )
    # fmt: on


def _precision(dtype: torch.dtype) -> str:
    tensor_cores = dtype == torch.float32 and torch.version.hip is None and torch.backends.cudnn.allow_tf32
    return "tf32" if tensor_cores else "ieee"


def _by_descriptor(x: Tensor, stride: Sequence[int]) -> bool:
    """Whether Hopper's kernel takes it: a descriptor's patch has no gaps, and rows of 16 bytes."""
    return _is_hopper(x.device) and stride[1:] == [1, 1] and x.shape[1] * x.element_size() % 16 == 0


def _descriptors(source: Source, weight: Tensor, cut: Config) -> tuple[Any, Any, Any]:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    x = source.x
    outer, frames = (2, max(source.before_frames, x.shape[2])) if source.before_frames else (x.shape[0], x.shape[2])
    steps = [source.which or source.strides[0], *source.strides[1:], 1]
    patch = [1, 1, cut.height, cut.width, cut.depth]
    sizes = [outer, frames, x.shape[3], x.shape[4], x.shape[1]]
    patches = TensorDescriptor(source.base, sizes, steps, patch, _shared_layout(tuple(patch), x.dtype))
    k = weight[0].numel()
    columns = [
        TensorDescriptor(
            weight, [weight.shape[0], k], [k, 1], [n, cut.depth], _shared_layout((n, cut.depth), x.dtype)
        ) if n else None
        for n in (cut.columns0, cut.columns1)
    ]  # fmt: skip
    return patches, *columns


@functools.cache
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), types[dtype])
