"""The two figures by which a reconstruction and a compiled result are judged."""

from __future__ import annotations

import math

import torch


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1] (so the peak is 2); infinite if they are equal."""
    mse = (image.double().cpu() - reference.double().cpu()).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the (float64) reference."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()
