"""`pvae::channels_last`: a weight re-laid so that its channels are innermost in memory.

An op of its own because Inductor ignores `clone(memory_format=channels_last_3d)`, but keeps the strides that an opaque op
states; the convolution that reads the result then asks for its activation in the same layout, and Inductor writes it so.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=FORMATS[x.dim()])


@torch.library.custom_op("pvae::channels_last", mutates_args=())
def channels_last(x: Tensor) -> Tensor:
    """x [N, C, *spatial] of 2 or 3 spatial dimensions -> a copy of x in channels_last or channels_last_3d order."""
    return x.clone(memory_format=FORMATS[x.dim()])


@channels_last.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=FORMATS[x.dim()])


OP = torch.ops.pvae.channels_last.default
