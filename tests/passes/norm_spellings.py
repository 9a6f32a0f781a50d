"""Norms and borders as diffusers' autoencoders spell them, of `C` channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

C = 8


def wan(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * C**0.5 * w + 0.0


def wan_in_float32(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1).to(x.dtype) * C**0.5 * w + 0.0


def by_mean(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(1, keepdim=True) + 1e-8)


def rms_over_last(x: Tensor) -> Tensor:
    """diffusers' RMSNorm."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + 1e-6)


def moved(norm: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
    return norm(x.movedim(1, -1), *args).movedim(-1, 1)


def frames(x: Tensor, w: Tensor, b: Tensor, size: int = 99) -> Tensor:
    """Group norm of each frame, `size` at a time, as Mochi's."""
    folded = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
    y = torch.cat([F.group_norm(part, 4, w, b) for part in folded.split(size)])
    return y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4)


def norm(x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 4))


def joined(y: Tensor, front: int, back: int) -> Tensor:
    """LTX: the first and the last frame repeated."""
    parts = [y[:, :, :1].repeat(1, 1, front, 1, 1), y, y[:, :, -1:].repeat(1, 1, back, 1, 1)]
    return torch.cat(parts[:2] if not back else parts, 2)


def twice(y: Tensor) -> Tensor:
    """CogVideoX: the first frame, listed twice."""
    first = y[:, :, :1]
    return torch.cat([first, first, y], 2)
