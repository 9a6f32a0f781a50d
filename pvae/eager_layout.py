"""The strides that tensors would have without pvae, where pvae laid them out otherwise: weights in place, and caches.

Weights in place because every call would re-lay them (LTX-2: 4 % of a decode); identity and values stay. Forwards are still
traced with the strides that the model gives, and what runs eagerly has its weights so, so that no model sees a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pvae.kernels.channels_last import FORMATS
from pvae.options import Options
from pvae.passes import channels_last
from pvae.passes.channels_last import no_gain
from pvae.passes.output_layout import in_strides

_NOTE = "_pvae_strides"  # an attribute of a tensor that was laid out here: (its strides, those without pvae)
Strides = tuple[int, ...]


def note(tensor: torch.Tensor, eager: Strides) -> None:
    """Remember that `tensor` would have the strides `eager` without pvae."""
    setattr(tensor, _NOTE, (tensor.stride(), eager))


def eager_strides(tensor: torch.Tensor) -> Strides:
    """The strides that `tensor` would have without pvae."""
    noted: tuple[Strides, Strides] | None = getattr(tensor, _NOTE, None)
    return noted[1] if noted is not None and noted[0] == tensor.stride() else tensor.stride()


def lay_out_weights(module: nn.Module, options: Options) -> None:
    """Put convolution weights into channels_last in place where the layout policy wants them so."""
    mode = channels_last.mode(options)
    for conv in module.modules():
        if mode == "off" or not isinstance(conv, (nn.Conv2d, nn.Conv3d)):
            continue
        weight = conv.weight
        if type(weight.data) is torch.Tensor and not weight.is_meta and (mode == "on" or not no_gain(weight)):
            given, laid = weight.stride(), weight.data.contiguous(memory_format=FORMATS[weight.dim()])
            if laid.stride() != given:
                weight.data = laid
                note(weight, given)


def put_back(module: nn.Module) -> None:
    """Give the weights of `module` the strides that they came with, in place."""
    for weight in _laid(module):
        weight.data = in_strides(weight.data, eager_strides(weight))
        delattr(weight, _NOTE)


@contextmanager
def given_weights(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module` have the strides that they came with; what is written to them stays."""
    laid = [(weight, weight.data) for weight in _laid(module)]
    for weight, _ in laid:
        weight.data = in_strides(weight.data, eager_strides(weight))
    try:
        yield
    finally:
        for weight, data in laid:
            weight.data = data.copy_(weight.data)


def _laid(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if eager_strides(p) != p.stride()]
