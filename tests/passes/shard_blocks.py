"""Blocks that random sharded models are made of: convolutions, pools, resampling, norms. `shard_mixers.py` has more.

Blocks are drawn by name from `KINDS`, each a kind of its own, so that failures shrink well; what a block was drawn with is
in its repr, which a failing example prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]
MODES = ("zeros", "replicate", "reflect", "circular")


class Block(nn.Module):
    """`function(x, *parts)`; the parts are its weights and layers."""

    def __init__(self, text: str, function: Callable[..., Tensor], *parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.text, self.function = text, function
        self.names = [f"part{i}" for i in range(len(parts))]
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))

    def extra_repr(self) -> str:
        return self.text


class CausalConv(nn.Module):
    """Wan's causal convolution: the last two frames are kept for the next call, zeros or the first frame stand before."""

    def __init__(self, channels: int, kernel: tuple[int, int], mode: str, first: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, *kernel))
        self.kernel, self.mode, self.first = kernel, mode, first

    def forward(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = x[:, :, -2:].clone()
        if kept.shape[2] < 2 and cache is not None:
            kept = torch.cat([cache[:, :, -1:], kept], 2)
        front = 2
        if cache is not None:
            x, front = torch.cat([cache, x], 2), 2 - cache.shape[2]
        if front and self.first == "replicate":
            x, front = torch.cat([x[:, :, :1]] * front + [x], 2), 0
        (kh, kw), mode = self.kernel, "constant" if self.mode == "zeros" else self.mode
        if mode == "constant" or front == 0:
            x = F.pad(x, (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2, front, 0), mode=mode)
        else:
            x = F.pad(x, (kw // 2, (kw - 1) // 2, kh // 2, (kh - 1) // 2, 0, 0), mode=mode)
            x = F.pad(x, (0, 0, 0, 0, front, 0))
        return self.conv(x), kept

    def extra_repr(self) -> str:
        return f"pad {self.mode}, first {self.first}"


# --- kinds of block ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """`build(draw, shape)` gives a block for inputs of that shape, if `fits(shape)`."""

    build: Callable[[Any, Shape], nn.Module]
    fits: Callable[[Shape], bool]


KINDS: dict[str, Kind] = {}


def kind(fits: Callable[[Shape], bool] = lambda shape: True) -> Callable[[Any], Any]:
    def register(build: Any) -> Any:
        KINDS[build.__name__] = Kind(build, fits)
        return build

    return register


def is_video(shape: Shape) -> bool:
    return len(shape) == 5


def has_room(shape: Shape) -> bool:
    """Whether a block may make it four times as large."""
    return prod(shape) <= 4000 and max(shape[-2:]) <= 20


def few_tokens(shape: Shape) -> bool:
    return prod(shape[2:]) <= 600


def divides(draw: Any, size: int, most: int = 3) -> int:
    return draw(st.sampled_from([n for n in range(1, most + 1) if size % n == 0]))


def layer(name: str, shape: Shape) -> Any:
    """`nn.<name>2d` or `3d` by the shape."""
    return getattr(nn, f"{name}{len(shape) - 2}d")


AXES = st.sampled_from([-2, -1])
SMALL = st.integers(1, 3)


@st.composite
def windows(draw: Any, sizes: Shape, mode: str = "zeros", stride: bool = True) -> list[tuple[int, int, int, int]]:
    """(kernel, stride, padding, dilation) for each dimension, such that at least one window fits."""
    found = []
    for size in sizes:
        most = {"reflect": size - 1, "circular": size}.get(mode, 3)
        padding = draw(st.integers(0, min(most, 3)))
        dilation = draw(SMALL)
        kernel = min(draw(st.integers(1, 4)), (size + 2 * padding - 1) // dilation + 1)
        found.append((kernel, draw(SMALL) if stride else 1, padding, dilation))
    return found


@kind()
def conv(draw: Any, shape: Shape) -> nn.Module:
    groups = divides(draw, shape[1])
    mode = draw(st.sampled_from(MODES))
    kernel, stride, padding, dilation = zip(*draw(windows(shape[2:], mode)), strict=True)
    bias = draw(st.booleans())
    out = groups * draw(st.integers(1, 2))
    return layer("Conv", shape)(shape[1], out, kernel, stride, padding, dilation, groups, bias, mode)


@kind()
def conv_same(draw: Any, shape: Shape) -> nn.Module:
    """`padding="same"`: uneven where the kernel is even, of which torch warns as of a copy more."""
    kernel = tuple(draw(st.integers(1, 4)) for _ in shape[2:])
    dilation = tuple(draw(st.integers(1, 2)) for _ in shape[2:])
    return layer("Conv", shape)(shape[1], shape[1], kernel, padding="same", dilation=dilation)


@kind()
def conv_halo(draw: Any, shape: Shape) -> nn.Module:
    """What most of a VAE is: 3x3(x3), padding 1, after a norm and silu."""
    groups = divides(draw, shape[1]) if prod(shape[2:]) > 1 else 0
    norm = affine(nn.GroupNorm(groups, shape[1])) if groups else nn.Identity()
    return Block(
        "conv(silu(norm))", lambda x, n, c: c(F.silu(n(x))), norm, layer("Conv", shape)(shape[1], shape[1], 3, 1, 1)
    )


@kind()
def conv_1d(draw: Any, shape: Shape) -> nn.Module:
    """Along one dimension, the others being the batch."""
    dim = draw(st.sampled_from(range(2, len(shape))))
    ((kernel, stride, padding, dilation),) = draw(windows((shape[dim],)))

    def run(x: Tensor, c: nn.Module) -> Tensor:
        y = x.movedim((1, dim), (-2, -1))
        z = c(y.reshape(-1, *y.shape[-2:]))
        return z.reshape(*y.shape[:-2], *z.shape[1:]).movedim((-2, -1), (1, dim))

    return Block(f"dim={dim}", run, nn.Conv1d(shape[1], shape[1], kernel, stride, padding, dilation))


@kind()
def pad_conv(draw: Any, shape: Shape) -> nn.Module:
    """An asymmetric pad, cropping too, of any mode or value; then a convolution or nothing."""
    mode = draw(st.sampled_from(("constant", *MODES[1:])))
    widths: list[int] = []
    for size in reversed(shape[2:]):
        most = {"reflect": size - 1, "circular": size}.get(mode, 3)
        least = 0 if mode != "constant" else -min(2, (size - 1) // 2)
        widths += [draw(st.integers(least, min(most, 3))) for _ in range(2)]
    fill = draw(st.sampled_from([0.0, 0.0, 0.5])) if mode == "constant" else 0.0
    padded = [n + widths[-2 * i - 2] + widths[-2 * i - 1] for i, n in enumerate(shape[2:])]
    kernel, stride, padding, dilation = zip(*draw(windows(tuple(padded))), strict=True)
    c = nn.Identity()
    if draw(st.booleans()):
        c = layer("Conv", shape)(shape[1], shape[1], kernel, stride, padding, dilation)
    return Block(f"pad={widths}, {mode}, {fill}", lambda x, c: c(F.pad(x, widths, mode, fill)), c)


@kind(lambda shape: min(shape[-2:]) > 1)
def downsample(draw: Any, shape: Shape) -> nn.Module:
    """The encoder's: one row and one column of zeros behind, stride 2."""
    stride, kernel = (2, 2) if len(shape) == 4 else (1, 2, 2), (3, 3) if len(shape) == 4 else (1, 3, 3)
    c = layer("Conv", shape)(shape[1], shape[1], kernel, stride)
    if draw(st.booleans()):
        return Block("ZeroPad2d", lambda x, c: c(F.pad(x, (0, 1, 0, 1))), c)
    return layer("AvgPool", shape)(stride, stride)


@kind(has_room)
def conv_transposed(draw: Any, shape: Shape) -> nn.Module:
    groups = divides(draw, shape[1])
    chosen = []
    for size in shape[2:]:
        kernel, stride, dilation = draw(st.integers(1, 4)), draw(SMALL), draw(st.integers(1, 2))
        more = draw(st.integers(0, max(stride, dilation) - 1))
        padding = draw(st.integers(0, min(3, ((size - 1) * stride + dilation * (kernel - 1) + more) // 2)))
        chosen.append((kernel, stride, padding, more, dilation))
    kernel, stride, padding, more, dilation = zip(*chosen, strict=True)
    return layer("ConvTranspose", shape)(
        shape[1], shape[1], kernel, stride, padding, more, groups, draw(st.booleans()), dilation
    )


@kind()
def pool(draw: Any, shape: Shape) -> nn.Module:
    largest, ceil = draw(st.booleans()), draw(st.booleans())
    chosen = []
    for size, (kernel, stride, padding, dilation) in zip(shape[2:], draw(windows(shape[2:])), strict=True):
        dilation = min(dilation, size) if largest else 1  # else a window might see nothing but padding
        kernel = min(kernel, (size - 1) // dilation + 1)
        chosen.append((kernel, stride, min(padding, kernel // 2), dilation))
    kernel, stride, padding, dilation = zip(*chosen, strict=True)
    if largest:
        return layer("MaxPool", shape)(kernel, stride, padding, dilation, ceil_mode=ceil)
    divisor = draw(st.sampled_from([None, None, 3]))
    return layer("AvgPool", shape)(kernel, stride, padding, ceil, draw(st.booleans()), divisor)


@kind(has_room)
def interpolate(draw: Any, shape: Shape) -> nn.Module:
    modes = ["nearest", "nearest-exact", "trilinear", "area"]
    if not is_video(shape):
        modes[2:3] = ["bilinear", "bicubic"]
    options: dict[str, Any] = {"mode": draw(st.sampled_from(modes))}
    if "linear" in options["mode"] or "cubic" in options["mode"]:
        options["align_corners"] = draw(st.booleans())
    if draw(st.booleans()):
        options["size"] = tuple(draw(st.integers(1, 2 * n + 1)) for n in shape[2:])
    else:
        factors = [2.0, 1.0, 3.0, 0.5, 1.5, 0.4]
        options["scale_factor"] = tuple(draw(st.sampled_from([f for f in factors if f * n >= 1])) for n in shape[2:])
    return Block(str(options), lambda x: F.interpolate(x, **options))


def spread(x: Tensor, p: int, q: int, order: str) -> Tensor:
    """Channels to pixels; `order` says how the channel index is made of channel c and offsets p, q."""
    n, channels, *rest = x.shape
    (h, w), c, frames = rest[-2:], channels // (p * q), rest[:-2]
    sizes = {"c": c, "p": p, "q": q}
    x = x.reshape(n, *(sizes[k] for k in order), *frames, h, w)
    at = {k: 1 + order.index(k) for k in order}
    last = x.dim() - 1
    x = x.permute(0, at["c"], *range(4, last - 1), last - 1, at["p"], last, at["q"])
    return x.reshape(n, c, *frames, h * p, w * q)


def collect(x: Tensor, p: int, q: int, order: str) -> Tensor:
    """The inverse of `spread`."""
    n, c, *frames, h, w = x.shape
    x = x.reshape(n, c, *frames, h // p, p, w // q, q)
    last = x.dim() - 1
    at = {"c": 1, "p": last - 2, "q": last}
    x = x.permute(0, *(at[k] for k in order), *range(2, last - 3), last - 3, last - 1)
    return x.reshape(n, c * p * q, *frames, h // p, w // q)


ORDERS = st.sampled_from(["cpq", "cqp", "pqc", "qcp"])


@kind(lambda shape: has_room(shape) and any(shape[1] % n == 0 for n in (2, 3, 4)))
def unpatchify(draw: Any, shape: Shape) -> nn.Module:
    """Pixel shuffle, by the op where it can and spelled."""
    p = draw(st.sampled_from([p for p in (1, 2, 3) if shape[1] % p == 0]))
    q = draw(st.sampled_from([q for q in (1, 2, 3) if shape[1] % (p * q) == 0]))
    if p == q and not is_video(shape) and draw(st.booleans()):
        return nn.PixelShuffle(p)
    order = draw(ORDERS)
    return Block(f"{p}, {q}, {order}", lambda x: spread(x, p, q, order))


@kind(lambda shape: shape[1] <= 4 and any(n % k == 0 for n in shape[-2:] for k in (2, 3)))
def patchify(draw: Any, shape: Shape) -> nn.Module:
    p, q = divides(draw, shape[-2]), divides(draw, shape[-1])
    if p == q and draw(st.booleans()):
        return nn.PixelUnshuffle(p) if not is_video(shape) else Block(f"{p}", lambda x: F.pixel_unshuffle(x, p))
    order = draw(ORDERS)
    return Block(f"{p}, {q}, {order}", lambda x: collect(x, p, q, order))


def affine(norm: Any) -> Any:
    """Random weights and, so that no result is rounding noise alone, a bias well above zero."""
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    if getattr(norm, "bias", None) is not None:
        nn.init.uniform_(norm.bias, 0.5, 1.0)
    return norm


@kind(lambda shape: prod(shape[2:]) > 1)
def norm_over_space(draw: Any, shape: Shape) -> nn.Module:
    how = draw(st.sampled_from(["group", "instance", "layer", "frame"]))
    if how == "instance":
        return affine(layer("InstanceNorm", shape)(shape[1], affine=True))
    if how == "layer":
        return affine(nn.LayerNorm(shape[draw(st.integers(1, len(shape) - 1)) :]))
    group = affine(nn.GroupNorm(divides(draw, shape[1]), shape[1]))
    if how == "group" or not is_video(shape) or prod(shape[3:]) == 1:
        return group
    return Block("frame by frame", lambda x, n: frames(x, n), group)


@kind()
def norm_over_channels(draw: Any, shape: Shape) -> nn.Module:
    how = draw(st.sampled_from(["layer", "rms", "wan", "batch", "square"]))
    gamma = torch.rand(shape[1], *[1] * (len(shape) - 2)) + 0.5
    if how == "batch":
        norm = affine(layer("BatchNorm", shape)(shape[1]))
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        return norm
    if how == "wan":
        return Block(how, lambda x, g: F.normalize(x, dim=1) * x.shape[1] ** 0.5 * g, gamma)
    if how == "square":
        return Block(how, lambda x, g: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * g, gamma)
    norm = affine(nn.LayerNorm(shape[1]) if how == "layer" else nn.RMSNorm(shape[1], eps=1e-6))
    return Block(how, lambda x, n: n(x.movedim(1, -1)).movedim(-1, 1), norm)


@kind()
def pointwise(draw: Any, shape: Shape) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
        "swish": lambda x: x * torch.sigmoid(x),
        "tanh": lambda x: torch.tanh(x / 3) * 3,
        "clamp": lambda x: x.clamp(-1, 1),
        "softmax": lambda x: x.softmax(1),
        "where": lambda x: torch.where(x > 0, x, 0.1 * x),
        "glu": lambda x: (lambda a, b: a * F.silu(b))(*torch.cat([x, x], 1).chunk(2, 1)),
    }
    name = draw(st.sampled_from(sorted(functions)))
    return Block(name, functions[name])


@kind()
def modulate(draw: Any, shape: Shape) -> nn.Module:
    """Scale and shift by parameters `[1, C, 1, 1]`, and a linear layer over channels-last."""
    ones = [1] * (len(shape) - 2)
    scale, shift = torch.rand(1, shape[1], *ones), torch.rand(shape[1], *ones)
    if draw(st.booleans()):
        return Block("scale, shift", lambda x, a, b: x * (1 + a) + b, scale, shift)
    mlp = nn.Sequential(nn.Linear(shape[1], 2 * shape[1]), nn.GELU(), nn.Linear(2 * shape[1], shape[1]))
    return Block("mlp", lambda x, a, m: x + a * m(x.movedim(1, -1)).movedim(-1, 1), scale, mlp)


def frames(x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
    """`block` on each frame, as `[N * T, C, H, W]`."""
    n, c, t, h, w = x.shape
    y = block(x.permute(0, 2, 1, 3, 4).reshape(n * t, c, h, w))
    return y.reshape(n, t, *y.shape[1:]).permute(0, 2, 1, 3, 4)


@kind(is_video)
def frame_by_frame(draw: Any, shape: Shape) -> nn.Module:
    """A block of images on each frame."""
    inner = draw(blocks_for((shape[0] * shape[2], shape[1], *shape[3:]), tuple(KINDS)))
    return Block("", frames, inner)


@kind(lambda shape: is_video(shape) and shape[1] % 2 == 0 and shape[2] <= 3)
def double_frames(draw: Any, shape: Shape) -> nn.Module:
    """Wan's upsampling in time: half of the channels are frames between."""

    def run(x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        x = x.reshape(n, 2, c // 2, t, h, w)
        return torch.stack((x[:, 0], x[:, 1]), 3).reshape(n, c // 2, 2 * t, h, w)

    return Block("", run)


@kind(lambda shape: is_video(shape) and min(shape[-2:]) > 1)
def causal_conv(draw: Any, shape: Shape) -> nn.Module:
    kernel = (draw(SMALL), draw(SMALL))
    return CausalConv(shape[1], kernel, draw(st.sampled_from(MODES)), draw(st.sampled_from(["zeros", "replicate"])))


@st.composite
def blocks_for(draw: Any, shape: Shape, kinds: Sequence[str]) -> nn.Module:
    """A block, in float64 and eval mode, of one of the kinds that take inputs of this shape."""
    name = draw(st.sampled_from([k for k in kinds if KINDS[k].fits(shape)]))
    return KINDS[name].build(draw, shape).to(torch.float64).eval()
