"""How the channel norm kernels are cut up, by rule."""

from __future__ import annotations

from dataclasses import dataclass

from pvae.kernels.norm_config import next_power_of_2

MAX_CHANNELS = 8192  # a position's channels are held in registers
MAX_BLOCK = 1024
WHOLE_GROUP = 1 << 16  # elements: a group of so many is normalised from one program's statistics
MOMENT_PROGRAMS = 2048  # a few for each multiprocessor of a large GPU, so that none waits long for the last
FULL = 2112  # programs that fill a large GPU: 132 multiprocessors, 16 each


@dataclass(frozen=True)
class Config:
    """Launch parameters.

    warps   warps a program
    block   channels a piece (a power of two)
    rows    positions in a tile (a power of two)
    tiles   tiles a program, one after the other: what is the same for all positions is loaded once for them
    """

    warps: int
    block: int
    rows: int
    tiles: int = 1


def piece(channels: int, largest: int) -> int:
    """Channels in a piece: a power of two that divides `channels`, unless that is narrower than a 64-byte load of bf16."""
    divisor = min(channels & -channels, largest)
    return divisor if divisor >= 32 else min(next_power_of_2(channels), largest)


def norm_config(channels: int, positions: int, frames: int, lanes: int) -> Config:
    """For channel_norm_kernel: about 4096 elements a tile, 32 a thread; four tiles a program where enough remain."""
    warps, block = 128 // lanes, piece(channels, 8 * lanes)  # a piece is one load of a warp, of bf16
    padded = -(-channels // block) * block
    while warps * lanes * 32 < padded and warps < 512 // lanes:
        warps *= 2
    rows = 1
    while rows * 2 * padded <= warps * lanes * 32 and rows < next_power_of_2(positions):
        rows *= 2
    tiles = 4
    while tiles > 1 and frames * -(-positions // (rows * tiles)) < FULL:
        tiles //= 2
    return Config(warps, block, rows, tiles)


def whole_group(positions: int, width: int) -> bool:
    """Whether a group, `width` channels, is small enough for one program."""
    return width <= MAX_BLOCK and positions * width <= WHOLE_GROUP


def group_config(positions: int, width: int, lanes: int) -> Config:
    """For moments_kernel with a whole group a program."""
    block = next_power_of_2(width)
    rows = 1
    while rows * 2 * block <= 4096 and rows < next_power_of_2(positions):
        rows *= 2
    return Config(256 // lanes, block, rows)


def chunk_config(channels: int, positions: int, samples: int, lanes: int) -> tuple[Config, int]:
    """For moments_kernel with a chunk of positions a program, and how many positions that is."""
    block = piece(channels, 256)
    rows = max(1, 2048 // block)
    programs = max(1, MOMENT_PROGRAMS // (samples * -(-channels // block)))
    chunk = max(-(-positions // programs), 8 * rows)
    return Config(128 // lanes, block, rows), -(-chunk // rows) * rows
