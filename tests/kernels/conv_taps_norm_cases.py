"""Convolutions with a norm behind them, for the tests of `pvae::conv_taps_norm`, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.kernels.channel_norm_layout import Border
from pvae.kernels.channel_norm_layout import Operands as NormOperands
from pvae.kernels.channel_norm_reference import Norm, exact
from pvae.kernels.conv_taps import conv_taps
from pvae.kernels.conv_taps_launch import Memory, NormCall
from pvae.kernels.conv_taps_norm import conv_taps_norm
from tests.kernels.conv_taps_cases import Case, Operands


@dataclass(frozen=True)
class NormCase:
    """`conv` has no activation; `vectors`: whether there are a norm_weight and a norm_bias."""

    conv: Case
    norm: str = "l2"
    activation: str = "silu"
    keep: bool = False
    tail: int = 0
    vectors: tuple[bool, bool] = (True, False)
    eps: float = 1e-6
    factor: float = 3.0

    def make(self, device: str = "cpu") -> Given:
        generator = torch.Generator().manual_seed(1)
        vectors = [
            torch.randn(self.conv.out, generator=generator).to(device, self.conv.dtype) if given else None
            for given in self.vectors
        ]
        return Given(self, self.conv.make(device), vectors[0], vectors[1])

    def call(self) -> NormCall:
        """As a plan sees it."""
        vector = Memory(torch.Size([self.conv.out]), (1,), self.conv.dtype, torch.device("meta"))
        weight, bias = (vector if given else None for given in self.vectors)
        return NormCall(weight, bias, self.norm, self.eps, self.factor, self.activation, self.keep, self.tail)


@dataclass(frozen=True)
class Given:
    case: NormCase
    conv: Operands
    weight: Tensor | None
    bias: Tensor | None

    def run(self, config: Sequence[int] = ()) -> tuple[Tensor, Tensor, Tensor]:
        case, (*args, _) = self.case, self.conv.args()
        norm = (self.weight, self.bias, case.norm, case.eps, case.factor, case.activation, case.keep, case.tail)
        results: tuple[Tensor, Tensor, Tensor] = conv_taps_norm(*args, list(config), *norm)
        return results

    def plain(self, config: Sequence[int] = ()) -> Tensor:
        """The convolution alone, by the op that is for that."""
        y: Tensor = conv_taps(*self.conv.args(), list(config))
        return y

    def normalised(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of `y`, computed in `dtype`."""
        case = self.case
        norm = Norm(case.norm, case.eps, case.activation, case.factor)
        return exact(norm, NormOperands(y, self.weight, self.bias), Border(), dtype)
