"""Cross-fades between tiles: bit for bit the loop over rows, and in its place only where a model's loop is that."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pvae import tile_blend
from pvae.tile_blend import VectorBlend, blend, vectorise_blends


def loop(a: Tensor, b: Tensor, blend_extent: int, dim: int) -> Tensor:
    """diffusers' blend, for any dimension."""
    blend_extent = min(a.shape[dim], b.shape[dim], blend_extent)
    for y in range(blend_extent):
        row = a.select(dim, a.shape[dim] - blend_extent + y) * (1 - y / blend_extent)
        b.select(dim, y).copy_(row + b.select(dim, y) * (y / blend_extent))
    return b


@given(
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=5),
    longer=st.integers(-2, 3),
    extent=st.integers(-1, 9),
    dim=st.sampled_from([-1, -2, -3]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    last=st.booleans(),
)
def test_blend_is_the_loop_to_the_bit(
    sizes: list[int], longer: int, extent: int, dim: int, dtype: torch.dtype, last: bool
) -> None:
    other = [*sizes]
    other[dim] = max(1, other[dim] + longer)
    a, b = torch.randn(other, dtype=torch.float64).to(dtype), torch.randn(sizes, dtype=torch.float64).to(dtype)
    if last and b.dim() == 4:
        b = b.contiguous(memory_format=torch.channels_last)
    before, ours, theirs = a.clone(), b.clone(), b.clone()
    assert blend(a, ours, extent, dim) is ours
    assert torch.equal(ours, loop(a, theirs, extent, dim))
    assert torch.equal(a, before)


class Blends(nn.Module):
    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return loop(a, b, blend_extent, 2)  # the height of four dimensions only

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return loop(a, b.clone(), blend_extent, -1)  # does not write

    def blend_t(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        for y in range(blend_extent := min(a.shape[-3], b.shape[-3], blend_extent)):
            b[..., y, :, :] = (a[..., y - blend_extent, :, :] + b[..., y, :, :]) / 2  # no ramp
        return b


def test_blends_are_replaced_only_where_they_agree() -> None:
    model = Blends()
    kept = vectorise_blends(model)
    assert set(kept) == {"blend_h", "blend_t"} and set(model.__dict__) & set(tile_blend.DIMS) == {"blend_v"}
    assert isinstance(model.blend_v, VectorBlend) and model.blend_v.ranks == {4}
    a, b = torch.randn(1, 2, 6, 5, 4), torch.randn(1, 2, 5, 5, 4)
    assert torch.equal(model.blend_v(a, b.clone(), 3), loop(a, b.clone(), 3, 2)), "five: the model's own dimension"
    whole = torch.arange(8).reshape(1, 1, 4, 2)
    assert torch.equal(model.blend_v(whole, whole.clone(), 2), loop(whole, whole.clone(), 2, 2)), "no floats: its own"
