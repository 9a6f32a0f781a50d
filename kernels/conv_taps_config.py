"""How `conv_taps` is cut into tiles: the choice by rule, and what a tuning run tries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Launch parameters of `conv_taps_kernel`.

    height, width     output positions of a program (powers of two)
    columns0/1        output channels of a program, in two powers of two; columns1 may be 0
    depth             channels a step (a power of two)
    warps, stages     of a program; loads in flight
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
        powers = (config.height, config.width, config.columns0, config.columns1 or 1, config.depth, config.warps)
        if any(n < 1 or n & (n - 1) for n in powers) or config.depth < 16 or config.columns0 < 16:
            raise ValueError(f"conv_taps: {config} is not of powers of two with depth and columns0 of at least 16")
        if config.columns1 and config.columns1 < 16:
            raise ValueError(f"conv_taps: {config} has columns1 below 16")
        return config

    def numbers(self) -> list[int]:
        """As the op's `config` argument."""
        return list(astuple(self))


def _columns(out_channels: int) -> tuple[int, int]:
    """The two blocks of columns that waste fewest: 96 = 64 + 32, 192 = 128 + 64, 384 = 2 * 192, 256 = 2 * 128."""
    choices = [(128, 64), (128, 0), (64, 32), (64, 0), (32, 0), (16, 0)]

    def cost(pair: tuple[int, int]) -> tuple[float, int]:
        total = sum(pair)
        blocks = -(-out_channels // total)
        # A narrow block does less with each patch that it loads.
        return blocks * total * (1.0 + 24.0 / total), -total

    return min(choices, key=cost)


def default_config(channels: int, out_channels: int, height: int, width: int, dtype: torch.dtype) -> Config:
    """By what was measured on H200 (docs/measurements.md): 8 x 16 positions by up to 192 columns, 16 x 16 by up to 96."""
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
    return Config(block_h, block_w, *columns, depth, 4, stages)


def candidate_configs(
    channels: int, out_channels: int, height: int, width: int, dtype: torch.dtype
) -> Iterator[Config]:
    """What `pvae tune` tries, the rule's choice first; every one fits in 227 KiB of shared memory."""
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
