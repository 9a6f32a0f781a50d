"""Interpolation along one dimension as a weighted gather of rows, for pieces of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Taps = Sequence[tuple[tuple[int, ...], tuple[float, ...]]]


def weighted_rows(x: torch.Tensor, dim: int, taps: Taps) -> torch.Tensor:
    """Row j of the result is the sum over taps of `weight[j] * x[index[j]]` along `dim`.

    Summed in float32 for narrower dtypes, as torch's interpolation is, and rounded once. A single tap of weights 1 copies.
    """
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
    total: torch.Tensor | None = None
    for index, weight in taps:
        rows = x.index_select(dim, torch.tensor(index, dtype=torch.int64, device=x.device))
        if len(taps) == 1 and set(weight) <= {1.0}:
            return rows
        term = rows.to(wide) * torch.tensor(weight, dtype=wide, device=x.device).reshape(shape)
        total = term if total is None else total + term
    assert total is not None, "no taps"
    return total.to(x.dtype)
