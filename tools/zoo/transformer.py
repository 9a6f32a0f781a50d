"""What the zoo's tables say of a diffusion transformer, how its weights are drawn, and what its inputs have in common."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pvae.tools.zoo.case import Call, forward

_MATRICES = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Sizes:
    """Extents of the latents, (frames, height, width) or (height, width), in latents before patches are made of them."""

    latent: tuple[int, ...]
    text: int = 0
    batch: int = 1

    @property
    def shape(self) -> str:
        return "(frames, height, width)" if len(self.latent) == 3 else "(height, width)"

    def resized(self, name: str, latent: tuple[int, ...]) -> "Sizes":
        """The same text and batch at another size. ValueError where the number of extents is wrong."""
        if len(latent) != len(self.latent) or min(latent) < 1:
            raise ValueError(f"size {latent} does not fit {name}: it takes {self.shape}, in latents")
        return replace(self, latent=latent)


Inputs = Callable[[Any, Sizes], Mapping[str, object]]


@dataclass(frozen=True)
class TransformerEntry:
    """A diffusers transformer.

    `tiny` and `full` are what its constructor is given: `full` has the published widths but one or two blocks of each
    kind, `tiny` a few tens of channels and at least two blocks of each kind. `inputs` draws the keyword arguments of
    forward from the global generator, on the default device, floating-point ones in float32 (the case's dtype comes
    later). `full_size` is the published resolution. `blocks` are the paths of the lists of repeated blocks. `call`
    makes one tensor of the output.
    """

    cls: str
    tiny: Mapping[str, object]
    full: Mapping[str, object]
    inputs: Inputs
    tiny_size: Sizes
    full_size: Sizes
    blocks: tuple[str, ...] = ()
    call: Call = forward

    def config(self, preset: str) -> Mapping[str, object]:
        return {"tiny": self.tiny, "full": self.full}[preset]

    def sizes(self, preset: str) -> Sizes:
        return {"tiny": self.tiny_size, "full": self.full_size}[preset]


def draw_weights(model: nn.Module) -> None:
    """Random weights for every layer, in place, with signals of about 1 throughout.

    Matrices keep the variance of what they multiply: torch's default takes a factor of 3 from it at each layer and
    published models start modulations and gates at 0, either of which would leave scale, shift and gate without effect.
    What is constant otherwise (norms' weights, biases, tables) gets noise, since it would hide a rewrite that drops it.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and isinstance(module, _MATRICES):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 3 and len(parameter) > 1:  # [experts, in, out], which diffusers leaves unset
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 1 and module is model:  # a token for padding, which LuminaNext leaves unset
                parameter.normal_()
            elif parameter.ndim and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def latents(model: Any, sizes: Sizes) -> torch.Tensor:
    """`[B, in_channels, (T,) H, W]`."""
    return torch.randn(sizes.batch, model.config.in_channels, *sizes.latent)


def tokens(model: Any, sizes: Sizes, patch: int = 2) -> torch.Tensor:
    """`[B, L, in_channels]`, latents that the pipeline has packed in patches of `patch` x `patch`."""
    return torch.randn(sizes.batch, math.prod(sizes.latent) // patch**2, model.config.in_channels)


def text(sizes: Sizes, channels: int) -> torch.Tensor:
    """`[B, text tokens, channels]`."""
    return torch.randn(sizes.batch, sizes.text, channels)


def timestep(sizes: Sizes, scale: float = 1000.0) -> torch.Tensor:
    """`[B]`: a half of `scale`, a quarter and so on.

    A thousand times that is exact in bfloat16. Models multiply by 1000 before they take sines: of another time, its
    rounding alone would turn the embedding of a bfloat16 model into noise.
    """
    return scale * 0.5 ** torch.arange(1, sizes.batch + 1)
