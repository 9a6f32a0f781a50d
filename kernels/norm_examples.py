"""Example inputs of the norm family: operands in every form that `norm_layout` names, strided as graphs have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pvae.kernels.norm_layout import Operands

FORMS = ("channel", "one", "sample", "sample_row", "row", "frame", "slice", "row_slice")


def modulation(
    form: str,
    x_shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    frames: int = 1,
    device: str = "cpu",
) -> Tensor:
    """A scale, shift or gate for x [B, L, C].

    channel [C] · one [1, C] · sample [B, C] · sample_row [B, 1, C] · row [B, L, C] · frame [B, frames, 1, C] ·
    slice: the second sixth of [B, 1, 6C], as `chunk` gives it · row_slice: the same of [B, L, 6C]
    """
    b, length, c = x_shape
    shapes = {
        "channel": (c,), "one": (1, c), "sample": (b, c), "sample_row": (b, 1, c), "row": (b, length, c),
        "frame": (b, frames, 1, c), "slice": (b, 1, 6 * c), "row_slice": (b, length, 6 * c),
    }  # fmt: skip
    if form not in shapes:
        raise ValueError(f"no form {form!r}; it is one of {', '.join(FORMS)}")
    value = torch.randn(shapes[form], generator=generator, device=device).to(dtype)
    return value.chunk(6, -1)[1] if form.endswith("slice") else value


def sequence(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, strided: bool = False, device: str = "cpu"
) -> Tensor:
    """x or a residual [B, L, C]; strided: the tail of a longer sequence, as where text and image tokens were joined."""
    b, length, c = shape
    whole = torch.randn((b, length + 3 * strided, c), generator=generator, device=device).to(dtype)
    return whole[:, 3:] if strided else whole


def examples(
    x_shape: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: bool = False,
    affine: bool = False,
    select: bool = False,
    gate_form: str = "slice",
    form: str = "slice",
    mod_dtype: torch.dtype | None = None,
    frames: int = 1,
    strided: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Operands:
    """Operands of any op of the family for x [B, L, C]; `residual` brings a gate, `select` the twins and select."""
    generator = torch.Generator(device).manual_seed(seed)

    def vector(which: str = form) -> Tensor:
        return modulation(which, x_shape, mod_dtype or dtype, generator, frames, device)

    def weights() -> Tensor:
        return torch.randn(x_shape[-1], generator=generator, device=device).to(dtype)

    return Operands(
        x=sequence(x_shape, dtype, generator, strided, device),
        residual=sequence(x_shape, dtype, generator, False, device) if residual else None,
        gate=vector(gate_form) if residual else None,
        gate1=vector(gate_form) if residual and select else None,
        weight=weights() if affine else None,
        bias=weights() if affine else None,
        scale=vector(),
        scale1=vector() if select else None,
        shift=vector(),
        shift1=vector() if select else None,
        select=torch.randint(0, 2, tuple(x_shape[:2]), generator=generator, device=device) if select else None,
    )
