"""One convolution as a machine sees it: sizes, kernel, type. What figures are kept by, and found again.

As text, which is its key in the tuning store:

    bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 padding 0.0x1.1x1.1 before 2
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pvae.passes.conv_site import front_of
from pvae.passes.ir import ConvNode, static, value

_HEAD = re.compile(r"(\w+) (\d+(?:x\d+)+) > (\d+) kernel (\d+(?:x\d+)*)((?: \w+ [\d.x]+)*)")


def precision(dtype: torch.dtype) -> str:
    """`bfloat16`, `float16`, `float64`, or for fp32 `tf32` where torch's convolutions may use it, else `float32`."""
    name = str(dtype).removeprefix("torch.")
    return "tf32" if name == "float32" and torch.backends.cudnn.allow_tf32 else name


@dataclass(frozen=True)
class ConvProblem:
    """A convolution whose sizes are all known.

    sizes     of x along its spatial dimensions, without pads and without the frames before it
    padding   (front, back) zeros of each spatial dimension, those of a zero pad in front of the convolution included
    before    frames that are concatenated in front of x (a causal cache)
    """

    precision: str
    batch: int
    channels: int
    sizes: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    before: int = 0

    @classmethod
    def of(cls, conv: ConvNode) -> ConvProblem | None:
        """None where a size is symbolic, or x has no batch dimension."""
        if not conv.batched:
            return None
        x, cache, pads = front_of(conv)
        shape = [static(size) for size in value(x).shape]
        before = 0 if cache is None else static(value(cache).shape[2])
        if before is None or any(size is None for size in shape):
            return None
        batch, channels, *sizes = (size for size in shape if size is not None)
        name = precision(value(conv.x).dtype)
        if value(conv.x).device.type == "cpu" and name == "tf32":
            name = "float32"
        return cls(
            name,
            batch,
            channels,
            tuple(sizes),
            conv.out_channels,
            conv.kernel,
            conv.stride,
            pads,
            conv.dilation,
            conv.groups,
            before,
        )

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        sizes = [self.sizes[0] + self.before, *self.sizes[1:]]
        return tuple(
            (size + front + back - d * (k - 1) - 1) // s + 1
            for size, (front, back), d, k, s in zip(
                sizes, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    @property
    def rows(self) -> int:
        """Output positions: the rows of the matrix product that it is."""
        return self.batch * math.prod(self.out_sizes)

    @property
    def flops(self) -> float:
        """Multiply-adds times two, padding zeros counted."""
        return 2.0 * self.rows * self.out_channels * (self.channels // self.groups) * math.prod(self.kernel)

    @property
    def bytes(self) -> int:
        """x, the frames before it, and the result, once each."""
        size = {"bfloat16": 2, "float16": 2, "float64": 8}.get(self.precision, 4)
        x = self.batch * self.channels * math.prod((self.sizes[0] + self.before, *self.sizes[1:]))
        return size * (x + self.rows * self.out_channels)

    def __str__(self) -> str:
        def by(numbers: tuple[int, ...]) -> str:
            return "x".join(map(str, numbers))

        ones = (1,) * self.ndim
        text = f"{self.precision} {by((self.batch, self.channels, *self.sizes))} > {self.out_channels}"
        text += f" kernel {by(self.kernel)}"
        if any(map(any, self.padding)):
            text += " padding " + "x".join(f"{front}.{back}" for front, back in self.padding)
        if self.stride != ones:
            text += f" stride {by(self.stride)}"
        if self.dilation != ones:
            text += f" dilation {by(self.dilation)}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        return text + (f" before {self.before}" if self.before else "")

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """The reverse of `str`. Raises ValueError for anything else."""
        found = _HEAD.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no convolution, such as {EXAMPLE}")
        name, shape, out, kernel, rest = found.groups()
        words = rest.split()
        extra: Mapping[str, str] = dict(zip(words[::2], words[1::2], strict=True))

        def numbers(field: str, default: str) -> tuple[int, ...]:
            return tuple(map(int, extra.get(field, default).split("x")))

        batch, channels, *sizes = map(int, shape.split("x"))
        ones, zeros = "x".join(["1"] * len(sizes)), "x".join(["0.0"] * len(sizes))
        pads = [tuple(map(int, pair.split("."))) for pair in extra.get("padding", zeros).split("x")]
        problem = cls(
            name,
            batch,
            channels,
            tuple(sizes),
            int(out),
            tuple(map(int, kernel.split("x"))),
            numbers("stride", ones),
            tuple((pair[0], pair[1]) for pair in pads if len(pair) == 2),
            numbers("dilation", ones),
            *numbers("groups", "1"),
            *numbers("before", "0"),
        )
        each = (problem.sizes, problem.kernel, problem.stride, problem.padding, problem.dilation)
        if str(problem) != text or any(len(numbers) != problem.ndim for numbers in each):
            raise ValueError(f"{text!r} is no convolution, such as {EXAMPLE}")
        return problem


EXAMPLE = "'bfloat16 1x96x4x480x832 > 96 kernel 3x3x3 padding 0.0x1.1x1.1 before 2'"
