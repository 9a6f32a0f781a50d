"""Blocks that mix or move the rows of a picture: attention, rearrangements, positions, statistics over space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.shard_blocks import AXES, SMALL, Block, Shape, divides, few_tokens, has_room, is_video, kind

# --- attention -----------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
    """`[batch, heads, tokens, width]` each."""
    match how:
        case "bmm":
            q, k, v, shape = *(y.reshape(-1, *y.shape[-2:]) for y in (q, k, v)), q.shape
            return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5).softmax(-1), v).reshape(shape)
        case "matmul":
            return torch.matmul(torch.matmul(q, k.mT).div(q.shape[-1] ** 0.5).softmax(dim=-1), v)
        case "linear":
            q, k = F.relu(q), F.relu(k)
            return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 1e-3)
        case "softmaxes":
            return torch.einsum("bhnd,bhde->bhne", q.softmax(-1), torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v))
    return F.scaled_dot_product_attention(q, k, v)


@kind(few_tokens)
def attention(draw: Any, shape: Shape) -> nn.Module:
    """Tokens are a frame's pixels, all pixels, or those of a row or column; residual around it."""
    over = draw(st.sampled_from(["frame", "all", "row", "column"]))
    how = draw(st.sampled_from(["sdpa", "bmm", "matmul", "linear", "softmaxes"]))
    heads = divides(draw, shape[1])
    order = {"column": (0, 2, 4, 3, 1)}.get(over, (0, 2, 3, 4, 1))

    def run(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
        y = (x if x.dim() == 5 else x.unsqueeze(2)).permute(order)
        n, t, a, b, c = y.shape
        tokens = y.reshape({"frame": n * t, "all": n}.get(over, n * t * a), -1, c)
        q, k, v = (z.reshape(*z.shape[:2], heads, -1).transpose(1, 2) for z in qkv(tokens).chunk(3, -1))
        z = out(attend(q, k, v, how).transpose(1, 2).reshape(tokens.shape))
        z = z.reshape(n, t, a, b, c).permute([order.index(d) for d in range(5)])
        return x + (z if x.dim() == 5 else z.squeeze(2))

    return Block(
        f"{how} over {over}, {heads} heads", run, nn.Linear(shape[1], 3 * shape[1]), nn.Linear(shape[1], shape[1])
    )


@kind(lambda shape: not is_video(shape) and few_tokens(shape))
def attention_wan(draw: Any, shape: Shape) -> nn.Module:
    """As Wan spells it: qkv by a convolution, one head, tokens flattened from `[N, C, H, W]`."""

    def run(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = qkv(x).reshape(n, 1, 3 * c, -1).permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).permute(0, 2, 1).reshape(n, c, h, w)
        return out(y) + x

    return Block("", run, nn.Conv2d(shape[1], 3 * shape[1], 1), nn.Conv2d(shape[1], shape[1], 1))


@kind(lambda shape: is_video(shape) and few_tokens(shape))
def attention_causal(draw: Any, shape: Shape) -> nn.Module:
    """HunyuanVideo's: all pixels are tokens, each sees its own frame and those before."""

    def run(x: Tensor, qkv: nn.Module) -> Tensor:
        t, h, w = x.shape[2:]
        frame = torch.arange(t, device=x.device).repeat_interleave(h * w)
        q, k, v = qkv(x.permute(0, 2, 3, 4, 1).flatten(1, 3)).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame[None, :])
        return x + y.squeeze(1).unflatten(1, (t, h, w)).permute(0, 4, 1, 2, 3)

    return Block("", run, nn.Linear(shape[1], 3 * shape[1]))


# --- what moves or mixes rows --------------------------------------------------------------------------------------------


def chosen(draw: Any, functions: dict[str, Callable[[Tensor], Tensor]], text: str) -> nn.Module:
    name = draw(st.sampled_from(sorted(functions)))
    return Block(f"{name}, {text}", functions[name])


@kind()
def move_rows(draw: Any, shape: Shape) -> nn.Module:
    dim = draw(AXES)
    size = shape[dim]
    shift, half = draw(st.integers(-size, size)), size // 2
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flip": lambda x: x.flip(dim),
        "flip both": lambda x: x.flip(-2, -1),
        "roll": lambda x: x.roll(shift, dim),
        "roll both": lambda x: x.roll((shift, 1), (dim, -3 - dim)),
        "swap halves": lambda x: torch.cat(x.split([half, size - half], dim)[::-1], dim),
        "transpose": lambda x: x.transpose(-1, -2),
    }
    return chosen(draw, functions, f"dim={dim}, shift={shift}")


@kind()
def pick_rows(draw: Any, shape: Shape) -> nn.Module:
    dim = draw(AXES)
    size, whole = shape[dim], [slice(None)] * (len(shape) + dim)
    start, step = draw(st.integers(0, size - 1)), draw(SMALL)
    stop = draw(st.integers(start + 1, size))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "slice": lambda x: x[(*whole, slice(start, stop, step))],
        "narrow": lambda x: x.narrow(dim, start, stop - start),
        "select": lambda x: x - 0.5 * x.select(dim, start).unsqueeze(dim),
        "index": lambda x: x.index_select(dim, torch.arange(stop - 1, start - 1, -1, device=x.device)),
        "difference": lambda x: torch.cat(
            [x.narrow(dim, 0, 1), x.narrow(dim, 1, size - 1) - 0.5 * x.narrow(dim, 0, size - 1)], dim
        ),
    }
    return chosen(draw, functions, f"dim={dim}, [{start}:{stop}:{step}]")


@kind(has_room)
def repeat_rows(draw: Any, shape: Shape) -> nn.Module:
    dim = draw(AXES)
    at, size, once = len(shape) + dim, shape[dim], [1] * len(shape)
    once[dim] = 2
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "repeat_interleave": lambda x: x.repeat_interleave(2, dim),
        "repeat": lambda x: x.repeat(once),
        "expand": lambda x: x.unsqueeze(at).expand(*x.shape[:at], 2, *x.shape[at:]).flatten(at, at + 1),
        "stack": lambda x: torch.stack([x, x * 2], dim).flatten(dim - 1, dim),
        "cat": lambda x: torch.cat([x, x.flip(dim)], dim),
        "cat slice": lambda x: torch.cat([x.narrow(dim, start, stop - start), x, x.narrow(dim, 0, 1)], dim),
        "cat channels": lambda x: torch.cat([x, x.flip(dim) * 0.5], 1),
    }
    return chosen(draw, functions, f"dim={dim}, [{start}:{stop}]")


@kind(lambda shape: any(n % k == 0 for n in shape[-2:] for k in (2, 3)))
def window_mean(draw: Any, shape: Shape) -> nn.Module:
    """Windows as Swin cuts them, after a roll: each pixel and the mean of its window."""
    (h, w), shift = shape[-2:], draw(st.integers(0, 2))
    p, q = divides(draw, h), divides(draw, w)

    def run(x: Tensor) -> Tensor:
        y = x.roll((-shift, -shift), (-2, -1)).reshape(*x.shape[:-2], h // p, p, w // q, q).transpose(-3, -2)
        y = y + y.mean((-2, -1), keepdim=True)
        return y.transpose(-3, -2).reshape(x.shape).roll((shift, shift), (-2, -1))

    return Block(f"{p} x {q}, shift={shift}", run)


@kind()
def position(draw: Any, shape: Shape) -> nn.Module:
    """Something of the picture's full size: a parameter, a row of one, or made of arange in the graph."""
    h, w = shape[-2:]

    def grid(x: Tensor) -> Tensor:
        rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        return rows[:, None].to(x.dtype) / h - columns.to(x.dtype) / w

    choices: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "full": (lambda x, p: x + p, [torch.randn(shape[1:])]),
        "plane": (lambda x, p: x * p, [torch.rand(h, w)]),
        "rows": (lambda x, p: x + p, [torch.randn(shape[1], *[1] * (len(shape) - 4), h, 1)]),
        "columns": (lambda x, p: x + p, [torch.randn(w)]),
        "resized": (
            lambda x, p: x + F.interpolate(p, size=(h, w), mode="bilinear").mean((0, 1)),
            [torch.randn(1, 2, 3, 3)],
        ),
        "arange": (lambda x: x + grid(x), []),
        "channel": (lambda x: torch.cat([x, grid(x).expand_as(x[:, :1])], 1), []),
        "mask": (lambda x: x.masked_fill(grid(x) > 0, 0.5), []),
        "checker": (lambda x: x * (torch.arange(h * w, device=x.device).reshape(h, w) % 2), []),
    }
    name = draw(st.sampled_from(sorted(choices)))
    return Block(name, choices[name][0], *choices[name][1])


@kind()
def gate(draw: Any, shape: Shape) -> nn.Module:
    """Squeeze and excite: a statistic over space, a layer, back on every pixel."""
    dims, how = tuple(range(2, len(shape))), draw(st.sampled_from(["mean", "amax", "sum", "adaptive", "var"]))
    linear = nn.Linear(shape[1], shape[1])

    def run(x: Tensor, m: nn.Module) -> Tensor:
        if how == "adaptive":
            s = (F.adaptive_avg_pool2d if x.dim() == 4 else F.adaptive_avg_pool3d)(x, 1).flatten(1)
        elif how == "var":
            s = x.var(dims, correction=0)
        else:
            s = getattr(x, how)(dims) / (x[0, 0].numel() if how == "sum" else 1)
        return x * torch.sigmoid(m(s)).reshape(x.shape[:2] + (1,) * len(dims))

    return Block(how, run, linear)


@kind(lambda shape: max(shape[-2:]) <= 30)
def reduce(draw: Any, shape: Shape) -> nn.Module:
    """Along H or W alone. No difference from the mean itself: of equal rows that would be rounding noise."""
    dim, how = (
        draw(AXES),
        draw(st.sampled_from(["mean", "amax", "sum", "softmax", "cumsum", "sort", "matmul", "unfold"])),
    )
    match how:
        case "softmax":
            return Block(f"{how}, {dim}", lambda x: x.softmax(dim))
        case "cumsum":
            return Block(f"{how}, {dim}", lambda x: x.cumsum(dim) * 0.1)
        case "sort":
            return Block(f"{how}, {dim}", lambda x: x.sort(dim).values)
        case "matmul":
            matrix = torch.randn(shape[dim], shape[dim])
            return Block(f"{how}, {dim}", (lambda x, m: x @ m) if dim == -1 else (lambda x, m: m @ x), matrix)
        case "unfold":
            length = min(2, shape[dim])
            return Block(f"{how}, {dim}", lambda x: x.unfold(dim, length, 1).mean(-1))
    return Block(f"{how}, {dim}", lambda x: x - 0.3 * getattr(x, how)(dim, keepdim=True))
