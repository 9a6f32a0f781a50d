"""pvae::channels_last and pvae::compact: copies in another order of memory, and fakes that say so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.testing import tensors

shapes = st.lists(st.integers(0, 4), min_size=4, max_size=5).map(tuple)


def same_as_fake(op: object, *args: object) -> Tensor:
    """The op's result, after its fake was found to have the same sizes, dtype and strides."""
    real = op(*args)  # type: ignore[operator]
    with FakeTensorMode() as mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])  # type: ignore[operator]
    assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
    if real.numel():
        assert real.stride() == fake.stride()
    return real


@given(tensors(shapes))
def test_channels_last(x: Tensor) -> None:
    y = same_as_fake(torch.ops.pvae.channels_last, x)
    assert torch.equal(x, y) and is_channels_last(y)
    if x.numel():
        assert x.data_ptr() != y.data_ptr()


@given(tensors(st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)), st.randoms())
def test_compact_keeps_nothing_else_alive(x: Tensor, random: object) -> None:
    order = list(range(x.dim()))
    random.shuffle(order)  # type: ignore[attr-defined]
    y = same_as_fake(torch.ops.pvae.compact, x, order)
    assert torch.equal(x, y) and y.permute(order).is_contiguous()
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    if x.numel():
        assert x.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("dims", FORMATS)
def test_opcheck(dims: int) -> None:
    torch.library.opcheck(torch.ops.pvae.channels_last, (torch.randn(2, 3, 4, 5, 6)[(0,) * (5 - dims)],))
    torch.library.opcheck(torch.ops.pvae.compact, (torch.randn(2, 3, 4), [2, 0, 1]))
