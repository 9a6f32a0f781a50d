"""What a capture makes of a forward before the first pass: here, of what reads memory by strides of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pvae

X = torch.randn(2, 4, 8, 6, 6, dtype=torch.float64)
EVERYTHING = {"channels_last": "on", "conv3d": "taps", "norm_act": "on", "upsample_conv": "on", "engine": "eager"}


def written(y: Tensor) -> Tensor:
    y = y.clone()
    y.as_strided((2, 4), (1152, 3), 5).mul_(2)
    return y


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda y: y.as_strided((2, 4, 8, 6, 6), (1152, 1, 144, 24, 4)),
    "windows": lambda y: y.as_strided((2, 4, 8, 3, 4, 6), (1152, 288, 36, 6, 6, 1)),
    "of a slice, from its start": lambda y: y[:, 1:, ::2].as_strided((2, 3), (1152, 36)),
    "of a slice, from the start of the memory": lambda y: y[:, 1:, ::2].as_strided((2, 3), (1152, 36), 0),
    "of a permutation": lambda y: y.permute(0, 2, 3, 4, 1).as_strided((8, 8), (9, 31), 2),
    "of a view of a view": lambda y: y.flatten(1)[1].view(-1, 4).t().as_strided((3, 3), (2, 5)),
    "by strides that it reads": lambda y: y + y.as_strided(y.shape, y.contiguous().stride()),
    "at an offset that it reads": lambda y: y.as_strided((8, 3), y.stride()[2:4], y[:, 1:].storage_offset()),
    "strides as numbers": lambda y: y * y.stride()[2] + y[:, :, ::2].stride()[2] + y[1:].storage_offset(),
    "of a sum": lambda y: (y + 1).as_strided((8, 8), (9, 31), 2),
    "written": written,
}


class Net(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1), nn.GroupNorm(2, 8)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.b(F.silu(self.norm(self.a(x)))))


@pytest.mark.parametrize("compiled", ["pvae.compile", "torch.compile", "torch.compile, dynamic"])
@pytest.mark.parametrize("name", READERS)
def test_what_reads_strides_reads_eagers(name: str, compiled: str) -> None:
    """Whatever layout the convolutions take."""
    model = Net(READERS[name]).double()
    eager = copy.deepcopy(model)
    run: Any
    if compiled == "pvae.compile":
        run = pvae.compile(model, **EVERYTHING)
    else:
        run = torch.compile(model, backend="pvae", options=EVERYTHING, dynamic="dynamic" in compiled)
    with torch.no_grad():
        for x in (X, X + 1):
            torch.testing.assert_close(run(x), eager(x), rtol=1e-10, atol=1e-12)
    report = pvae.report(model) if compiled == "pvae.compile" else pvae.report()
    assert report.matches("conv_taps") == 2


@pytest.mark.parametrize(("kernel", "by"), [(1, "pointwise_before_resample"), (3, "fold_upsample")])
def test_behind_an_enlarged_picture(kernel: int, by: str) -> None:
    class Enlarges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, kernel, padding=kernel // 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.interpolate(self.a(x), scale_factor=2.0))
            return y + y.as_strided(y.shape, (576, 1, 48, 4))

    model = Enlarges().double()
    eager = copy.deepcopy(model)
    pvae.compile(model, **EVERYTHING)
    with torch.no_grad():
        torch.testing.assert_close(model(X[:, :, 0]), eager(X[:, :, 0]), rtol=1e-10, atol=1e-12)
    assert pvae.report(model).matches(by) == 1


@pytest.mark.parametrize("cut", [(), (slice(None), slice(1, None)), (slice(1, None),)])
def test_of_an_input(cut: Any) -> None:
    """The last one is dense and does not begin where its memory does."""
    x = X.transpose(1, 2)[cut]

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.as_strided((4, 4), (1, 3), x.storage_offset() + 2) * 2

    model = torch.compile(Reads(), backend="pvae", options={"engine": "eager"}, dynamic=False)
    assert torch.equal(model(x), Reads()(x))
