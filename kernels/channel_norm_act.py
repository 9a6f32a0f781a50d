"""`pvae::channel_norm_act`: normalisation over the channels of each position, then an activation, on channels-last memory.

    y = activation((norm(x) * weight + bias) * scale + shift)

in fp32 from the loads to the one rounding of the result; what is None is left out. `norm` is one of

    "rms"    factor * x / sqrt(mean(x * x) + eps)       LTX, AutoencoderDC
    "l2"     factor * x / max(sqrt(sum(x * x)), eps)    Wan and Qwen-Image: `normalize(x, dim=1) * scale * gamma`
    "layer"  (x - mean) / sqrt(variance + eps)          LTX's shortcuts

`padding` writes borders around the result in the same launch, so that the convolution behind it reads them from memory:
what it cannot make up by itself, as replicated and reflected ones and the first frame repeated. Zeros it can.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pvae.kernels.channel_norm_launch import run
from pvae.kernels.channel_norm_layout import Border, Operands
from pvae.kernels.channel_norm_reference import ACTIVATIONS, Norm, empty_result
from pvae.kernels.norm_op import functional_op

__all__ = ["ACTIVATIONS", "OP", "channel_norm_act"]


def like_x_with_borders(x: Tensor, padding: Sequence[int] | None = None, mode: str = "constant", **_: object) -> Tensor:
    """The fake of an op that returns y with borders."""
    return empty_result(x, Border.of(padding or (), mode, x.dim() - 2))


@functional_op(fake=like_x_with_borders)
def channel_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    factor: float = 1.0,
    activation: str = "none",
    padding: Sequence[int] | None = None,
    mode: str = "constant",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """x [N, C, *spatial] of 2 or 3 spatial dimensions -> y, x's dtype, channels-last.

    weight and bias [C]; scale and shift [1|N, C, 1, ...], like x, or with rows and columns a whole number of times fewer,
    then enlarged by nearest neighbours. activation none, silu, relu or gelu (with erf).
    padding (front, back) for each spatial dimension in their order; mode constant (zeros), replicate or reflect,
    for all dimensions or one for each with commas between. Raises ValueError for operands that do not go together.
    """
    border = Border.of(padding or (), mode, x.dim() - 2)
    return run(Norm(norm, eps, activation, factor), Operands(x, weight, bias, scale, shift), border)


OP = channel_norm_act
