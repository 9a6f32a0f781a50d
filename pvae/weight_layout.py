"""Convolution weights in channels_last, in place, and the strides that the model gave them.

In place because every call would re-lay them otherwise (LTX-2: 4 % of a decode). Identity and values stay. Forwards are still
traced with the strides that the weights came with, and what runs eagerly gets these back, so that no model sees a difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from pvae.call_structure import in_containers
from pvae.kernels.channels_last import FORMATS, is_channels_last
from pvae.options import Options
from pvae.passes import channels_last
from pvae.passes.channels_last import no_gain

_GIVEN = WeakTensorKeyDictionary()  # parameters that were re-laid here -> the strides that they had


def lay_out(module: nn.Module, options: Options) -> None:
    """Put convolution weights into channels_last in place where the layout policy wants them so."""
    mode = channels_last.mode(options)
    for conv in module.modules():
        if mode == "off" or not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            continue
        weight = conv.weight
        if type(weight.data) is torch.Tensor and not weight.is_meta and (mode == "on" or not no_gain(weight)):
            laid = weight.data.contiguous(memory_format=FORMATS[weight.dim()])
            if laid.stride() != weight.stride():
                _GIVEN[weight] = weight.stride()
                weight.data = laid


def given_strides(weight: torch.Tensor) -> tuple[int, ...]:
    """The strides of a weight as the model has it without pvae."""
    given: tuple[int, ...] | None = _GIVEN.get(weight)
    return weight.stride() if given is None or not is_channels_last(weight) else given


def eager_strides(call: Any, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The strides that inputs and weights would have without pvae: those that a forward is traced with.

    Caches that the caller holds in lists and dicts come back as pvae laid them out. Where no weight is channels_last, eager
    would have left them contiguous.
    """
    given = [given_strides(w) for w in weights]
    own = any(w.dim() in FORMATS and s != _contiguous(w) for w, s in zip(weights, given, strict=True))
    return [
        _contiguous(t) if held and not own and t.dim() in FORMATS and is_channels_last(t) else t.stride()
        for t, held in zip(tensors, in_containers(*call), strict=True)
    ] + given


def _contiguous(tensor: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def put_back(module: nn.Module) -> None:
    """Give the weights of `module` the strides that they came with, in place."""
    for weight in _laid(module):
        weight.data = _copy(weight.data, _GIVEN.pop(weight))


@contextmanager
def as_given(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module` have the strides that they came with; what is written to them stays."""
    laid = [(weight, weight.data) for weight in _laid(module)]
    for weight, data in laid:
        weight.data = _copy(data, _GIVEN[weight])
    try:
        yield
    finally:
        for weight, data in laid:
            weight.data = data.copy_(weight.data)


def _laid(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p in _GIVEN and given_strides(p) != p.stride()]


def _copy(data: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(data.shape, strides, dtype=data.dtype, device=data.device).copy_(data)
