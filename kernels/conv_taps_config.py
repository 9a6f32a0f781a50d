"""How `conv_taps` is cut into tiles: the choice by rule, and what a tuning run tries.

Two kernels take the same seven numbers. `warps` tells them apart: Hopper's has nine, two groups of four and one that loads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import torch

HOPPER_WARPS = 9
POSITIONS = 64  # of one tensor core product of Hopper's kernel
WIDTHS = (64, 32, 16)  # of a product in Hopper's kernel
SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor
COLUMNS = ((128, 64), (128, 0), (64, 32), (64, 0), (32, 0), (16, 0))


@dataclass(frozen=True)
class Config:
    """Launch parameters of `conv_taps_kernel`, or with 9 warps of `conv_taps_hopper`.

    height, width     output positions of a tile. Powers of two; Hopper: a width of 16 to 64, and as height a multiple of
                      two products of 64 positions, one for each of the two groups of warps; or, turned, a height of 16
                      to 64 and such a multiple as width
    columns0/1        output channels of a tile, in two powers of two; columns1 may be 0
    depth             channels a step (a power of two)
    warps, stages     of a program; loads in flight (Hopper: at most, as shared memory allows)
    """

    height: int
    width: int
    columns0: int
    columns1: int
    depth: int
    warps: int
    stages: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Config:
        """From the op's `config` argument. Raises ValueError for what no kernel can be cut to."""
        if len(numbers) != 7:
            raise ValueError(f"conv_taps: config has 7 numbers ({', '.join(cls.__annotations__)}), not {list(numbers)}")
        config = cls(*numbers)
        upright = config.upright()
        powers = [upright.width, config.columns0, config.columns1 or 1, config.depth]
        if not config.hopper:
            powers += [config.height, config.warps]
        if any(n < 1 or n & (n - 1) for n in powers) or config.depth < 16 or config.columns0 < 16:
            raise ValueError(f"conv_taps: {config} is not of powers of two with depth and columns0 of at least 16")
        if config.columns1 and config.columns1 < 16:
            raise ValueError(f"conv_taps: {config} has columns1 below 16")
        if config.hopper and not (upright.width in WIDTHS and config.rows >= 1 and config.stages >= 2):
            raise ValueError(f"conv_taps: {config} is none of Hopper's: a side of 16, 32 or 64, and 2 stages or more")
        if config.hopper and config.height * config.width != 2 * POSITIONS * config.rows:
            raise ValueError(f"conv_taps: a side of {config} is no multiple of {2 * POSITIONS // upright.width}")
        return config

    @property
    def hopper(self) -> bool:
        """Whether this is one of `conv_taps_hopper`."""
        return self.warps == HOPPER_WARPS

    @property
    def turned(self) -> bool:
        """Whether a product's positions lie along the picture's height (Hopper)."""
        return self.hopper and self.width not in WIDTHS

    def upright(self) -> Config:
        """With the side along which a product's positions lie as width."""
        return replace(self, height=self.width, width=self.height) if self.turned else self

    @property
    def rows(self) -> int:
        """Products of each of the two groups of warps (Hopper)."""
        return self.height * self.width // (2 * POSITIONS)

    def fragments(self, kernel_h: int, stride_h: int = 1) -> int:
        """Blocks of 64 positions that a step of Hopper's kernel loads; `kernel_h` taps lie across its rows."""
        return min(kernel_h, stride_h * POSITIONS // self.upright().width) * (2 * self.rows - 1) + kernel_h

    def stages_that_fit(self, kernel_h: int, itemsize: int, stride_h: int = 1) -> int:
        """How many of `stages` Hopper's shared memory holds, beside the tile of results."""
        columns = self.columns0 + self.columns1
        stage = (self.fragments(kernel_h, stride_h) * POSITIONS + kernel_h * columns) * self.depth * itemsize
        return min(self.stages, (SHARED_BYTES - 1024 - 2 * POSITIONS * columns * itemsize) // stage)

    def numbers(self) -> list[int]:
        """As the op's `config` argument."""
        return list(astuple(self))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@dataclass(frozen=True)
class Work:
    """What the choice of a Hopper config looks at.

    frames                all that are written, four times as many if enlarged
    dilations, strides    in height and in width
    """

    channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    processors: int = 132
    dilations: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)

    def turned(self) -> Work:
        """With height and width in each other's place."""
        kt, kh, kw = self.kernel
        return replace(
            self,
            kernel=(kt, kw, kh),
            height=self.width,
            width=self.height,
            dilations=(self.dilations[1], self.dilations[0]),
            strides=(self.strides[1], self.strides[0]),
        )


def hopper_clocks(work: Work, config: Config) -> float:
    """Clocks of a convolution by what its tiles ask of tensor cores, shared memory and L2, and by whole waves of them.

    A model: within 10 % of what was measured on H200 with 96 to 384 channels (docs/measurements.md).
    """
    if config.turned:
        work, config = work.turned(), config.upright()
    kt, kh, kw = work.kernel
    size, columns, products = work.dtype.itemsize, config.columns0 + config.columns1, 2 * config.rows
    bytes_a = config.fragments(kh, work.strides[0]) * POSITIONS * config.depth * size
    bytes_b = kh * columns * config.depth * size
    ks = config.depth * size / 32  # products in depth
    in_registers = config.rows * columns // 2 <= 144 and size == 2
    reads_a = (
        bytes_a * (1 + (kh - 1) / products)
        if in_registers
        else products * kh * 2048 * ks * (2 if config.columns1 else 1)
    )
    reads_b = products * bytes_b
    math = products * kh * ks * columns / 2
    shared = (bytes_a + bytes_b + reads_a + reads_b) / 128
    l2 = (bytes_a + bytes_b) / 34
    few = config.stages_that_fit(kh, size, work.strides[0]) == 2
    # With a stride a step loads more for the same products, and waits longer for it.
    waits = 1.1 if work.strides[0] == 1 else 1.35
    slower = (waits if few else 1.0) * (waits if config.depth * size < 64 else 1.0)
    steps = kt * kw * -(-work.channels // config.depth)
    tile = steps * (max(math, shared, l2) * slower + 60) + 1500 + 600 * config.rows
    rows, across = -(-work.height // config.height), -(-work.width // config.width)
    tiles = work.frames * rows * across * -(-work.out_channels // columns)
    return -(-tiles // work.processors) * tile


def hopper_configs(work: Work) -> list[Config]:
    """Those that fit, the fastest by `hopper_clocks` first. A kernel is dense along the side that its taps share."""
    every = list(_upright_configs(work)) if work.dilations[0] == 1 else []
    if work.dilations[1] == 1 and work.strides == (1, 1):
        turned = (replace(c, height=c.width, width=c.height) for c in _upright_configs(work.turned()))
        every += [config for config in turned if config.turned]  # 32 by 16 is upright
    return sorted(every, key=lambda config: hopper_clocks(work, config))


def _upright_configs(work: Work) -> Iterator[Config]:
    size = work.dtype.itemsize
    depths = [d // (size // 2) for d in (16, 32, 64)]
    # More channels a step than there are, or columns than are written, are zeros.
    depths = [d for d in depths if d >= 16 and (d < 2 * work.channels or d == 16)]
    columns = [c for c in COLUMNS if sum(c) < 2 * work.out_channels or sum(c) == 16]
    for width, rows, (c0, c1), depth in itertools.product(WIDTHS, range(1, 7), columns, depths):
        config = Config(2 * rows * POSITIONS // width, width, c0, c1, depth, HOPPER_WARPS, 4)
        if rows * (c0 + c1) // 2 <= 192 and config.stages_that_fit(work.kernel[1], size, work.strides[0]) >= 2:
            yield config


def _columns(out_channels: int) -> tuple[int, int]:
    """The two blocks of columns that waste fewest: 96 = 64 + 32, 192 = 128 + 64, 384 = 2 * 192, 256 = 2 * 128."""

    def cost(pair: tuple[int, int]) -> tuple[float, int]:
        total = sum(pair)
        blocks = -(-out_channels // total)
        # A narrow block does less with each patch that it loads.
        return blocks * total * (1.0 + 24.0 / total), -total

    return min(COLUMNS, key=cost)


def default_config(channels: int, out_channels: int, height: int, width: int, dtype: torch.dtype) -> Config:
    """Of `conv_taps_kernel`: 8 x 16 positions by up to 192 columns, 16 x 16 by up to 96."""
    columns = _columns(out_channels)
    wide = sum(columns) > 96
    depth = 64 if channels % 64 == 0 or channels >= 320 else 32 if channels > 16 else 16
    if dtype == torch.float32:
        depth = min(depth, 32)
    rows = 8 if wide else 16
    block_h, block_w = rows, 16
    while block_h > 1 and block_h // 2 >= height:  # a picture lower than the block
        block_h, block_w = block_h // 2, block_w * 2
    stages = 3 if depth * (2 if dtype != torch.float32 else 4) > 64 else 4
    if torch.version.hip is not None:
        stages = 2  # more do not fit in the 64 KiB of an MI300's compute unit
    return Config(block_h, block_w, *columns, depth, 4, stages)


def candidate_configs(
    channels: int, out_channels: int, height: int, width: int, dtype: torch.dtype
) -> Iterator[Config]:
    """What `pvae tune` tries, the rule's choice first; every one fits in 227 KiB of shared memory.

    On Hopper those of its kernel first, as for one frame of a 3x3 kernel, if it takes these channels.
    """
    if torch.cuda.is_available() and is_hopper(torch.device("cuda")) and channels * dtype.itemsize % 16 == 0:
        yield from hopper_configs(Work(channels, out_channels, (1, 3, 3), 1, height, width, dtype))[:8]
    first = default_config(channels, out_channels, height, width, dtype)
    seen = set[Config]()
    columns = {(first.columns0, first.columns1), (128, 0), (64, 0)} | ({(128, 64)} if out_channels > 128 else set())
    patches = [(first.height, first.width), (8, 16), (16, 8), (16, 16), (4, 32), (8, 32), (8, 8)]
    depths = {first.depth, 32, 64}
    for config in (
        first,
        *(
            Config(h, w, c0, c1, depth, warps, stages)
            for h, w in patches
            for c0, c1 in sorted(columns, reverse=True)
            for depth in sorted(depths)
            for warps in (4, 8)
            for stages in (3, 4)
        ),
    ):
        rows, total = config.height * config.width, config.columns0 + config.columns1
        shared = config.stages * (rows + total) * config.depth * dtype.itemsize
        registers = rows * total // (32 * config.warps)
        if config in seen or shared > 220 * 1024 or not 32 <= registers <= 200 or config.depth > max(channels, 16):
            continue
        if rows // 64 < config.warps // 4 or (config.height > 2 * height and config.height > 1):
            continue
        seen.add(config)
        yield config
