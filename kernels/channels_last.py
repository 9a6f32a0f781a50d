"""`pvae::channels_last`: a weight re-laid so that its channels are innermost in memory.

An op of its own because Inductor ignores `clone(memory_format=channels_last_3d)`, but keeps the strides that an opaque op
states; the convolution that reads the result then asks for its activation in the same layout, and Inductor writes it so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.kernels.norm_op import functional_op

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=FORMATS[x.dim()])


def _relaid(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=FORMATS[x.dim()])


@functional_op(_relaid)
def channels_last(x: Tensor) -> Tensor:
    """x [N, C, *spatial] of 2 or 3 spatial dimensions -> a copy of x in channels_last or channels_last_3d order."""
    return x.clone(memory_format=FORMATS[x.dim()])


OP = channels_last
