"""pvae::phase_weight: against its formula and the enlarged convolution, its fake, its refusals, and what its rounding costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvae.kernels import conv_taps
from pvae.kernels.channels_last import is_channels_last
from pvae.kernels.phase_weight import OP, by_product
from pvae.testing import relative_error, tensors

kernels = st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 1, 3])).map(
    lambda s: (s[0], s[1], *([] if s[2] is None else [s[2]]), 3, 3)
)


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=(1,) * (x.dim() - 4) + (2, 2), mode="nearest")


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 3x3 convolution of the enlarged picture."""
    if x.dim() == 4:
        return F.conv2d(enlarged(x), weight, bias, padding=1)
    return F.conv3d(enlarged(x), weight, bias, padding=(weight.shape[2] // 2, 1, 1))


def phases(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    time = [weight.shape[2] // 2] * 2 if x.dim() == 5 else []
    ones = [1] * (x.dim() - 2)
    return conv_taps.reference(x, None, OP(weight), bias, None, ones, [*time, 1, 1, 1, 1], ones, True, "none")


def test_taps_that_meet_are_added() -> None:
    """Powers of two: every sum names its taps."""
    weight = torch.tensor([[1.0, 2, 4], [8, 16, 32], [64, 128, 256]])[None, None]
    first, second, third, fourth = OP(weight)[:, 0].tolist()
    assert first == [[1, 2 + 4], [8 + 64, 16 + 32 + 128 + 256]]
    assert second == [[1 + 2, 4], [8 + 64 + 16 + 128, 32 + 256]]
    assert third == [[1 + 8, 2 + 4 + 16 + 32], [64, 128 + 256]]
    assert fourth == [[1 + 2 + 8 + 16, 4 + 32], [64 + 128, 256]]


def test_rows_are_phase_major() -> None:
    weight = torch.randn(5, 2, 3, 3, 3)
    for o in range(5):
        assert torch.equal(OP(weight)[o::5], OP(weight[o : o + 1]))


@given(tensors(kernels, (torch.float64, torch.float32)))
def test_one_product_makes_the_same_sums(weight: Tensor) -> None:
    """What GPUs do, in the same memory order."""
    found, expected = by_product(weight), OP(weight)
    assert found.shape == expected.shape and is_channels_last(found)
    torch.testing.assert_close(found, expected)


@given(tensors(kernels, (torch.float64, torch.float32)), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
def test_is_the_enlarged_convolution(weight: Tensor, n: int, h: int, w: int) -> None:
    x = torch.randn(n, weight.shape[1], *([4] if weight.dim() == 5 else []), h, w, dtype=weight.dtype)
    bias = torch.randn(weight.shape[0], dtype=weight.dtype)
    bound = 1e-14 if weight.dtype == torch.float64 else 1e-6
    assert relative_error(phases(x, weight, bias), plain(x, weight, bias)) < bound


@given(tensors(kernels))
def test_rounded_once_and_as_the_fake_says(weight: Tensor) -> None:
    found = OP(weight)
    assert found.dtype == weight.dtype and is_channels_last(found)
    assert torch.equal(found, OP(weight.float() if weight.dtype != torch.float64 else weight).to(weight.dtype))
    with FakeTensorMode() as mode:
        fake = OP(mode.from_tensor(weight))
    assert (fake.shape, fake.dtype, fake.stride()) == (found.shape, found.dtype, found.stride())


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 3, 2, 3, 3)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(OP, (torch.randn(shape),))


@pytest.mark.parametrize("make", [lambda t: t, lambda t: FakeTensorMode().from_tensor(t)])
def test_other_weights_are_refused(make: object) -> None:
    for shape in ((2, 3, 3), (2, 3, 1, 3), (2, 3, 3, 1, 1), (2, 3, 5, 5)):
        with pytest.raises(ValueError, match=r"the weight is \[O, C, \(kt,\) 3, 3\], not"):
            OP(make(torch.randn(shape)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"torch\.int32 is not a floating-point type"):
        OP(make(torch.ones(2, 3, 3, 3, dtype=torch.int32)))  # type: ignore[operator]


def ratio(dtype: torch.dtype, mean: float = 0.0, cancels: bool = False) -> float:
    """Relative RMS error of the phases over that of the 3x3 form, of which both accumulate exactly and round the result."""
    x = (torch.randn(1, 96, 16, 16) + mean).to(dtype).double()
    weight = torch.randn(32, 96, 3, 3) / (96 * 9) ** 0.5
    if cancels:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
    weight = weight.to(dtype)
    exact = plain(x, weight.double())
    ours = conv_taps.reference(x, None, OP(weight).double(), None, None, [1, 1], [1] * 4, [1, 1], True, "none")
    return relative_error(ours.to(dtype), exact) / relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_the_sums_costs(dtype: torch.dtype) -> None:
    """The figures that phase_weight.py states."""
    assert 1.3 < ratio(dtype) < 1.5
    assert 1.55 < ratio(dtype, mean=1.0, cancels=True) < 1.9
