"""`pvae::group_norm_act`: group normalisation, then an activation, on channels-last memory.

    y = activation((group_norm(x) * weight + bias) * scale + shift)

in fp32 from the loads to the one rounding of the result; what is None is left out. x is read twice and y written once. The
statistics are of all positions of a sample, frames together (HunyuanVideo, CogVideoX), or of each frame (Mochi, Cosmos,
MAGVIT). scale and shift like x, or of fewer rows and columns, are the spatial norm of MoVQ and CogVideoX,
`norm(f) * conv_y(z) + conv_b(z)`.

`padding` writes borders around the result in the same launch, as in channel_norm_act.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pvae.kernels.channel_norm_act import like_x_with_borders
from pvae.kernels.channel_norm_launch import run
from pvae.kernels.channel_norm_layout import Border, Operands
from pvae.kernels.channel_norm_reference import Norm
from pvae.kernels.norm_op import functional_op


@functional_op(fake=like_x_with_borders)
def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str = "none",
    padding: Sequence[int] | None = None,
    mode: str = "constant",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    per_frame: bool = False,
) -> Tensor:
    """x [N, C, *spatial] of 2 or 3 spatial dimensions, C a multiple of `groups` -> y, x's dtype, channels-last.

    weight and bias [C]; scale and shift [1|N, C, 1, ...], like x, or with rows and columns a whole number of times fewer,
    then enlarged by nearest neighbours. activation none, silu, relu or gelu (with erf).
    padding (front, back) for each spatial dimension in their order; mode constant (zeros), replicate or reflect,
    for all dimensions or one for each with commas between. Raises ValueError for operands that do not go together.
    """
    border = Border.of(padding or (), mode, x.dim() - 2)
    norm = Norm("group", eps, activation, groups=groups, per_frame=per_frame)
    return run(norm, Operands(x, weight, bias, scale, shift), border)


OP = group_norm_act
