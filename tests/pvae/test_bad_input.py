"""Bad and unusual input: the right result, or one sentence that says what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae

X = torch.randn(2, 4, 3, 5, 5)
OPTIONS = {"engine": "eager", "conv3d": "unfold2d"}
Compile = Callable[..., Any]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["pvae.compile", "torch.compile"])
def compiled(request: pytest.FixtureRequest) -> Compile:
    """Either entrance."""

    def build(model: nn.Module, **options: Any) -> Any:
        if request.param == "pvae.compile":
            return pvae.compile(model, **{**OPTIONS, **options})
        return torch.compile(model, backend="pvae", options={**OPTIONS, **options})

    build.entry = request.param  # type: ignore[attr-defined]
    return build


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if isinstance(w.message, pvae.PvaeWarning)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 6, 3, padding=1)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return self.conv(x).relu()


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [None, 3, 2.5, True, "text", torch.float32, (1, "a"), [2, None], {"k": 1}, slice(1)])
def test_arguments_that_are_no_tensors(compiled: Compile, other: Any) -> None:
    model = Net()
    expected = model(X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled(model)
        for _ in range(2):
            close(got(X, other), expected)
    assert len(warned(caught)) == (1 if isinstance(other, slice) and compiled.entry == "pvae.compile" else 0)  # type: ignore[attr-defined]


def test_no_tensor_at_all(compiled: Compile) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, n: int) -> Tensor:
            return self.weight * n

    got = compiled(Constant())
    assert torch.equal(got(2), torch.full((3,), 2.0)) and torch.equal(got(4), torch.full((3,), 4.0))


def test_meta_model(compiled: Compile) -> None:
    model = Net().to("meta")
    if compiled.entry == "pvae.compile":  # type: ignore[attr-defined]
        with pytest.raises(
            pvae.PvaeError, match="Net: an? (weight|input) is on the meta device and has no values; load it"
        ):
            compiled(model)(X.to("meta"))
        model.to_empty(device="cpu")
        assert model(X).shape == (2, 6, 3, 5, 5)
    else:
        with pytest.warns(pvae.PvaeWarning, match="is on the meta device and has no values; load the weights first"):
            assert compiled(model)(X.to("meta")).device.type == "meta"


@pytest.mark.parametrize(("weights", "inputs"), [("cpu", "meta"), ("meta", "cpu")])
def test_mixed_devices(compiled: Compile, weights: str, inputs: str) -> None:
    model = Net().to(weights)
    if compiled.entry == "pvae.compile":  # type: ignore[attr-defined]
        with pytest.raises(pvae.PvaeError, match="Net: an? (weight|input) is on the meta device and has no values"):
            compiled(model)(X.to(inputs))
    else:  # eager torch does not mind
        with pytest.warns(pvae.PvaeWarning, match="is on the meta device and has no values"):
            assert compiled(model)(X.to(inputs)).shape == (2, 6, 3, 5, 5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
def test_other_dtypes_without_convolution(compiled: Compile, dtype: torch.dtype) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone() + x.reshape(-1)[0], F.pad(x, (1, 1)).sum(0)

    model = Sums()
    x = (X * 3).to(dtype)
    expected = Sums()(x)
    for a, b in zip(compiled(model)(x), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_complex_convolution(compiled: Compile) -> None:
    model = nn.Conv3d(4, 6, 3).to(torch.complex64)
    x = X.to(torch.complex64)
    expected = model(x)
    close(compiled(model)(x), expected)


def test_integer_input_to_a_float_model_is_torchs_own_error(compiled: Compile) -> None:
    with pytest.raises(Exception, match=r"(?i)type|dtype"):
        compiled(Net())(torch.ones(1, 4, 3, 5, 5, dtype=torch.int64))


def test_grad_mode_is_untouched_with_one_warning_and_right_gradients(compiled: Compile) -> None:
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled(model)
        for _ in range(2):
            got(X).square().sum().backward()
            twin(X).square().sum().backward()
    assert len(warned(caught)) == 1 and "torch.no_grad()" in warned(caught)[0]
    close(model.conv.weight.grad, twin.conv.weight.grad)
    assert pvae.report(model).matches("conv3d_unfold") == 0


def test_grad_mode_without_anything_that_requires_grad_is_rewritten(compiled: Compile) -> None:
    model = Net().requires_grad_(False)
    expected = model(X)
    with torch.enable_grad():
        got = compiled(model)(X)
    close(got, expected)
    assert not got.requires_grad and pvae.report(model).matches("conv3d_unfold") == 1


def test_autocast_around(compiled: Compile) -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
        got = compiled(model)
        with pytest.warns(pvae.PvaeWarning, match="autocast is on; cast the model and its inputs instead"):
            result = got(X)
    assert result.dtype == torch.bfloat16
    close(result, expected)


def test_autocast_inside(compiled: Compile) -> None:
    class Inside(Net):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.conv(x)
            return y.float()

    model = Inside()
    expected = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pvae.PvaeWarning)
        result = compiled(model)(X)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_hooks(compiled: Compile) -> None:
    model = Net()
    model.conv.register_forward_hook(lambda module, args, y: y * 2)
    expected = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pvae.PvaeWarning)
        close(compiled(model)(X), expected)


def test_empty_batch(compiled: Compile) -> None:
    x = torch.randn(0, 4, 3, 5, 5)
    model = Net()
    expected = model(x)
    got = compiled(model)(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype


def test_too_small_for_the_kernel_is_torchs_own_error(compiled: Compile) -> None:
    with pytest.raises(Exception, match=r"(?i)kernel size|output size"):
        compiled(nn.Conv3d(4, 6, 3))(X[:, :, :1])


def test_no_convolution_and_nothing_at_all(compiled: Compile) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.GELU())
    expected = model(X)
    close(compiled(model)(X), expected)
    assert torch.equal(compiled(nn.Identity())(X), X)


def test_in_place_operations_of_the_model(compiled: Compile) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            y = self.conv(x)
            y[:, ::2] *= 2
            y[..., 0].zero_()
            y.transpose(1, 2)[:, 0].add_(1)
            return F.relu_(y)

    model = InPlace()
    expected = model(X)
    close(compiled(model)(X), expected)


def test_numpy_scalars_and_zero_dimensional_tensors(compiled: Compile) -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return self.conv(x) * rest[0]

    model = Scaled()
    expected = model(X, torch.tensor(3.0))
    close(compiled(model)(X, torch.tensor(3.0)), expected)


def test_strict_turns_the_sentence_into_an_error(compiled: Compile) -> None:
    with torch.enable_grad(), pytest.raises(Exception, match="grad mode is on"):
        compiled(Net(), strict="on")(X)
