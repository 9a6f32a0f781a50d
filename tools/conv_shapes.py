"""Convolutions of the zoo's full models as the benches name them, and how to find more.

96-96:3x3x3:4x480x832[:s1x2x2][:n2]      CHANNELS-OUT:KERNEL:SIZE of the result[:STRIDE][:BATCH]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pvae.tools.model_run import Request, RequestError


@dataclass(frozen=True)
class Shape:
    """A convolution without groups or dilation. `kernel`, `stride` and `size` (the result's) are (T, H, W) or (H, W).

    A kernel wider than its stride reads `kernel - stride` more positions than `stride * size`: in time frames before x, in
    height and width zeros, at stride 1 on both sides, else behind (as downsampling in VAEs does).
    """

    channels: int
    out_channels: int
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`96-96:3x3x3:4x480x832[:s1x2x2][:n2]`; RequestError says what is wrong."""
        try:
            channels, kernel, size, *more = text.split(":")
            given = {item[0]: tuple(map(int, item[1:].split("x"))) for item in more}
            cin, cout = map(int, channels.split("-"))
            taps, extents = tuple(map(int, kernel.split("x"))), tuple(map(int, size.split("x")))
            stride, (batch,) = given.pop("s", (1,) * len(taps)), given.pop("n", (1,))
        except (ValueError, IndexError):
            raise RequestError(f"--shapes {text!r} is not written such as 96-96:3x3x3:4x480x832:s1x2x2:n1") from None
        if given or len(taps) not in (2, 3) or not len(taps) == len(extents) == len(stride):
            raise RequestError(f"--shapes {text!r}: kernel, size and stride have two or three numbers each, as many")
        if min(cin, cout, batch, *taps, *extents, *stride) < 1:
            raise RequestError(f"--shapes {text!r} has a number below 1")
        return cls(cin, cout, taps, extents, stride, batch)

    def __str__(self) -> str:
        parts = [f"{self.channels}-{self.out_channels}", *("x".join(map(str, t)) for t in (self.kernel, self.size))]
        parts += ["s" + "x".join(map(str, self.stride))] if max(self.stride) > 1 else []
        return ":".join(parts + ([f"n{self.batch}"] if self.batch > 1 else []))

    @property
    def flop(self) -> int:
        return 2 * self.batch * math.prod((*self.size, *self.kernel)) * self.channels * self.out_channels

    def borders(self) -> list[tuple[int, int]]:
        """(front, back) of height and width: the zeros around the picture."""
        spare = [(k - s, s) for k, s in zip(self.kernel[-2:], self.stride[-2:], strict=True)]
        return [(0, 0) if n <= 0 else ((n // 2, n - n // 2) if s == 1 else (0, n)) for n, s in spare]

    def cached_frames(self) -> int:
        return max(0, self.kernel[0] - self.stride[0]) if len(self.kernel) == 3 else 0


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(Shape.parse(item) for item in text.split())


MEASURED = _shapes("""
    384-384:3x3x3:1x60x104 384-384:3x3x3:2x120x208 192-192:3x3x3:4x240x416 96-96:3x3x3:4x480x832
    96-96:3x3x3:1x1024x1024 384-384:3x3x3:1x128x128 96-3:3x3x3:4x480x832
""")
# By model: what has most of the arithmetic, and of each kind (one frame deep, one pixel wide, strided, few channels) one.
MODELS: Mapping[str, tuple[Shape, ...]] = {
    "wan2.1": _shapes("""
        96-96:3x3x3:1x480x832 192-384:3x3x3:2x120x208 384-192:3x3:240x416:n4 192-96:3x3:480x832:n4
        384-768:3x1x1:2x120x208 192-384:1x1x1:2x120x208 16-384:3x3x3:1x60x104 384-1152:1x1:60x104
    """),
    "wan2.1 encode": _shapes("""
        3-96:3x3x3:4x480x832 96-96:3x3:240x416:s2x2:n4 192-192:3x3:120x208:s2x2:n4 384-384:3x3:60x104:s2x2:n2
        192-192:3x1x1:2x120x208:s2x1x1
    """),
    "qwen-image": _shapes("384-384:3x3:256x256 192-192:3x3:512x512 96-96:3x3:1024x1024 96-3:3x3:1024x1024"),
    "hunyuan-video": _shapes("""
        128-128:3x3x3:17x360x640 256-256:3x3x3:17x360x640 512-512:3x3x3:9x180x320 512-512:3x3x3:5x45x80
        256-128:1x1x1:17x360x640 128-3:3x3x3:5x360x640
    """),
    "ltx2-video": _shapes("""
        128-128:3x3x3:49x120x176 256-256:3x3x3:25x60x88 256-1024:3x3x3:25x60x88 512-512:3x3x3:13x30x44
        512-2048:3x3x3:13x30x44 1024-1024:3x3x3:7x15x22 1024-4096:3x3x3:7x15x22 128-48:3x3x3:49x120x176
    """),
    "cogvideox": _shapes("""
        256-256:3x3x3:9x240x360 256-256:3x3x3:5x120x180 256-128:3x3x3:9x480x720 128-128:3x3x3:9x480x720
        512-512:3x3x3:3x60x90 16-128:1x1x1:9x480x720
    """),
    "mochi": _shapes("""
        768-768:3x3x3:4x60x106 512-512:3x3x3:12x120x212 256-256:3x3x3:24x240x424 128-128:3x3x3:13x480x848
    """),
    "kl": _shapes(
        "512-512:3x3:256x256 256-256:3x3:512x512 128-128:3x3:1024x1024 256-128:1x1:1024x1024 16-512:3x3:128x128"
    ),
    "kl encode": _shapes("128-128:3x3:512x512:s2x2 256-256:3x3:256x256:s2x2 512-512:3x3:128x128:s2x2"),
    "hunyuan-video encode": _shapes("128-128:3x3x3:17x180x320:s1x2x2 256-256:3x3x3:9x90x160:s2x2x2"),
    "dc": _shapes("1024-512:3x3:128x128 1024-8192:1x1:64x64"),
    "cosmos": _shapes("512-512:1x3x3:3x60x104 512-512:3x1x1:3x60x104"),
}


class _Convolutions(TorchDispatchMode):
    """Counts what convolutions run, those of one group and no dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Shape] = Counter()
        self.left_out = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            _, weight, _, stride, _, dilation, transposed, _, groups = args
            if transposed or groups != 1 or max(dilation) > 1:
                self.left_out += 1
            else:
                out, channels, *kernel = weight.shape
                batch, size = result.shape[0], tuple(result.shape[2:])
                self.found[Shape(channels, out, tuple(kernel), size, tuple(stride), batch)] += 1
        return result


def collect(request: Request) -> Counter[Shape]:
    """How often each convolution runs in one call of the model; only shapes are computed."""
    case = request.load()
    with torch.no_grad(), _Convolutions() as mode:
        case.run()
    return mode.found


def shares(found: Counter[Shape]) -> Iterator[tuple[float, int, Shape]]:
    """(share of the arithmetic, calls, shape), the largest first."""
    whole = sum(count * shape.flop for shape, count in found.items())
    for shape, count in sorted(found.items(), key=lambda item: -item[1] * item[0].flop):
        yield count * shape.flop / whole, count, shape


def shapes_named(text: str) -> tuple[Shape, ...]:
    every = (*MEASURED, *(shape for shapes in MODELS.values() for shape in shapes))
    groups = {"all": tuple(dict.fromkeys(every)), "measured": MEASURED}
    return groups[text] if text in groups else tuple(Shape.parse(item) for item in text.split(","))
