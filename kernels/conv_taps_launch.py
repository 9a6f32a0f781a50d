"""Launches `conv_taps`: what the kernels can take as it lies in memory, descriptors, grid and constants.

All that follows from shapes, strides and options is a plan, made once for each kind of call and looked up after that: a
decoder makes hundreds of calls of a few kinds, some of which take the device less time than Triton's own launch the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.kernels.channels_last import FORMATS
from pvae.kernels.conv_taps_config import POSITIONS, Config, Work, default_config, hopper_configs, is_hopper
from pvae.kernels.triton_launch import Launch, kernel_named

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TMA_TF32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
NO_PLANES: list[Tensor | None] = [None] * 9  # beside the first, of x and of the frames before and after it
DESCRIPTOR_STRIDE = 2**40  # bytes; a TMA descriptor's strides are below it


class Memory(NamedTuple):
    """How a tensor lies in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        """One that lies like this, without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Call(NamedTuple):
    """A call of the op but for the values: what a plan is made for. `tf32` is torch's setting, where it matters."""

    x: Memory
    before: Memory | None
    weight: Memory
    bias: Memory | None
    residual: Memory | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    upsample: bool
    activation: str
    config: tuple[int, ...]
    aligned: bool  # all tensors begin at multiples of 16 bytes
    tf32: bool
    after: Memory | None = None


class Descriptor:
    """What Triton's launcher reads of a `TensorDescriptor`, unchecked: the first launch has checked one like it.

    `round_f32_to_tf32`: the load rounds to nearest; else tensor cores cut fp32 off, at twice the error.
    """

    __slots__ = ("base", "round_f32_to_tf32", "shape", "strides")
    padding = "zero"

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], round_f32_to_tf32: bool) -> None:
        self.base, self.shape, self.strides, self.round_f32_to_tf32 = base, shape, strides, round_f32_to_tf32


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _five(x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, T, H, W] -> the latter."""
    return x.unsqueeze(2) if x.dim() == 4 else x


def _dense_strides(x: Tensor) -> list[int]:
    """Strides of (n, t, h, w); those of dimensions of one entry as if they were dense."""
    _, c, t, h, w = x.shape
    dense = {0: t * h * w * c, 2: h * w * c, 3: w * c, 4: c}
    return [dense[d] if x.shape[d] == 1 else x.stride(d) for d in (0, 2, 3, 4)]


def _is_loadable(x: Tensor) -> bool:
    """Whether a patch of x [N, C, T, H, W] can be loaded as it lies; its address aside."""
    unit = 16 // x.element_size()
    aligned = all(s % unit == 0 and 0 < s < DESCRIPTOR_STRIDE // x.element_size() for s in _dense_strides(x))
    return (x.stride(1) == 1 or x.shape[1] == 1) and (aligned or x.shape[1] % unit != 0)


def _channels_innermost(x: Tensor) -> Tensor:
    """x [N, C, T, H, W] itself if a patch of it can be loaded, else a channels_last_3d copy."""
    if _is_loadable(x) and (x.data_ptr() % 16 == 0 or x.shape[1] % (16 // x.element_size())):
        return x
    return x.clone(memory_format=torch.channels_last_3d)


def planes(x: Tensor, stride_h: int, stride_w: int) -> list[Tensor]:
    """Every `stride_h`-th row and `stride_w`-th column of x [..., H, W]: views, from each row and column to begin with."""
    return [x[..., i::stride_h, j::stride_w] for i in range(stride_h) for j in range(stride_w)]


@dataclass(frozen=True)
class Source:
    """x and the frames before it, as the Triton kernel reads them: `base` is the lower of the two addresses."""

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


@dataclass(frozen=True)
class Problem:
    """A call's sizes in three spatial dimensions. out, h_out, w_out: of one phase with upsample."""

    call: Call
    out: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, int, int]
    frames_out: int
    h_out: int
    w_out: int

    @classmethod
    def of(cls, call: Call, y_shape: Sequence[int]) -> Problem:
        flat = len(y_shape) == 4
        ones, zeros = (1,) * flat, (0, 0) * flat
        kt, kh, kw = ones + tuple(call.weight.shape[2:])
        enlarged = 2 if call.upsample else 1
        return cls(
            call,
            y_shape[1],
            (*ones, *call.stride),
            (*zeros, *call.padding),
            (*ones, *call.dilation),
            (kt, kh, kw),
            y_shape[2] if len(y_shape) == 5 else 1,
            y_shape[-2] // enlarged,
            y_shape[-1] // enlarged,
        )


class Operands(NamedTuple):
    """The op's tensors."""

    x: Tensor
    before: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    after: Tensor | None


class Plan:
    """Launches calls of one kind; y is dense in channels_last(_3d)."""

    def launch(self, operands: Operands, y: Tensor) -> None:
        raise NotImplementedError


class TritonPlan(Plan):
    """`conv_taps_kernel`, by Triton's own launch: where x lies beside `before` is part of the arguments."""

    def __init__(self, problem: Problem) -> None:
        call = problem.call
        x, channels = call.x, call.weight.shape[1]
        out, h_out, w_out = problem.out, problem.h_out, problem.w_out
        cut = Config.of(call.config) if call.config else default_config(channels, out, h_out, w_out, x.dtype)
        if cut.hopper:
            raise ValueError(f"conv_taps: {cut} is of Hopper's kernel, which does not take this call on {x.device}")
        blocks = -(-h_out // cut.height) * -(-w_out // cut.width) * -(-out // (cut.columns0 + cut.columns1))
        self.grid = (x.shape[0] * problem.frames_out * blocks * (4 if call.upsample else 1),)
        self.sizes = (*x.shape[-2:], problem.frames_out, h_out, w_out, out)
        tf32 = call.tf32 and x.device.type == "cuda" and torch.version.hip is None
        self.constants = (channels, *problem.kernel, *problem.stride, *problem.dilation, *problem.padding[::2])
        self.options = (call.upsample, call.activation, "tf32" if tf32 else "ieee", x.device.type == "cpu")
        self.tile = (cut.height, cut.width, cut.columns0, cut.columns1, cut.depth)
        self.warps, self.stages = cut.warps, cut.stages

    def launch(self, operands: Operands, y: Tensor) -> None:
        x, before, weight, bias, residual, after = operands
        if after is not None:
            x = torch.cat([x, after], 2)
        source = _source(_five(x), None if before is None else _five(before))
        weight = weight.contiguous(memory_format=FORMATS[weight.dim()])
        if bias is not None:
            bias = bias.contiguous()
        if residual is not None:
            residual = residual.contiguous(memory_format=FORMATS[residual.dim()])
        kernel_named("conv_taps_kernel.conv_taps_kernel")[self.grid](
            source.base, weight, bias, residual, y, source.which, *source.strides,
            int(source.before_first), source.before_frames, source.x.shape[2], *self.sizes,
            *self.constants, source.before_frames > 0, *self.options, *self.tile,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip


class HopperPlan(Plan):
    """`conv_taps_hopper`, by the launch of the compiled kernel but for the first time."""

    def __init__(self, problem: Problem, cut: Config) -> None:
        call = problem.call
        x, before, weight, bias, residual, after = (m and m.tensor() for m in (*call[:5], call.after))
        assert x is not None and weight is not None
        n, channels, out, size = x.shape[0], x.shape[1], problem.out, x.element_size()
        frames, upright = n * problem.frames_out, cut.upright()
        kt, *kernel = problem.kernel
        picture, pads, dilations = [problem.h_out, problem.w_out], list(problem.padding[2::2]), problem.dilation[1:]
        # Along the rows of a tile, then along the positions of a row.
        sides = (1, 0) if cut.turned else (0, 1)
        (kh, kw), (h_out, w_out), (pad_h, pad_w) = ([pair[i] for i in sides] for pair in (kernel, picture, pads))
        strides = problem.stride[1], problem.stride[2]
        if cut.turned and strides != (1, 1):
            raise ValueError(f"conv_taps: {cut} takes no strides: a product's positions must lie along the width")
        if dilations[sides[0]] != 1:
            raise ValueError(f"conv_taps: {cut} takes no dilation in {'width' if cut.turned else 'height'}")

        def is_dense(t: Tensor | None) -> bool:
            return t is None or t.is_contiguous(memory_format=FORMATS.get(t.dim(), torch.contiguous_format))

        self.has_before = before is not None and before.shape[2] > 0
        self.has_after = after is not None and after.shape[2] > 0
        # Of x, before, weight, bias, residual, after: which are copied first.
        self.copies = [
            t is not None and (not call.aligned or not (_is_loadable(_five(t)) if i in (0, 1, 5) else is_dense(t)))
            for i, t in enumerate((x, before, weight, bias, residual, after))
        ]

        def memory(t: Tensor, copied: bool) -> list[tuple[list[int], list[int]]]:
            """Of each plane."""
            t = _five(t)
            t = t.clone(memory_format=torch.channels_last_3d) if copied else t
            n, f, h, w = _dense_strides(t)
            return [
                (
                    turned([p.shape[d] for d in (0, 2, 3, 4, 1)], 2),
                    turned([n, f, strides[0] * h, strides[1] * w, 1], 2),
                )
                for p in planes(t, *strides)
            ]

        def turned(sizes: list[int], dim: int, other: int = 3) -> list[int]:
            if cut.turned:
                sizes[dim], sizes[other] = sizes[other], sizes[dim]
            return sizes

        height, width, pixels = POSITIONS // upright.width, upright.width, 2 if call.upsample else 1
        taps, c0, c1 = kt * kh * kw, cut.columns0, cut.columns1
        fragment = [1, 1, height, width, cut.depth]
        earlier = before if self.has_before and before is not None else x
        later = after if self.has_after and after is not None else x
        row = pixels * problem.w_out * out
        y_memory = (
            [frames, h_out, pixels, w_out, pixels * out],
            turned([pixels * problem.h_out * row, pixels * row, row, pixels * out, 1], 1),
        )
        weight_memory = [taps, weight.shape[0], channels], [channels, taps * channels, 1]
        # A block of columns would reach into the next pixel's, or a row of them is not of 16 bytes.
        self.stores = out * size % 16 != 0 or (call.upsample and out % (c0 + c1) != 0)
        self.strides = strides if strides != (1, 1) else None
        of_x = memory(x, self.copies[0])
        of_before = memory(earlier, self.copies[1]) if self.has_before else of_x[:1]
        of_after = memory(later, self.copies[5]) if self.has_after else of_x[:1]
        # In the kernel's order: shape, strides and block.
        self.descriptors = [
            (*of_x[0], fragment),
            (*of_before[0], fragment),
            (*of_after[0], fragment),
            (*weight_memory, [1, c0, cut.depth]),
            (*weight_memory, [1, c1, cut.depth]) if c1 else None,
            None if self.stores else (*y_memory, [1, height, 1, width, c0]),
            None if self.stores or not c1 else (*y_memory, [1, height, 1, width, c1]),
            *((*of[i], fragment) if i < len(of) else None for of in (of_x, of_before, of_after) for i in (1, 2, 3)),
        ]
        blocks_n = -(-out // (c0 + c1))
        tiles = frames * -(-h_out // upright.height) * -(-w_out // width) * blocks_n * (4 if call.upsample else 1)
        unit = math.gcd(out, 8)
        before_frames = earlier.shape[2] if self.has_before else 0
        after_frames = later.shape[2] if self.has_after else 0
        self.grid = (min(tiles, _processors(call.x.device)), 1, 1)
        self.integers = (
            tiles, blocks_n, frames, problem.frames_out, _five(x).shape[2], before_frames, after_frames,
            h_out, w_out, out // unit,
            channels, kt, kw, problem.stride[0], problem.dilation[0], dilations[sides[1]], problem.padding[0], pad_h, pad_w,
        )  # fmt: skip
        stages = cut.stages_that_fit(kh, size, strides[0])
        if stages < 2:
            raise ValueError(f"conv_taps: {cut} has no room for two stages of a kernel {kh} rows high: a lower one has")
        constants = {
            "KH": kh, "ROWS": cut.rows, "WIDTH": width, "BN0": c0, "BN1": c1, "BK": cut.depth, "STAGES": stages,
            "OUT_UNIT": unit, "UPSAMPLE": call.upsample, "ACTIVATION": call.activation, "TURNED": cut.turned,
            "STRIDE_H": strides[0], "STRIDE_W": strides[1],
        }  # fmt: skip
        # 168 registers, 12 warps of them, until the kernel gives each warp its own.
        self.run = Launch("conv_taps_hopper.conv_taps_hopper", self.grid, constants, {"num_warps": 4, "maxnreg": 168})
        self.dtype = x.dtype
        stored = (5, 6)
        self.tf32 = [x.dtype == torch.float32 and i not in stored for i in range(len(self.descriptors))]

    def _other_planes(self, *read: Tensor | None) -> list[Tensor | None]:
        """Planes beside the first, three of each tensor or None."""
        if self.strides is None:
            return NO_PLANES
        each = ([] if t is None else planes(t, *self.strides)[1:] for t in read)
        return [p for some in each for p in (*some, None, None, None)[:3]]

    def launch(self, operands: Operands, y: Tensor) -> None:
        if any(self.copies):
            operands = Operands._make(
                t.clone(memory_format=FORMATS.get(t.dim(), torch.contiguous_format)) if copy and t is not None else t
                for t, copy in zip(operands, self.copies, strict=True)
            )
        x, before, weight, bias, residual, after = operands
        read = (x, before if self.has_before else x, after if self.has_after else x)
        bases = (*read, weight, weight, y, y, *self._other_planes(x, before, after))
        store = y if self.stores else None
        if self.run.compiled is None:
            self._compile(bases, bias, residual, store)
        self.run.directly(
            *[d and Descriptor(base, d[0], d[1], tf32) for base, d, tf32 in zip(bases, self.descriptors, self.tf32)],  # noqa: B905
            bias, residual, store, *self.integers,
        )  # fmt: skip

    def _compile(self, bases: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        checked = [
            d and TensorDescriptor(base, *d, _shared_layout(tuple(d[2]), self.dtype))
            for base, d in zip(bases, self.descriptors, strict=True)
        ]
        self.run.compiled = compiled = self.run.compile(*checked, *tensors, *self.integers)
        # Triton 3.7 asks the descriptor whether to round, 3.6 nobody.
        rounded = [tf32 for d, tf32 in zip(self.descriptors, self.tf32, strict=True) if d is not None]
        for described, tf32 in zip(compiled.metadata.tensordesc_meta, rounded, strict=True):
            if tf32:
                described["elem_type"] = TMA_TF32


def make_plan(call: Call, y_shape: Sequence[int]) -> Plan:
    """The plan for a call with a result of this shape that is not empty."""
    problem = Problem.of(call, y_shape)
    device, size = call.x.device, call.x.dtype.itemsize
    given = Config.of(call.config) if call.config else None
    takes = (
        is_hopper(device)
        and all(s == 1 or (s == 2 <= size) for s, size in zip(problem.stride[1:], call.x.shape[-2:], strict=True))
        and 1 in problem.dilation[1:]
        and call.x.shape[1] * size % 16 == 0
        and math.prod(call.x.shape) > 0
    )
    if not takes or (given is not None and not given.hopper):
        return TritonPlan(problem)
    if given is None:
        phases = 4 if call.upsample else 1
        sizes = (call.x.shape[0] * problem.frames_out * phases, problem.h_out, problem.w_out)
        sides = (problem.dilation[1], problem.dilation[2]), (problem.stride[1], problem.stride[2])
        work = Work(call.x.shape[1], problem.out, problem.kernel, *sizes, call.x.dtype, _processors(device), *sides)
        fitting = hopper_configs(work)
        if not fitting:  # a kernel too high for shared memory
            return TritonPlan(problem)
        given = fitting[0]
    return HopperPlan(problem, given)


@functools.cache
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(block), types[dtype])
