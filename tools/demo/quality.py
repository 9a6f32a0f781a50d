"""The figures by which a reconstruction, a compiled result and a picture put together from pieces are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1] (so the peak is 2); infinite if they are equal."""
    mse = (image.double().cpu() - reference.double().cpu()).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the (float64) reference."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()


def seam_figure(picture: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> float | None:
    """Mean absolute difference of neighbouring pixels across seams over that inside (DESIGN section 9).

    `picture` is `[..., H, W]`; a seam lies before each of `rows` and of `columns`. Only directions with seams count. None
    where there are no seams, or nothing beside them.
    """
    across: list[torch.Tensor] = []
    inside: list[torch.Tensor] = []
    for dim, seams in ((-2, rows), (-1, columns)):
        if seams:
            steps = picture.double().diff(dim=dim).abs()
            is_seam = torch.zeros(steps.shape[dim], dtype=torch.bool)
            is_seam[[s - 1 for s in seams]] = True
            for found, chosen in ((across, is_seam), (inside, ~is_seam)):
                found.append(steps.index_select(dim, chosen.nonzero()[:, 0].to(steps.device)).flatten())
    if not across:
        return None
    usual = torch.cat(inside)
    return (torch.cat(across).mean() / usual.mean()).item() if usual.any() else None
